"""The loop of a lane, run in each event loop: steps, sleep, ends; and the callback's own lane."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import orjson
import pytest

from eventlog_handler import _lanes
from eventlog_handler._config import Settings, resolve
from eventlog_handler._downstream import Callback
from eventlog_handler._lanes import CallbackLane, Called, Lane
from eventlog_handler._report import Report
from eventlog_handler.typing import EncodedEvent, TransportStats, Written

QUICK: dict[str, Any] = {
    "retry_delay_seconds": 0.001,
    "breaker_reset_seconds": 0.001,
    "enable_local_logging": False,
}


class Heard(list[tuple[Exception, str]]):
    """An error handler that remembers."""

    def __call__(self, error: Exception, context: str) -> None:
        self.append((error, context))


@pytest.fixture
def heard() -> Heard:
    """What the error handler hears."""
    return Heard()


def settings(**options: Any) -> Settings:
    """Return settings with hardly any pauses."""
    return resolve({**QUICK, **options}, {})


class Diary(Lane):
    """A lane that has a list of answers to give, or to raise, and writes down what happens."""

    def __init__(self, report: Report, *answers: float | BaseException) -> None:
        super().__init__("there", report)
        self.answers = list(answers)
        self.done: list[object] = []
        self.in_step: Callable[[], object] = lambda: None
        self.waits = True

    async def step(self) -> float:
        """Give the next answer; without one there is nothing to do for ever."""
        self.done.append("step")
        self.in_step()
        if self.waits:
            await anyio.lowlevel.checkpoint()
        answer = self.answers.pop(0) if self.answers else math.inf
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @property
    def finished(self) -> bool:
        """Whether all answers are given."""
        return not self.answers

    def recover(self) -> None:
        """Write it down."""
        self.done.append("recover")

    async def close(self, grace_seconds: float) -> None:
        """Write it down."""
        self.done.append(("close", grace_seconds))

    def abandon(self) -> None:
        """Write it down."""
        self.done.append("abandon")

    def use_settings(self, settings: Settings) -> None:
        """Have none."""

    def forked(self) -> None:
        """Have nothing to forget."""

    def stats(self) -> TransportStats:
        """Have none."""
        raise NotImplementedError


END = ["abandon", ("close", 7.0)]


def grace() -> float:
    """Return what a close may take."""
    return 7.0


async def wait_until(predicate: Callable[[], object]) -> None:
    """Wait for something to become true, with a bound against hanging only."""
    with anyio.fail_after(30):
        while not predicate():
            await anyio.sleep(0.001)


@contextlib.asynccontextmanager
async def running(lane: Lane) -> AsyncIterator[None]:
    """Run a lane in this loop, and have it end."""
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(lane.run, grace)
            try:
                yield
            except BaseException:
                lane.cancelled = True
                raise
            lane.ending = True
            lane.wake()


async def asleep(lane: Diary, steps: int) -> None:
    """Wait until a lane sleeps after a number of steps."""
    await wait_until(lambda: lane.done.count("step") == steps)
    await anyio.wait_all_tasks_blocked()


@pytest.mark.anyio
async def test_a_lane_steps_on_while_there_is_more(heard: Heard) -> None:
    """A step after which there is more at once is followed by the next one without a sleep."""
    lane = Diary(Report(heard), 0.0, 0.0, 0.0)
    lane.ending = True
    with anyio.fail_after(30):
        await lane.run(grace)
    assert lane.done == ["step", "step", "step", *END]


@pytest.mark.anyio
async def test_a_lane_lets_others_have_their_turn(heard: Heard) -> None:
    """Steps that never wait do not keep the loop from its other tasks, such as our own end."""
    lane = Diary(Report(heard), *[0.0] * 1000)
    lane.waits, lane.ending = False, True
    async with anyio.create_task_group() as group:
        group.start_soon(lane.run, grace)
        await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    assert lane.answers


@pytest.mark.anyio
async def test_a_lane_that_ends_takes_one_step_at_least(heard: Heard) -> None:
    """What came before the end is seen, even where the lane begins to run after it."""
    lane = Diary(Report(heard))
    lane.ending = True
    with anyio.fail_after(30):
        await lane.run(grace)
    assert lane.done == ["step", *END]


@pytest.mark.anyio
async def test_a_lane_that_ends_first_leaves_then_closes(heard: Heard) -> None:
    """What is left is let go of before the close, which has the time that it is given."""
    lane = Diary(Report(heard))
    async with running(lane):
        await asleep(lane, 1)
        assert lane.done == ["step"]
    assert lane.done == ["step", "step", *END]


@pytest.mark.anyio
async def test_a_lane_with_more_to_do_does_not_end(heard: Heard) -> None:
    """The end is taken as soon as nothing more can be done, and a pause of the lane counts."""
    lane = Diary(Report(heard), 0.001, 0.001, 0.001)
    lane.ending = True
    with anyio.fail_after(30):
        await lane.run(grace)
    assert lane.done == ["step"] * 3 + END


@pytest.mark.anyio
async def test_a_lane_sleeps_until_its_next_step_is_due(heard: Heard) -> None:
    """A pause ends by itself."""
    lane = Diary(Report(heard), 0.001)
    async with running(lane):
        await asleep(lane, 2)


@pytest.mark.anyio
async def test_a_sleeping_lane_asks_to_be_woken(heard: Heard) -> None:
    """`poke` says that the lane sleeps; woken, it takes a step."""
    lane, asked = Diary(Report(heard), 1000.0), list[bool]()
    lane.wake()
    assert lane.poke() is False
    async with running(lane):
        await asleep(lane, 1)
        assert lane.poke() is True
        lane.in_step = lambda: asked.append(lane.poke())
        lane.wake()
        await wait_until(lambda: asked)
    assert asked[0] is False


@pytest.mark.anyio
async def test_a_poke_during_a_step_is_followed_by_another_step(heard: Heard) -> None:
    """What comes while the lane is busy needs no waking, and is not overlooked."""
    lane = Diary(Report(heard), 1000.0, 1000.0)
    poked: list[bool] = []

    def poke_once() -> None:
        if not poked:
            poked.append(lane.poke())

    lane.in_step = poke_once
    async with running(lane):
        await asleep(lane, 2)
    assert poked == [False]


@pytest.mark.anyio
async def test_a_poke_while_a_lane_lies_down_is_not_overlooked(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poke between the last step and the sleep either wakes the lane or keeps it awake."""
    lane = Diary(Report(heard), 1000.0)
    real, poked = anyio.move_on_after, list[bool]()

    def another_thread_is_here(seconds: float) -> anyio.CancelScope:
        if not poked:
            poked.append(lane.poke())
            lane.wake()
        return real(seconds)

    monkeypatch.setattr(anyio, "move_on_after", another_thread_is_here)
    async with running(lane):
        await asleep(lane, 2)
    assert poked == [True]


@pytest.mark.anyio
async def test_a_poke_does_not_outlive_its_step(heard: Heard) -> None:
    """One poke is one step: a lane that was poked before it began sleeps after its first."""
    lane = Diary(Report(heard))
    lane.poke()
    async with running(lane):
        await asleep(lane, 1)
        assert lane.done == ["step"]


@pytest.mark.anyio
async def test_a_deaf_lane_is_not_woken_by_pokes(heard: Heard) -> None:
    """In an outage each new event would wake the lane for nothing: it sleeps on."""
    lane = Diary(Report(heard), 1000.0)
    lane.deaf = True
    lane.in_step = lane.poke
    async with running(lane):
        await asleep(lane, 1)
        assert lane.poke() is False
        await anyio.wait_all_tasks_blocked()
        assert lane.done == ["step"]
    assert lane.done == ["step", "step", *END]


@pytest.mark.anyio
async def test_a_step_that_breaks_down_does_not_end_the_lane(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect is told, made up for, and after a pause the lane goes on."""
    monkeypatch.setattr(_lanes, "BROKEN_SECONDS", 0.001)
    error = RuntimeError("a defect")
    lane = Diary(Report(heard), error, 1000.0)
    async with running(lane):
        await asleep(lane, 2)
        assert lane.done == ["step", "recover", "step"]
    assert heard == [(error, "there: delivery")]


@pytest.mark.anyio
async def test_a_lane_that_breaks_down_again_and_again_does_not_spin(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps that break down there is a pause."""
    monkeypatch.setattr(_lanes, "BROKEN_SECONDS", 1000.0)
    lane = Diary(Report(heard), *map(RuntimeError, "abc"))
    async with running(lane):
        await asleep(lane, 1)
        lane.answers.clear()
    assert lane.done == ["step", "recover", "step", *END]


@pytest.mark.anyio
async def test_a_lane_ends_even_if_its_last_step_breaks_down(heard: Heard) -> None:
    """A defect does not hold up the end."""
    lane = Diary(Report(heard), RuntimeError())
    lane.ending = True
    with anyio.fail_after(30):
        await lane.run(grace)
    assert lane.done == ["step", "recover", *END]


@pytest.mark.anyio
@pytest.mark.parametrize(("ending", "left"), [(True, END), (False, [("close", 7.0)])])
async def test_a_cancelled_lane_closes(heard: Heard, ending: bool, left: list[object]) -> None:
    """Cut off at its end it lets go and closes; cut off by its loop's end it keeps what it has."""
    lane = Diary(Report(heard), 1000.0)
    async with anyio.create_task_group() as group:
        group.start_soon(lane.run, grace)
        await asleep(lane, 1)
        lane.ending = ending
        group.cancel_scope.cancel()
    assert lane.done == ["step", *left]


@pytest.mark.anyio
async def test_a_lane_that_is_begun_anew_makes_up_for_the_step_that_was_cut_off(
    heard: Heard,
) -> None:
    """A driver's SystemExit may end the loop in mid-step; the next one takes up what it left."""
    lane = Diary(Report(heard), SystemExit())
    with pytest.raises(SystemExit):
        await lane.run(grace)
    lane.ending = True
    with anyio.fail_after(30):
        await lane.run(grace)
    assert "recover" in lane.done


@pytest.mark.anyio
async def test_a_lane_that_is_begun_anew_after_a_step_has_nothing_to_make_up_for(
    heard: Heard,
) -> None:
    """A loop that is ended while the lane sleeps has cut nothing off."""
    lane = Diary(Report(heard), 1000.0)
    async with anyio.create_task_group() as group:
        group.start_soon(lane.run, grace)
        await asleep(lane, 1)
        group.cancel_scope.cancel()
    async with running(lane):
        await asleep(lane, 2)
    assert "recover" not in lane.done


class Function:
    """A callback that fails a number of times."""

    def __init__(self, failures: int = 0, error: BaseException | None = None) -> None:
        self.failures = failures
        self.error = error or ValueError("no")
        self.got: list[Any] = []
        self.calls = 0

    async def __call__(self, given: Any) -> None:
        """Fail, or remember what was given."""
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise self.error
        self.got.append(given)


def written(*numbers: int) -> Written:
    """Return events of a session, as its file has them."""
    events = [EncodedEvent("s", "note", f"id-{n}", n, orjson.dumps({"n": n})) for n in numbers]
    return Written(None, "s/log.jsonl", "s", 0, 1, events, list(numbers))


class Decisions(list[tuple[str, bool]]):
    """Who hears whether the callback took an event."""

    def __call__(self, written: Written, index: int, taken: bool) -> None:
        self.append((written.events[index].id, taken))


@pytest.fixture
def decisions() -> Decisions:
    """What the lane has decided."""
    return Decisions()


@pytest.fixture
def make_lane(heard: Heard, decisions: Decisions) -> Callable[..., CallbackLane]:
    """Make lanes of a callback."""

    def make(function: Callable[[Any], Awaitable[object]], **options: Any) -> CallbackLane:
        report = Report(heard)
        return CallbackLane(Callback(function, settings(**options), report), report, decisions)

    return make


def put(lane: CallbackLane, *numbers: int) -> list[bool]:
    """Queue events; return which found room."""
    batch = written(*numbers)
    return [lane.put(Called(batch, index)) for index in range(len(numbers))]


async def run_to_the_end(lane: CallbackLane) -> None:
    """Run a lane until it has decided everything."""
    lane.ending = True
    with anyio.fail_after(30):
        await lane.run(grace)


@pytest.mark.anyio
async def test_a_callback_lane_calls_with_the_events_fields(
    make_lane: Callable[..., CallbackLane], decisions: Decisions
) -> None:
    """An event that nobody awaits reaches the callback as its fields, in order."""
    function = Function()
    lane = make_lane(function)
    assert put(lane, 1, 2) == [True, True]
    await run_to_the_end(lane)
    assert function.got == [{"n": 1}, {"n": 2}]
    assert decisions == [("id-1", True), ("id-2", True)]
    assert lane.stats().sent == 2


@pytest.mark.anyio
async def test_a_callback_lane_takes_one_event_a_step(
    make_lane: Callable[..., CallbackLane], decisions: Decisions
) -> None:
    """After each event it looks whether it is to end; with none it waits for one."""
    lane = make_lane(Function())
    put(lane, 1, 2)
    assert [await lane.step() for _ in range(3)] == [0.0, 0.0, math.inf]


@pytest.mark.anyio
async def test_what_a_callback_lane_cannot_deliver_goes_on(
    make_lane: Callable[..., CallbackLane], decisions: Decisions
) -> None:
    """An event that the callback does not take is said not to be taken, in order."""
    function = Function(failures=-1)
    lane = make_lane(function, max_retry_attempts=1, breaker_failures=2, breaker_reset_seconds=1000)
    put(lane, 1, 2)
    await run_to_the_end(lane)
    assert decisions == [("id-1", False), ("id-2", False)]
    assert function.calls == 2
    assert (lane.stats().rejected, lane.stats().connected) == (2, False)


@pytest.mark.anyio
async def test_a_cancellation_from_inside_a_callback_passes_the_event_on(
    make_lane: Callable[..., CallbackLane], decisions: Decisions, heard: Heard
) -> None:
    """A CancelledError that nobody asked for costs the callback its event, not the lane."""
    function = Function(failures=1, error=asyncio.CancelledError())
    lane = make_lane(function, max_retry_attempts=0)
    put(lane, 1, 2)
    await run_to_the_end(lane)
    assert decisions == [("id-1", False), ("id-2", True)]
    assert function.got == [{"n": 2}]
    assert "downstream_callback: delivery" not in [context for _, context in heard]


@pytest.mark.anyio
async def test_a_cancelled_callback_lane_passes_on_what_it_leaves(
    make_lane: Callable[..., CallbackLane], decisions: Decisions
) -> None:
    """A callback that hangs at the end is cut off; its event and all behind it go on."""
    inside = anyio.Event()

    async def function(given: Any) -> None:
        inside.set()
        await anyio.sleep_forever()

    lane = make_lane(function)
    put(lane, 1, 2)
    async with anyio.create_task_group() as group:
        group.start_soon(lane.run, grace)
        await inside.wait()
        lane.ending = lane.cancelled = True
        group.cancel_scope.cancel()
    assert decisions == [("id-1", False), ("id-2", False)]
    assert lane.stats().dropped == 2
    assert lane.finished


@pytest.mark.anyio
async def test_an_event_that_breaks_the_callback_lane_goes_on(
    make_lane: Callable[..., CallbackLane], decisions: Decisions, heard: Heard
) -> None:
    """What cannot be called for is told, and does not hold back the rest."""
    lane = make_lane(Function())
    broken = written(1)
    broken.events[0] = broken.events[0]._replace(body=b"no JSON")  # type: ignore[index]
    lane.put(Called(broken, 0))
    put(lane, 2)
    async with running(lane):
        await wait_until(lambda: decisions == [("id-1", False)])
        lane.wake()
        await wait_until(lambda: len(decisions) == 2)
    assert decisions[1] == ("id-2", True)
    assert [context for _, context in heard] == ["downstream_callback: delivery"]


@pytest.mark.anyio
async def test_a_callback_lane_that_breaks_down_with_nothing_queued_recovers(
    make_lane: Callable[..., CallbackLane], decisions: Decisions
) -> None:
    """There is nothing to make up for then."""
    make_lane(Function()).recover()
    assert decisions == []


@pytest.mark.anyio
async def test_a_decision_that_fails_costs_no_other_event_its_call(
    heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where noting what a callback took breaks down, the next event is called for as ever."""
    monkeypatch.setattr(_lanes, "BROKEN_SECONDS", 0.0)
    function, report, fuse = Function(), Report(heard), [RuntimeError()]

    def decide(written: Written, index: int, taken: bool) -> None:
        if fuse:
            raise fuse.pop()

    lane = CallbackLane(Callback(function, settings(), report), report, decide)
    put(lane, 1, 2)
    await run_to_the_end(lane)
    assert function.got == [{"n": 1}, {"n": 2}]


def test_a_full_callback_lane_lets_events_pass_and_says_so_once(
    make_lane: Callable[..., CallbackLane], capsys: pytest.CaptureFixture[str]
) -> None:
    """What finds no room is counted and goes on at once; one line on stderr says so."""
    lane = make_lane(Function(), max_pending_events=2)
    assert put(lane, 1, 2, 3, 4) == [True, True, False, False]
    assert (lane.stats().lag_events, lane.stats().dropped) == (2, 2)
    assert capsys.readouterr().err == (
        "eventlog_handler: downstream_callback is behind: events pass it by\n"
    )


def test_a_callback_lane_goes_by_other_settings(make_lane: Callable[..., CallbackLane]) -> None:
    """New options hold from the next event on."""
    lane = make_lane(Function(), max_pending_events=1)
    assert put(lane, 1, 2) == [True, False]
    lane.use_settings(settings(max_pending_events=2))
    assert put(lane, 2) == [True]


def test_the_lag_of_a_callback_lane_is_that_of_its_first_event(
    make_lane: Callable[..., CallbackLane],
) -> None:
    """How long the oldest event waits for the callback is told; nothing where none does."""
    lane = make_lane(Function())
    assert (lane.stats().lag_events, lane.stats().lag_seconds) == (0, 0.0)
    events = [EncodedEvent("s", "note", "id", 946684800.0, b"{}")]
    lane.put(Called(Written(None, "", "s", 0, None, events, [1]), 0))
    assert lane.stats().lag_seconds > 3600


def test_a_forked_child_has_nothing_to_call_for(
    make_lane: Callable[..., CallbackLane], decisions: Decisions
) -> None:
    """What the parent has queued is the parent's to deliver."""
    lane = make_lane(Function())
    put(lane, 1)
    lane.forked()
    assert lane.finished
    assert (decisions, lane.stats().dropped) == ([], 0)


@pytest.mark.anyio
async def test_a_call_that_is_under_way_in_the_parent_costs_the_child_nothing(
    make_lane: Callable[..., CallbackLane], decisions: Decisions
) -> None:
    """The first event of a child is called for, whatever its parent was doing."""

    async def fork() -> None:
        lane.forked()
        put(lane, 2)
        raise SystemExit

    function = Function()
    lane = make_lane(function)
    put(lane, 1)
    step: Any = lane.step
    lane.step = fork  # type: ignore[method-assign,assignment]
    with pytest.raises(SystemExit):
        await lane.run(grace)
    lane.step = step  # type: ignore[method-assign]
    await run_to_the_end(lane)
    assert decisions == [("id-2", True)]


@pytest.mark.anyio
async def test_a_probe_that_is_under_way_in_the_parent_is_made_in_the_child(
    heard: Heard, decisions: Decisions
) -> None:
    """A process that is copied during the probe makes one of its own."""
    function, report = Function(), Report(heard)
    callback = Callback(function, settings(), report)
    lane = CallbackLane(callback, report, decisions)
    callback.breaker.trip(0.0)
    assert callback.breaker.allow(1000.0)
    lane.forked()
    put(lane, 1)
    await run_to_the_end(lane)
    assert decisions == [("id-1", True)]
