"""What a call knows from where it is made, and the two event classes."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import gc
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import structlog

from eventlog_handler import (
    EventSessionLogger,
    SemiSessionEvent,
    SessionEvent,
    _context,
    session_context,
)
from eventlog_handler._context import bound_session, current, is_teed, tee
from tests.conftest import events_of


def seen() -> tuple[str | None, dict[str, Any]]:
    """Return the session and the fields that a call made here would get."""
    return bound_session("session_id"), dict(current.get()[1])


NOTHING: tuple[None, dict[str, Any]] = (None, {})


def test_nothing_is_bound_at_first() -> None:
    """Outside of any context there is no session and no field."""
    assert seen() == NOTHING


def test_with_binds_session_and_fields_until_its_end() -> None:
    """Inside the block both are bound, behind it neither."""
    with session_context("s", user="ann"):
        assert seen() == ("s", {"user": "ann"})
    assert seen() == NOTHING


def test_exception_ends_the_binding() -> None:
    """A block that raises leaves nothing bound, and its exception passes."""
    with pytest.raises(KeyError), session_context("s"):
        raise KeyError("x")
    assert seen() == NOTHING


def test_with_gives_the_context_itself() -> None:
    """`as` names the object that was made."""
    context = session_context("s")
    with context as found:
        assert found is context


@pytest.mark.parametrize(("given", "expected"), [(7, "7"), (None, "None"), (("a", 1), "('a', 1)")])
def test_any_session_id_is_taken_as_its_text(given: Any, expected: str) -> None:
    """A number or UUID can be bound as it is."""
    with session_context(given):
        assert bound_session("session_id") == expected


def test_field_may_be_called_session_id() -> None:
    """The session itself is positional only, so no field's name is taken."""
    with session_context("s", session_id="mine"):
        assert seen() == ("s", {"session_id": "mine"})


def test_innermost_session_wins_and_fields_add_up() -> None:
    """A nested context hides the outer session, and adds its fields to the outer ones."""
    with session_context("outer", a=1, b=1):
        with session_context("inner", b=2, c=2):
            assert seen() == ("inner", {"a": 1, "b": 2, "c": 2})
        assert seen() == ("outer", {"a": 1, "b": 1})


def test_one_context_can_be_nested_in_itself() -> None:
    """The same object can be entered again inside, and is left as often."""
    context = session_context("s")
    with context:
        with context, session_context("other"):
            assert bound_session("session_id") == "other"
        assert bound_session("session_id") == "s"
    assert seen() == NOTHING


@pytest.mark.anyio
async def test_async_with_binds_until_its_end() -> None:
    """`async with` does what `with` does."""
    context = session_context("s", user="ann")
    async with context as found:
        assert found is context
        assert seen() == ("s", {"user": "ann"})
    assert seen() == NOTHING


def test_decorated_function_is_bound_during_each_call() -> None:
    """Each call of a decorated function is bound, and nothing around it."""

    @session_context("s", user="ann")
    def answer(number: int, *, sign: int) -> Any:
        return number * sign, seen()

    assert answer(2, sign=-1) == (-2, ("s", {"user": "ann"}))
    assert seen() == NOTHING


def test_decorated_function_keeps_its_name() -> None:
    """A decorated function introduces itself as the one that was written."""

    @session_context("s")
    def answer() -> None:
        """Say so."""

    assert (answer.__name__, answer.__doc__) == ("answer", "Say so.")


def test_decorated_function_may_call_itself() -> None:
    """Calls inside calls leave the binding as they found it."""

    @session_context("s")
    def down(number: int) -> list[str | None]:
        return [bound_session("session_id"), *(down(number - 1) if number else [])]

    assert down(2) == ["s", "s", "s"]
    assert seen() == NOTHING


@pytest.mark.anyio
async def test_decorated_coroutine_function_is_bound_while_it_runs() -> None:
    """A decorated coroutine function is bound across its awaits."""

    @session_context("s", user="ann")
    async def answer(number: int, *, sign: int) -> Any:
        await anyio.lowlevel.checkpoint()
        return number * sign, seen()

    assert await answer(2, sign=-1) == (-2, ("s", {"user": "ann"}))
    assert seen() == NOTHING


@pytest.mark.anyio
async def test_calls_of_one_decorated_function_do_not_mix() -> None:
    """Two tasks in the same decorated function each leave their own binding."""
    found = []

    @session_context("s")
    async def answer(first: anyio.Event, then: anyio.Event) -> None:
        first.set()
        await then.wait()
        found.append(bound_session("session_id"))

    one, two = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(answer, one, two)
        tasks.start_soon(answer, two, one)
    assert found == ["s", "s"]
    assert seen() == NOTHING


def numbers() -> Iterator[int]:
    """Yield one number."""
    yield 1


async def async_numbers() -> AsyncIterator[int]:
    """Yield one number."""
    yield 1


@pytest.mark.parametrize("function", [numbers, async_numbers])
def test_generator_is_refused(function: Callable[..., Any]) -> None:
    """A generator's binding would leak to its consumer; the message says what to write instead."""
    with pytest.raises(TypeError) as caught:
        session_context("s")(function)
    assert str(caught.value) == (
        f"session_context cannot decorate the generator {function.__qualname__}: its binding "
        "would leak to the consumer; use `with session_context(…)` inside it"
    )


def test_partial_of_a_generator_is_refused_too() -> None:
    """A generator without a name of its own gets the same message."""
    with pytest.raises(TypeError, match="session_context cannot decorate the generator"):
        session_context("s")(functools.partial(numbers))


@pytest.mark.anyio
async def test_tasks_inherit_the_binding() -> None:
    """A task that is started inside has the session."""
    found = []

    async def child() -> None:
        found.append(seen())

    async with anyio.create_task_group() as tasks:
        with session_context("s", user="ann"):
            tasks.start_soon(child)
    assert found == [("s", {"user": "ann"})]


@pytest.mark.anyio
async def test_tasks_do_not_see_what_another_binds() -> None:
    """Two tasks that bind different sessions at the same time keep them apart."""
    found = {}

    async def child(name: str, mine: anyio.Event, other: anyio.Event) -> None:
        with session_context(name):
            mine.set()
            await other.wait()
            found[name] = bound_session("session_id")

    one, two = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(child, "a", one, two)
        tasks.start_soon(child, "b", two, one)
    assert found == {"a": "a", "b": "b"}


@pytest.mark.anyio
async def test_worker_threads_inherit_the_binding() -> None:
    """What is sent to a thread with `to_thread` has the session."""
    with session_context("s", user="ann"):
        assert await anyio.to_thread.run_sync(seen) == ("s", {"user": "ann"})


def test_plain_threads_do_not_inherit() -> None:
    """A `threading.Thread` starts without a session."""
    found = []
    with session_context("s"):
        thread = threading.Thread(target=lambda: found.append(seen()))
        thread.start()
        thread.join()
    assert found == [NOTHING]


def test_context_left_elsewhere_than_entered_is_forgotten() -> None:
    """Some frameworks leave it in another context than they entered it in: that raises nothing."""
    context, elsewhere = session_context("s"), contextvars.copy_context()
    elsewhere.run(context.__enter__)
    with session_context("mine"):
        context.__exit__(None, None, None)
        assert bound_session("session_id") == "mine"
    assert elsewhere.run(bound_session, "session_id") == "s"


def test_session_of_structlog_is_the_second_choice() -> None:
    """What is bound with structlog's contextvars counts where there is no session_context."""
    structlog.contextvars.bind_contextvars(conversation=7)
    assert bound_session("conversation") == "7"
    assert bound_session("session_id") is None
    with session_context("s"):
        assert bound_session("conversation") == "s"


@pytest.mark.anyio
async def test_gateway_goes_by_the_context(base: Path) -> None:
    """An event without a session is written to the bound one, with its fields."""
    async with EventSessionLogger(base) as gateway:
        with session_context("s", user="ann", type="never"):
            await gateway({"type": "a"})
            await gateway({"type": "b", "session_id": "own", "user": "bob"})
    assert events_of(base / "s") == [{"type": "a", "user": "ann", "session_id": "s"}]
    assert events_of(base / "own") == [{"type": "b", "session_id": "own", "user": "bob"}]


def called(base: Path, look: Callable[[], Any], looks: int = 2) -> Any:
    """Stand for a structlog call whose event the processor took, and that then goes on."""
    tee(sys._getframe(), base, looks)
    return look()


def test_record_out_of_a_teed_call_is_known() -> None:
    """Further down in the call, its event is known to be written."""
    assert called(Path("/a"), lambda: is_teed(Path("/a"))) is True


def test_each_handler_of_the_call_is_told() -> None:
    """Two handlers with the same base both leave the record out."""
    assert called(Path("/a"), lambda: [is_teed(Path("/a")) for _ in range(2)]) == [True, True]


def test_teed_call_counts_only_for_its_base() -> None:
    """A handler that writes elsewhere writes the record."""
    assert called(Path("/a"), lambda: is_teed(Path("/b"))) is False


def test_nothing_is_teed_at_first() -> None:
    """Without a processor's call no record is left out."""
    assert is_teed(Path("/a")) is False


def test_call_that_is_over_is_not_teed() -> None:
    """A record that comes later is written, though the call's own never came."""
    called(Path("/a"), lambda: None)
    assert [is_teed(Path("/a")) for _ in range(2)] == [False, False]


def test_teed_call_is_one_of_its_thread() -> None:
    """A record that another thread makes meanwhile is written."""

    def look() -> list[bool]:
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(is_teed(Path("/a"))))
        thread.start()
        thread.join()
        return [*found, is_teed(Path("/a"))]

    assert called(Path("/a"), look) == [False, True]


@pytest.mark.parametrize("looks", [1, 2])
def test_the_last_look_lets_go_of_the_call(looks: int) -> None:
    """The variables of a call live until every handler has looked, or the next record comes."""

    class Thing:
        pass

    def call() -> weakref.ref[Thing]:
        thing = Thing()
        tee(sys._getframe(), Path("/a"), looks)
        assert is_teed(Path("/a"))
        return weakref.ref(thing)

    thing = call()
    if looks == 2:
        assert not is_teed(Path("/a"))
    gc.collect()
    assert thing() is None


def test_session_event_needs_type_and_session() -> None:
    """The two are positional; the rest is None, and its data a dict of its own."""
    first, second = SessionEvent("user_message", "s"), SessionEvent("user_message", "s")
    assert dataclasses.asdict(first) == {
        "type": "user_message",
        "session_id": "s",
        "role": None,
        "parent_session_id": None,
        "user_session_id": None,
        "data": {},
    }
    assert first == second
    assert first.data is not second.data


def test_session_event_without_session_is_refused() -> None:
    """What has no session is a SemiSessionEvent."""
    with pytest.raises(TypeError, match="session_id"):
        SessionEvent("user_message")  # type: ignore[call-arg]


def test_semi_session_event_needs_a_type_alone() -> None:
    """Its session may be missing; the other fields are a SessionEvent's."""
    event = SemiSessionEvent("heartbeat")
    assert dataclasses.asdict(event) == {
        **dataclasses.asdict(SessionEvent("heartbeat", "s")),
        "session_id": None,
    }


@pytest.mark.anyio
async def test_event_classes_are_written_with_all_their_fields(base: Path) -> None:
    """A SessionEvent goes to its session, a SemiSessionEvent to the bound one."""
    async with EventSessionLogger(base) as gateway:
        await gateway(SessionEvent("a", "s", "user", "p", "u", {"text": "hi"}))
        with session_context("s"):
            await gateway(SemiSessionEvent("b"))
    rest = {"parent_session_id": "p", "user_session_id": "u", "data": {"text": "hi"}}
    none = {"role": None, "parent_session_id": None, "user_session_id": None, "data": {}}
    assert events_of(base / "s") == [
        {"type": "a", "session_id": "s", "role": "user", **rest},
        {"type": "b", "session_id": "s", **none},
    ]


def test_a_logger_that_is_silenced_while_somebody_asks_stays_silenced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An answer that was right a moment ago is not remembered: a driver's records would come in."""

    class Interrupted(_context.Silenced):
        def __setitem__(self, name: str, found: bool) -> None:
            _context.silence(["driver"])
            super().__setitem__(name, found)

    monkeypatch.setattr(_context, "_driver_loggers", ())
    monkeypatch.setattr(_context, "silenced", Interrupted())
    assert not _context.silenced["driver.pool"]
    assert _context.silenced["driver.pool"]
