"""What a call knows from where it is made: its session, and whether it is our own doing."""

from __future__ import annotations

import contextvars
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import structlog

F = TypeVar("F", bound=Callable[..., Any])


Known = tuple[str | None, Mapping[str, Any], bool]
current: contextvars.ContextVar[Known] = contextvars.ContextVar(
    "eventlog_handler", default=(None, {}, False)
)
"""Session and fields of `session_context`, and whether a transport or callback runs here for us.

One variable, as each that is not set costs a call as much as two functions.
"""


def deliver() -> None:
    """From now on this context runs for us: what it logs must not come back in as events."""
    session_id, fields, _ = current.get()
    current.set((session_id, fields, True))


def delivering() -> bool:
    """Return whether a transport or callback runs here for us."""
    return current.get()[2]


_driver_loggers: tuple[str, ...] = ("eventlog_handler.",)


def silence(names: Iterable[str]) -> None:
    """Never take up again what these loggers log: they speak of deliveries.

    Args:
        names: Of loggers that drivers use on threads of their own, where `deliver` is not called.
    """
    global _driver_loggers, silenced
    _driver_loggers = tuple({*_driver_loggers, *(f"{name}." for name in names)})
    # A new one, last: whoever is asking has the old one, and may put an old answer there.
    silenced = Silenced()


class Silenced(dict[str, bool]):
    """By name: whether a logger, or one above it, was silenced; found out at the first question."""

    def __missing__(self, name: str) -> bool:
        """Find it out."""
        if len(self) >= 1000:
            # Names that are made for each call must not fill the memory.
            self.clear()
        found = self[name] = f"{name}.".startswith(_driver_loggers)
        return found


silenced = Silenced()


teed: dict[int, list[Any]] = {}
"""By thread: the structlog call whose event our processor has taken, to which base, and how many
handlers will still ask."""


def tee(frame: FrameType, base: Path, looks: int) -> None:
    """Remember that the event of the structlog call in `frame` goes to `base` already.

    Args:
        frame: Runs until the record is emitted. It keeps its callers' variables alive, so it is let
            go of as soon as all handlers have looked.
        base: A gateway's base directory.
        looks: How many handlers will ask.
    """
    teed[threading.get_ident()] = [frame, base, looks]


def is_teed(base: Path) -> bool:
    """Return whether this record comes out of a structlog call whose event `base` has."""
    mark = teed.get(threading.get_ident()) if teed else None
    if mark is None:
        return False
    found: FrameType | None = sys._getframe(1)
    while found is not None and found is not mark[0]:
        found = found.f_back
    if found is not None and mark[1] != base:
        return False
    mark[2] -= 1
    # Not found: a later processor or a filter stopped that call's record, and this is another.
    if found is None or mark[2] == 0:
        del teed[threading.get_ident()]
    return found is not None


captures: list[Callable[[bytes], None]] = []
"""While not empty, each gets every event's JSON object, and nothing is written or sent."""


class session_context:  # noqa: N801 - reads as a function, like `contextlib.suppress`
    """Bind a session to everything that is logged inside.

    Use it as `with`, as `async with`, or as a decorator of a function or coroutine function.
    Tasks and `asyncio.to_thread` started inside inherit it; plain threads do not. The innermost
    wins; its fields are added to those of the outer ones.

    Args:
        session_id: The session. Any value; it is taken as `str(session_id)`.
        **fields: Added to each event, unless the event has a field of that name itself.
    """

    def __init__(self, session_id: Any, /, **fields: Any) -> None:
        self._session_id = str(session_id)
        self._fields = fields
        self._tokens: list[contextvars.Token[Known]] = []

    def __enter__(self) -> session_context:
        """Bind; returns itself."""
        _, fields, ours = current.get()
        self._tokens.append(current.set((self._session_id, {**fields, **self._fields}, ours)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Put back what was bound before."""
        try:
            current.reset(self._tokens.pop())
        except ValueError:
            # Another context closes it: an async generator's, which some frameworks run their
            # dependencies in. What was bound went with the context that it was bound in.
            return

    async def __aenter__(self) -> session_context:
        """Bind; returns itself."""
        return self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        """Put back what was bound before."""
        self.__exit__(*exc_info)

    def __call__(self, function: F) -> F:
        """Bind around each call of `function`."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"session_context cannot decorate the generator {_name(function)}: its "
                "binding would leak to the consumer; use `with session_context(…)` inside it"
            )
        called: Any = type(function).__call__
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called):

            @functools.wraps(function)
            async def bound_async(*args: Any, **kwargs: Any) -> Any:
                with session_context(self._session_id, **self._fields):
                    return await function(*args, **kwargs)

            return cast("F", bound_async)

        @functools.wraps(function)
        def bound(*args: Any, **kwargs: Any) -> Any:
            with session_context(self._session_id, **self._fields):
                return function(*args, **kwargs)

        return cast("F", bound)


def _name(function: Any) -> str:
    # A `functools.partial` has no name of its own.
    return getattr(function, "__qualname__", None) or repr(function)


def bound_session(field: str) -> str | None:
    """Return the session of `session_context`, else of structlog's contextvars, else None.

    Args:
        field: The name that structlog's users bind the session under.
    """
    session_id = current.get()[0]
    if session_id is not None:
        return session_id
    found = structlog.contextvars.get_contextvars().get(field)
    return None if found is None else str(found)
