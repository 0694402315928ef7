"""Every option of a gateway in one table: default, environment variable, check.

A constructor's argument beats the environment, which beats the default.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from eventlog_handler._paths import (
    SessionPaths,
    check_file_pattern,
    parse_directory_pattern,
    parse_unknown_pattern,
)

SUFFIXES = {"jsonl": ".jsonl", "json": ".json", "custom": ".log"}
F = TypeVar("F", bound=Callable[..., None])
T = TypeVar("T")


def remember_given(init: F) -> F:
    """Let a constructor know which arguments its caller wrote, in `self._given`.

    A default that is written in a signature for its readers cannot be told from the same value
    given on purpose, and only the latter beats the environment.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given["self"]
        given.update(given.pop("kwargs", {}))
        self._given = given
        init(self, *args, **kwargs)

    return cast("F", remembering)


def check_boolean(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else value
    if word in ("true", "1", "yes", "on"):
        return True
    if word in ("false", "0", "no", "off"):
        return False
    raise ValueError(f"{name}={value!r} is neither true nor false; write 'true' or 'false'")


def _number(convert: Callable[[Any], T], least: float, what: str) -> Callable[[str, Any], T]:
    def check(name: str, value: Any) -> T:
        try:
            number: Any = convert(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        # Neither True for 1, nor 2.5 for 2, nor NaN, which differs from itself.
        same = number == number and not (isinstance(value, float) and number != value)
        if not same or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not {what}")
        if number < least or number == math.inf:
            raise ValueError(f"{name}={value!r} is out of range: write {what} from {least} on")
        return convert(value)

    return check


def check_one_of(*choices: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value in choices:
            return str(value)
        words = ", ".join(map(repr, choices))
        raise ValueError(f"{name}={value!r} does not exist; write one of {words}")

    return check


def _callable_or_none(name: str, value: Any) -> Any:
    if value is None or callable(value):
        return value
    raise TypeError(f"{name} must be callable or None, not {type(value).__name__}")


def _formatter(name: str, value: Any) -> Any:
    # A `logging.Formatter` is not callable, but has `format`.
    if callable(getattr(value, "format", None)):
        return value
    return _callable_or_none(name, value)


def _callables(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of callables, not {type(value).__name__}")
    found = tuple(value)
    for each in found:
        if not callable(each):
            raise TypeError(f"{name} has {each!r}, which cannot be called with an event's fields")
    return found


def check_text(name: str, value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"{name}={value!r} must be a str that is not empty")


def _mode(name: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 0o777:
        return value
    raise ValueError(f"{name}={value!r} must be permission bits from 0 to 0o777, such as 0o600")


def _directory(name: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"{name}={value!r} must be a path that is not empty")
    try:
        unusable = b"\0" in os.fsencode(value)
    except UnicodeEncodeError:
        unusable = True
    if unusable:
        raise ValueError(f"{name}={value!r} cannot be a path: no file system takes its characters")
    # Absolute now: a later chdir of the application must not split its sessions.
    return Path(os.path.abspath(os.path.expanduser(os.fspath(value))))


def _refuse_unwritable(name: str, base: Path) -> None:
    """Check that the base directory can be written, without making it: files are lazy."""
    there = base
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{name}={str(base)!r} cannot be a directory: {there} is not one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{name}={str(base)!r} cannot be written: no permission in {there}")


def _transports(name: str, value: Any) -> Any:
    for url in value.split() if isinstance(value, str) else ():
        if "://" not in url:
            # Without the value: a URL's password may be in what was torn apart.
            raise ValueError(f"{name} wants URLs, scheme://…, with spaces between them")
    return value


def setting(default: Any, check: Callable[[str, Any], Any], variable: str | None = None) -> Any:
    """Return an option's field: its default, its check, and the variable it may come from."""
    return field(default=default, metadata={"check": check, "variable": variable})


def _pattern(parse: Callable[[str, str], object]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        parse(name, value)
        return str(value)

    return check


check_seconds = _number(float, 0, "a number of seconds")
check_some_seconds = _number(float, 0.001, "a number of seconds")
_check_count = _number(int, 0, "a whole number")
check_one_or_more = _number(int, 1, "a whole number")


def check_count_or_none(name: str, value: Any) -> int | None:
    """Check a number from 1 on that may be left out."""
    return None if value is None else check_one_or_more(name, value)


# Without a repr: a transport's URL may hold a password.
@dataclass(frozen=True, repr=False)
class Settings:
    """A gateway's options, checked. The first block is the specification's, the rest is ours."""

    log_base_dir: Path = setting("logs/sessions", _directory, "AGENT_LOG_DIR")
    downstream_callback: Any = setting(None, _callable_or_none)
    downstream_transport: Any = setting(None, _transports, "AGENT_LOG_TRANSPORT")
    include_system_prompt: bool = setting(True, check_boolean, "AGENT_LOG_INCLUDE_PROMPT")
    log_format: str = setting("jsonl", check_one_of(*SUFFIXES), "AGENT_LOG_FORMAT")
    file_naming_pattern: str = setting(
        "%Y%m%d_%H%M%S", _pattern(check_file_pattern), "AGENT_LOG_FILE_PATTERN"
    )
    error_handler: Any = setting(None, _callable_or_none)
    max_retry_attempts: int = setting(3, _check_count, "AGENT_LOG_MAX_RETRIES")
    retry_delay_seconds: float = setting(1.0, check_seconds, "AGENT_LOG_RETRY_DELAY")
    enable_local_logging: bool = setting(True, check_boolean, "AGENT_LOG_ENABLE_LOCAL")
    session_directory_pattern: str = setting(
        "{session_id}", _pattern(parse_directory_pattern), "AGENT_LOG_SESSION_PATTERN"
    )
    unknown_session_pattern: str = setting(
        "unknown_{uuid}", _pattern(parse_unknown_pattern), "AGENT_LOG_UNKNOWN_PATTERN"
    )

    batch_bytes: int = setting(1_000_000, check_one_or_more)
    batch_events: int = setting(500, check_one_or_more)
    batch_seconds: float = setting(0.0, check_seconds)
    breaker_failures: int = setting(5, check_one_or_more)
    breaker_reset_seconds: float = setting(30.0, check_some_seconds)
    directory_mode: int = setting(0o700, _mode)
    downstream_wait_seconds: float = setting(1.0, check_seconds)
    file_mode: int = setting(0o600, _mode)
    formatter: Any = setting(None, _formatter)
    max_file_bytes: int | None = setting(None, check_count_or_none)
    max_open_files: int = setting(240, check_one_or_more)
    max_pending_events: int = setting(10_000, check_one_or_more)
    processors: tuple[Any, ...] = setting((), _callables)
    retry_max_delay_seconds: float = setting(60.0, check_seconds)
    send_timeout_seconds: float = setting(30.0, check_some_seconds)
    session_id_field: str = setting("session_id", check_text)
    shutdown_timeout_seconds: float = setting(5.0, check_seconds)

    def paths(self, unknown_uuid: str) -> SessionPaths:
        """Return where the sessions live."""
        return SessionPaths(
            self.log_base_dir,
            self.session_directory_pattern,
            self.unknown_session_pattern,
            self.file_naming_pattern,
            SUFFIXES[self.log_format],
            unknown_uuid,
        )


def resolve(given: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Settings:
    """Return the settings in force.

    Args:
        given: What the caller wrote, by option.
        environment: `os.environ` unless given.

    Raises:
        TypeError: An option does not exist, or is of a wrong kind; names it and the nearest one.
        ValueError: An option or variable has a value that cannot be; names it and the value.
    """
    environment = os.environ if environment is None else environment
    refuse_unknown(given, OPTION_NAMES)
    values, said_as = {}, {}
    for option in fields(Settings):
        name, variable = option.name, option.metadata["variable"]
        if name in given and not (name == "log_base_dir" and given[name] is None):
            value = given[name]
        elif variable is not None and variable in environment:
            name, value = variable, environment[variable]
        else:
            value = option.default
        values[option.name] = option.metadata["check"](name, value)
        said_as[option.name] = name
    settings = Settings(**values)
    if settings.enable_local_logging:
        _refuse_unwritable(said_as["log_base_dir"], settings.log_base_dir)
    if settings.log_format == "custom" and settings.formatter is None:
        raise ValueError(
            f"{said_as['log_format']}='custom' needs formatter=…, a callable or a logging.Formatter"
        )
    return settings


OPTION_NAMES = tuple(option.name for option in fields(Settings))


class InForce:
    """Has each option in force as an attribute, read only.

    Properties and no `__getattr__`: with that, CPython looks up all attributes of the class the
    slow way, which took 8 % of an awaited event.
    """

    _settings: Settings

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


for _name in OPTION_NAMES:
    _about = f"The value in force of the option `{_name}`."
    setattr(InForce, _name, property(operator.attrgetter(f"_settings.{_name}"), doc=_about))


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a TypeError for the first name in `given` that is not in `known`."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
            raise TypeError(f"{name!r} is not an option: {hint}")
