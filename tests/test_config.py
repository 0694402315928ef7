"""Every option: default, environment variable, check; and the functions that make a gateway."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eventlog_handler import (
    EventSessionLogger,
    create_backward_compatible,
    create_from_environment,
    create_logging_only,
    create_session_logger,
    create_with_callback,
    create_with_transport,
    migrate_from_session_logger,
)
from eventlog_handler._config import OPTION_NAMES, resolve
from eventlog_handler.testing import RecordingTransport
from tests.conftest import events_of


async def callback(event: Any) -> None:
    """Take an event."""


class Collector(list[Any]):
    """A callback that is false while it is empty, as any list is."""

    async def __call__(self, event: Any) -> None:
        self.append(event)


DEFAULTS = {
    "log_base_dir": Path("logs/sessions").absolute(),
    "downstream_callback": None,
    "downstream_transport": None,
    "include_system_prompt": True,
    "log_format": "jsonl",
    "file_naming_pattern": "%Y%m%d_%H%M%S",
    "error_handler": None,
    "max_retry_attempts": 3,
    "retry_delay_seconds": 1.0,
    "enable_local_logging": True,
    "session_directory_pattern": "{session_id}",
    "unknown_session_pattern": "unknown_{uuid}",
    "batch_bytes": 1_000_000,
    "batch_events": 500,
    "batch_seconds": 0.0,
    "breaker_failures": 5,
    "breaker_reset_seconds": 30.0,
    "directory_mode": 0o700,
    "downstream_wait_seconds": 1.0,
    "file_mode": 0o600,
    "formatter": None,
    "max_file_bytes": None,
    "max_open_files": 240,
    "max_pending_events": 10_000,
    "processors": (),
    "retry_max_delay_seconds": 60.0,
    "send_timeout_seconds": 30.0,
    "session_id_field": "session_id",
    "shutdown_timeout_seconds": 5.0,
}
VARIABLES = [
    ("AGENT_LOG_DIR", "log_base_dir", "logs/other", Path("logs/other").absolute()),
    ("AGENT_LOG_FORMAT", "log_format", "json", "json"),
    ("AGENT_LOG_INCLUDE_PROMPT", "include_system_prompt", "false", False),
    ("AGENT_LOG_MAX_RETRIES", "max_retry_attempts", "7", 7),
    ("AGENT_LOG_RETRY_DELAY", "retry_delay_seconds", "0.5", 0.5),
    ("AGENT_LOG_FILE_PATTERN", "file_naming_pattern", "%Y", "%Y"),
    ("AGENT_LOG_ENABLE_LOCAL", "enable_local_logging", "false", False),
    ("AGENT_LOG_SESSION_PATTERN", "session_directory_pattern", "s-{session_id}", "s-{session_id}"),
    ("AGENT_LOG_TRANSPORT", "downstream_transport", "redis://localhost", "redis://localhost"),
    ("AGENT_LOG_UNKNOWN_PATTERN", "unknown_session_pattern", "none", "none"),
]


def refusal(given: dict[str, Any], environment: dict[str, str] | None = None) -> str:
    """Return the message of the ValueError that these options are refused with."""
    with pytest.raises(ValueError, match=r"^[A-Za-z_]+=") as caught:
        resolve(given, environment or {})
    return str(caught.value)


def test_defaults() -> None:
    """Without argument and variable each option has its documented default."""
    settings = resolve({}, {})
    assert {name: getattr(settings, name) for name in OPTION_NAMES} == DEFAULTS


def test_constructor_shows_the_defaults_that_count() -> None:
    """What the constructor's signature says is what an option is without argument."""
    shown = {
        name: parameter.default
        for name, parameter in inspect.signature(EventSessionLogger).parameters.items()
        if name not in ("kwargs", "log_base_dir")
    }
    assert shown == {name: DEFAULTS[name] for name in list(DEFAULTS)[1:12]}


@pytest.mark.parametrize(("variable", "option", "text", "value"), VARIABLES)
def test_variable_beats_the_default(variable: str, option: str, text: str, value: Any) -> None:
    """An `AGENT_LOG_*` variable sets its option, in the option's own type."""
    found = getattr(resolve({}, {variable: text}), option)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("variable", "option", "text", "value"), VARIABLES)
def test_argument_beats_the_variable(variable: str, option: str, text: str, value: Any) -> None:
    """An argument counts even where it is the default's value."""
    default = DEFAULTS[option]
    assert getattr(resolve({option: default}, {variable: text}), option) == default


@pytest.mark.parametrize(("variable", "option", "text", "value"), VARIABLES)
def test_gateway_reads_the_process_environment(
    variable: str, option: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway without arguments goes by the variables of its process."""
    monkeypatch.setenv(variable, text)
    assert getattr(EventSessionLogger(), option) == value


def test_default_given_on_purpose_beats_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constructor knows a default that was written from one that was not."""
    monkeypatch.setenv("AGENT_LOG_MAX_RETRIES", "9")
    assert EventSessionLogger(max_retry_attempts=3).max_retry_attempts == 3


def test_positional_arguments_are_given_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first arguments may be written without their names."""
    monkeypatch.setenv("AGENT_LOG_INCLUDE_PROMPT", "true")
    gateway = EventSessionLogger(base, callback, None, False)
    assert (gateway.log_base_dir, gateway.downstream_callback) == (base, callback)
    assert gateway.include_system_prompt is False


def test_base_of_none_leaves_it_to_the_variable() -> None:
    """`log_base_dir=None` is as good as not given."""
    found = resolve({"log_base_dir": None}, {"AGENT_LOG_DIR": "/nowhere/x"})
    assert found.log_base_dir == Path("/nowhere/x")


def test_base_is_made_absolute_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later change of directory does not move the sessions."""
    monkeypatch.chdir(tmp_path)
    assert resolve({"log_base_dir": "a/../b"}, {}).log_base_dir == tmp_path / "b"


def test_base_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve({}, {"AGENT_LOG_DIR": "~/logs"}).log_base_dir == tmp_path / "logs"


@pytest.mark.parametrize("text", ["true", "TRUE", " yes ", "on", "1"])
def test_words_for_true(text: str) -> None:
    """The usual words for true are taken in any case."""
    assert resolve({}, {"AGENT_LOG_INCLUDE_PROMPT": text}).include_system_prompt is True


@pytest.mark.parametrize("text", ["false", "False", " no ", "off", "0"])
def test_words_for_false(text: str) -> None:
    """The usual words for false are taken in any case."""
    assert resolve({}, {"AGENT_LOG_INCLUDE_PROMPT": text}).include_system_prompt is False


@pytest.mark.parametrize("value", ["maybe", "", 2, None])
def test_truth_that_is_none_is_refused(value: Any) -> None:
    """A misspelled word is not taken for false."""
    assert refusal({"include_system_prompt": value}) == (
        f"include_system_prompt={value!r} is neither true nor false; write 'true' or 'false'"
    )


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "AGENT_LOG_ENABLE_LOCAL",
            "maybe",
            "is neither true nor false; write 'true' or 'false'",
        ),
        ("AGENT_LOG_FORMAT", "xml", "does not exist; write one of 'jsonl', 'json', 'custom'"),
        ("AGENT_LOG_MAX_RETRIES", "three", "is not a whole number"),
        ("AGENT_LOG_MAX_RETRIES", "1.5", "is not a whole number"),
        ("AGENT_LOG_MAX_RETRIES", "-1", "is out of range: write a whole number from 0 on"),
        ("AGENT_LOG_RETRY_DELAY", "soon", "is not a number of seconds"),
        ("AGENT_LOG_RETRY_DELAY", "inf", "is out of range: write a number of seconds from 0 on"),
        ("AGENT_LOG_RETRY_DELAY", "nan", "is not a number of seconds"),
        ("AGENT_LOG_DIR", "", "must be a path that is not empty"),
        ("AGENT_LOG_UNKNOWN_PATTERN", "", "is empty; write 'unknown_{uuid}'"),
        (
            "AGENT_LOG_FILE_PATTERN",
            "a/b",
            "must be a file's name: not empty, no '/', no NUL",
        ),
        (
            "AGENT_LOG_SESSION_PATTERN",
            "all",
            "lacks {session_id} in its last level: sessions would share a directory",
        ),
    ],
)
def test_bad_variable_is_named_with_its_value(variable: str, value: str, message: str) -> None:
    """The message has the variable, not the option, for that is where to look."""
    assert refusal({}, {variable: value}) == f"{variable}={value!r} {message}"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_retry_attempts", True, "is not a whole number"),
        ("max_retry_attempts", None, "is not a whole number"),
        ("max_retry_attempts", 1.5, "is not a whole number"),
        ("max_retry_attempts", float("inf"), "is not a whole number"),
        ("max_open_files", 0, "is out of range: write a whole number from 1 on"),
        ("max_pending_events", 0, "is out of range: write a whole number from 1 on"),
        ("breaker_failures", 0, "is out of range: write a whole number from 1 on"),
        ("breaker_reset_seconds", 0, "is out of range: write a number of seconds from 0.001 on"),
        ("send_timeout_seconds", 0, "is out of range: write a number of seconds from 0.001 on"),
        ("retry_max_delay_seconds", -1, "is out of range: write a number of seconds from 0 on"),
        ("downstream_wait_seconds", float("nan"), "is not a number of seconds"),
        ("shutdown_timeout_seconds", "nan", "is not a number of seconds"),
        ("shutdown_timeout_seconds", [], "is not a number of seconds"),
        ("log_format", "csv", "does not exist; write one of 'jsonl', 'json', 'custom'"),
        ("log_format", [], "does not exist; write one of 'jsonl', 'json', 'custom'"),
        ("log_base_dir", "", "must be a path that is not empty"),
        ("log_base_dir", 7, "must be a path that is not empty"),
        ("session_id_field", "", "must be a str that is not empty"),
        ("session_id_field", 7, "must be a str that is not empty"),
        ("file_mode", "600", "must be permission bits from 0 to 0o777, such as 0o600"),
        ("file_mode", 0o1000, "must be permission bits from 0 to 0o777, such as 0o600"),
        ("directory_mode", -1, "must be permission bits from 0 to 0o777, such as 0o600"),
        ("directory_mode", True, "must be permission bits from 0 to 0o777, such as 0o600"),
    ],
)
def test_bad_value_is_refused(option: str, value: Any, message: str) -> None:
    """The message has the option, the value, and what to write."""
    assert refusal({option: value}) == f"{option}={value!r} {message}"


def test_number_past_all_floats_is_taken() -> None:
    """A whole number has no upper end, not even that of floats."""
    assert resolve({"max_open_files": 10**400}, {}).max_open_files == 10**400


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("max_retry_attempts", "7", 7),
        ("max_retry_attempts", 7.0, 7),
        ("retry_delay_seconds", 2, 2.0),
        ("breaker_reset_seconds", 0.001, 0.001),
        ("file_mode", 0o777, 0o777),
        ("directory_mode", 0, 0),
        ("session_id_field", "conversation", "conversation"),
        ("processors", [callback], (callback,)),
        ("error_handler", callback, callback),
        ("formatter", str, str),
    ],
)
def test_good_value_is_taken(option: str, value: Any, expected: Any) -> None:
    """A value of another type that means the same is converted."""
    found = getattr(resolve({option: value}, {}), option)
    assert found == expected
    assert type(found) is type(expected)


def test_processors_of_an_iterator_are_kept() -> None:
    """An iterable that can be read once is read once."""
    assert resolve({"processors": iter([callback])}, {}).processors == (callback,)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("downstream_callback", 7, "downstream_callback must be callable or None, not int"),
        ("error_handler", "print", "error_handler must be callable or None, not str"),
        ("formatter", 7, "formatter must be callable or None, not int"),
        ("processors", "ab", "processors must be a list of callables, not str"),
        ("processors", callback, "processors must be a list of callables, not function"),
        ("processors", [7], "processors has 7, which cannot be called with an event's fields"),
        ("file_naming_pattern", 7, "file_naming_pattern must be a str, not int"),
        (
            "session_directory_pattern",
            None,
            "session_directory_pattern must be a str, not NoneType",
        ),
        ("unknown_session_pattern", b"", "unknown_session_pattern must be a str, not bytes"),
    ],
)
def test_value_of_a_wrong_kind_is_a_type_error(option: str, value: Any, message: str) -> None:
    """What can never be right has a TypeError that names the option and the type."""
    with pytest.raises(TypeError) as caught:
        resolve({option: value}, {})
    assert str(caught.value) == message


def test_misspelled_option_is_a_type_error_with_the_nearest() -> None:
    """The message says which option was meant."""
    with pytest.raises(TypeError) as caught:
        EventSessionLogger(max_retries=3)
    assert str(caught.value) == "'max_retries' is not an option: did you mean 'max_retry_attempts'?"


def test_option_that_is_like_none_is_told_all_there_are() -> None:
    """Where no option is near, the message lists them."""
    with pytest.raises(TypeError) as caught:
        EventSessionLogger(qqq=3)
    assert str(caught.value) == "'qqq' is not an option: there are " + ", ".join(sorted(DEFAULTS))


def test_base_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """A file in the way is found at once, and named."""
    there = tmp_path / "file"
    there.write_text("")
    base = there / "sessions"
    assert refusal({"log_base_dir": base}) == (
        f"log_base_dir={str(base)!r} cannot be a directory: {there} is not one"
    )


def test_variable_with_a_file_is_named(tmp_path: Path) -> None:
    """Where the variable has set it, the variable is what the message names."""
    there = tmp_path / "file"
    there.write_text("")
    assert refusal({}, {"AGENT_LOG_DIR": str(there)}) == (
        f"AGENT_LOG_DIR={str(there)!r} cannot be a directory: {there} is not one"
    )


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    """A directory that nothing can be written in, not even by root."""
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        return tmp_path
    found = Path("/proc/self")
    if os.access(found, os.W_OK):
        pytest.skip("root may write everywhere here")
    return found


def test_base_without_permission_is_refused(locked: Path) -> None:
    """A directory that cannot be written is found at once, and named."""
    base = locked / "a" / "b"
    assert refusal({"log_base_dir": base}) == (
        f"log_base_dir={str(base)!r} cannot be written: no permission in {locked}"
    )


def test_base_need_not_be_writable_where_no_files_are_written(locked: Path) -> None:
    """Without local logging the base directory does not matter."""
    settings = resolve({"log_base_dir": locked / "a", "enable_local_logging": False}, {})
    assert settings.log_base_dir == locked / "a"


def test_base_is_not_made_by_the_check(base: Path) -> None:
    """Directories are made with the first event."""
    EventSessionLogger(base)
    assert not base.exists()


@pytest.mark.parametrize("text", ["a\0b", "a\ud800"])
def test_base_that_no_file_system_takes_is_refused(text: str, tmp_path: Path) -> None:
    """A path that cannot be a path is found at once, not with the first event."""
    base = f"{tmp_path}/{text}"
    assert refusal({"log_base_dir": base}).startswith(f"log_base_dir={base!r} ")


@pytest.mark.parametrize(
    ("given", "environment", "name"),
    [
        ({"log_format": "custom"}, {}, "log_format"),
        ({}, {"AGENT_LOG_FORMAT": "custom"}, "AGENT_LOG_FORMAT"),
    ],
)
def test_custom_format_needs_a_formatter(
    given: dict[str, Any], environment: dict[str, str], name: str
) -> None:
    """The message says where the format comes from and what is missing."""
    assert refusal(given, environment) == (
        f"{name}='custom' needs formatter=…, a callable or a logging.Formatter"
    )


@pytest.mark.parametrize("formatter", [logging.Formatter("%(message)s"), str])
def test_formatter_is_a_callable_or_a_logging_formatter(formatter: Any) -> None:
    """Both kinds are taken as they are."""
    settings = resolve({"log_format": "custom", "formatter": formatter}, {})
    assert settings.formatter is formatter


@pytest.mark.parametrize(
    ("log_format", "name"), [("jsonl", "x.jsonl"), ("json", "x.json"), ("custom", "x.log")]
)
def test_format_decides_the_suffix(log_format: str, name: str, base: Path) -> None:
    """Each format's files end in a suffix of their own."""
    gateway = EventSessionLogger(
        base, log_format=log_format, formatter=str, file_naming_pattern="x"
    )
    assert gateway.get_log_file_path("s") == base / "s" / name


def test_unknown_attribute_is_refused(base: Path) -> None:
    """Only options can be read as attributes."""
    with pytest.raises(AttributeError, match="'EventSessionLogger' object has no attribute 'qqq'"):
        EventSessionLogger(base).qqq  # noqa: B018


def test_environment_can_be_read_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`configure_from_env` takes what has changed, and leaves what was given."""
    gateway = EventSessionLogger(base, max_retry_attempts=1)
    monkeypatch.setenv("AGENT_LOG_MAX_RETRIES", "9")
    monkeypatch.setenv("AGENT_LOG_RETRY_DELAY", "9")
    gateway.configure_from_env()
    assert (gateway.max_retry_attempts, gateway.retry_delay_seconds) == (1, 9.0)


def test_bad_variable_changes_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`configure_from_env` takes all variables or none."""
    gateway = EventSessionLogger(base)
    monkeypatch.setenv("AGENT_LOG_MAX_RETRIES", "9")
    monkeypatch.setenv("AGENT_LOG_RETRY_DELAY", "soon")
    with pytest.raises(ValueError, match=r"^AGENT_LOG_RETRY_DELAY='soon' is not a number"):
        gateway.configure_from_env()
    assert gateway.max_retry_attempts == 3


def test_session_logger_takes_base_callback_and_options(base: Path) -> None:
    """`create_session_logger` passes on what it is given."""
    gateway = create_session_logger(str(base), callback, max_retry_attempts=7)
    assert type(gateway) is EventSessionLogger
    assert (gateway.log_base_dir, gateway.downstream_callback) == (base, callback)
    assert gateway.max_retry_attempts == 7


@pytest.mark.parametrize("make", [create_session_logger, create_logging_only])
def test_base_that_is_not_given_comes_from_the_environment(
    make: Callable[..., EventSessionLogger], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A factory without a base directory goes by AGENT_LOG_DIR."""
    monkeypatch.setenv("AGENT_LOG_DIR", str(base))
    assert make().log_base_dir == base


def test_logging_only_has_no_downstream(base: Path) -> None:
    """`create_logging_only` forwards nothing."""
    gateway = create_logging_only(base, log_format="json")
    assert (gateway.downstream_callback, gateway.downstream_transport) == (None, None)
    assert (gateway.log_base_dir, gateway.log_format) == (base, "json")


@pytest.mark.parametrize("option", ["downstream_callback", "downstream_transport"])
def test_logging_only_refuses_a_downstream(option: str, base: Path) -> None:
    """A downstream for the gateway that has none is a mistake, and named."""
    with pytest.raises(TypeError, match=option):
        create_logging_only(base, **{option: callback})


def test_with_callback_has_the_callback(base: Path) -> None:
    """`create_with_callback` takes the callback first."""
    gateway = create_with_callback(callback, base, max_retry_attempts=7)
    assert (gateway.downstream_callback, gateway.log_base_dir) == (callback, base)
    assert gateway.max_retry_attempts == 7


@pytest.mark.anyio
async def test_callback_that_is_false_is_called(base: Path) -> None:
    """A callback is one even while its `bool()` is false."""
    collector = Collector()
    async with create_with_callback(collector, base) as gateway:
        await gateway({"session_id": "s"})
    assert collector == [{"session_id": "s"}]


@pytest.mark.anyio
async def test_false_callback_of_the_constructor_is_called(base: Path) -> None:
    """The same holds where the constructor gets it."""
    collector = Collector()
    async with EventSessionLogger(base, collector) as gateway:
        await gateway({"session_id": "s"})
    assert collector == [{"session_id": "s"}]


@pytest.mark.anyio
async def test_with_transport_sends_to_the_transport(base: Path) -> None:
    """`create_with_transport` takes the transport first."""
    transport = RecordingTransport()
    async with create_with_transport(transport, base, max_retry_attempts=7) as gateway:
        assert (gateway.downstream_transport, gateway.log_base_dir) == (transport, base)
        assert gateway.max_retry_attempts == 7
        await gateway({"session_id": "s"})
    assert transport.events == events_of(base) == [{"session_id": "s"}]


def test_a_transport_that_is_no_url_is_not_shown(base: Path) -> None:
    """A text that is no URL is refused, without showing what may be half a password."""
    with pytest.raises(ValueError, match=r"^AGENT_LOG_TRANSPORT wants URLs") as caught:
        resolve({}, {"AGENT_LOG_TRANSPORT": "redis://:pass word@localhost"})
    assert "word" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^downstream_transport wants URLs"):
        create_with_transport("nonsense", base)  # type: ignore[arg-type]


def test_settings_do_not_show_a_password() -> None:
    """Options may hold a URL with a password, so their repr has none of them."""
    assert "s3cret" not in repr(resolve({"downstream_transport": "redis://:s3cret@h"}, {}))


@pytest.mark.anyio
async def test_a_variable_may_name_the_transport_later(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`configure_from_env` goes by a transport's URL, and by its absence."""
    async with EventSessionLogger(base) as gateway:
        monkeypatch.setenv("AGENT_LOG_TRANSPORT", "redis://localhost/3 redis://localhost/4")
        gateway.configure_from_env()
        shown = "redis://localhost:6379/{}?stream=eventlog"
        assert set(gateway.stats().transports) == {shown.format(3), shown.format(4)}
        monkeypatch.delenv("AGENT_LOG_TRANSPORT")
        gateway.configure_from_env()
        assert gateway.stats().transports == {}


@pytest.mark.parametrize("given", [7, [7]])
def test_with_transport_needs_a_transport(given: Any, base: Path) -> None:
    """What is no transport is a TypeError when the gateway is made."""
    with pytest.raises(TypeError, match="transport"):
        create_with_transport(given, base)


def test_from_environment_takes_variables_and_overrides(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`create_from_environment` reads all variables, and its arguments beat them."""
    for variable, _, text, _ in VARIABLES:
        monkeypatch.setenv(variable, text)
    gateway = create_from_environment(log_base_dir=base)
    found = {option: getattr(gateway, option) for _, option, _, _ in VARIABLES}
    assert found == {option: value for _, option, _, value in VARIABLES} | {"log_base_dir": base}


@pytest.mark.parametrize("kind", [str, Path])
def test_migration_goes_on_in_the_old_base(kind: Callable[[Any], Any], base: Path) -> None:
    """The old logger's base and its choice about prompts are taken over."""
    old = SimpleNamespace(
        log_file_path=kind(base / "s" / "20260101_000000.jsonl"), include_system_prompt=False
    )
    gateway = migrate_from_session_logger(old, callback)
    assert (gateway.log_base_dir, gateway.include_system_prompt) == (base, False)
    assert gateway.downstream_callback is callback


@pytest.mark.parametrize(
    ("old", "missing"),
    [
        (SimpleNamespace(), "log_file_path and include_system_prompt"),
        (SimpleNamespace(log_file_path="a/b/c"), "include_system_prompt"),
        (SimpleNamespace(include_system_prompt=True), "log_file_path"),
    ],
)
def test_migration_from_something_else_is_refused(old: Any, missing: str) -> None:
    """The message says what is missing and what to use instead."""
    with pytest.raises(TypeError) as caught:
        migrate_from_session_logger(old)
    assert str(caught.value) == (
        f"migrate_from_session_logger got a SimpleNamespace without {missing}: pass the old "
        "SessionLogger, or use create_session_logger"
    )


def test_backward_compatible_ignores_the_environment(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Format, file names, prompts and local logging are the old ones, whatever variables say."""
    for variable, _, text, _ in VARIABLES:
        monkeypatch.setenv(variable, text)
    gateway = create_backward_compatible(log_base_dir=base)
    assert (gateway.log_format, gateway.file_naming_pattern) == ("jsonl", "%Y%m%d_%H%M%S")
    assert (gateway.include_system_prompt, gateway.enable_local_logging) == (True, True)
    assert gateway.max_retry_attempts == 7


@pytest.mark.parametrize(
    "option",
    ["log_format", "file_naming_pattern", "include_system_prompt", "enable_local_logging"],
)
def test_backward_compatible_refuses_what_it_fixes(option: str) -> None:
    """The four fixed options cannot be given."""
    with pytest.raises(TypeError, match=option):
        create_backward_compatible(**{option: DEFAULTS[option]})
