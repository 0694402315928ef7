"""The lane of a transport: batches, failures, the breaker, positions, other processes, its end.

Files, database and far sides are real or shipped fakes. The lanes' threads are not started, each
test takes the steps itself; and the clock goes on when it is told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import os
import sqlite3
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import orjson
import pytest

from eventlog_handler import (
    TransportConnectionError,
    TransportError,
    TransportRejectedError,
    TransportTimeoutError,
    _batch,
    _downstream,
    _outbox,
    _sender,
    _stamp,
)
from eventlog_handler._config import Settings, resolve
from eventlog_handler._delivery import Delivery, FileRegister
from eventlog_handler._files import Layout, SessionFiles
from eventlog_handler._report import Report
from eventlog_handler._sender import Sender
from eventlog_handler._worker import Worker
from eventlog_handler.testing import FailingTransport, GatedTransport, RecordingTransport
from eventlog_handler.typing import EncodedEvent, OutgoingEvent, Written

NAME = "there"
moments = itertools.count(1_700_000_000)


class Heard(list[tuple[Exception, str]]):
    """An error handler that remembers."""

    def __call__(self, error: Exception, context: str) -> None:
        self.append((error, context))

    @property
    def kinds(self) -> list[str]:
        """What was heard, by class."""
        return [type(error).__name__ for error, _ in self]


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Return the time that the test has set."""
        return self.now


class TheLongest:
    """Stands in for the module `random`: every pause is as long as it can be."""

    @staticmethod
    def random() -> float:
        """Return the most."""
        return 1.0


@pytest.fixture
def heard() -> Heard:
    """What the error handler hears."""
    return Heard()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Have no threads and no luck; return the clock."""
    clock = Clock()
    monkeypatch.setattr(Worker, "start", lambda worker: None)
    for module in (_batch, _downstream, _sender):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(_downstream, "random", TheLongest)
    return clock


class Process:
    """A process with its files and its delivery, on a base directory that others may have had."""

    def __init__(
        self, base: Path, heard: Heard, clock: Clock, *transports: Any, **options: Any
    ) -> None:
        given = {"log_base_dir": base, "file_naming_pattern": "log", **options}
        self.settings: Settings = resolve(given, {})
        self.base, self.clock = base, clock
        self.delivery = Delivery(
            self.settings, Report(heard), lambda session, path: self.files.committed(session, path)
        )
        self.files = SessionFiles(
            self.settings.paths("u"),
            Layout(self.settings.log_format),
            max_open_files=8,
            file_mode=0o600,
            directory_mode=0o700,
            registrar=FileRegister(self.delivery),
        )
        self.use(*transports)

    def use(self, *transports: Any) -> None:
        """Send to these from now on."""
        self.delivery.use_transports({transport.name: transport for transport in transports})

    def lane(self, name: str = NAME) -> Sender:
        """Return a transport's lane."""
        return self.delivery._senders[name][0]

    def write(
        self,
        session: str,
        *numbers: int,
        size: int = 0,
        then: Callable[[Written], Any] | None = None,
    ) -> None:
        """Write events, each told by its number, and hand them over."""
        then = then or self.delivery.hand_over
        events = []
        for n in numbers:
            body = orjson.dumps({"type": "note", "session_id": session, "n": n, "x": "x" * size})
            moment = next(moments)
            events.append(EncodedEvent(session, "note", _stamp.new_id(), moment, body))
        if self.settings.enable_local_logging:
            assert self.files.append(session, events, then) == len(events)
        else:
            then(Written(None, "", session, 0, None, events, []))

    def die(self) -> None:
        """Be killed: the locks go, and nothing else happens."""
        for outbox in self.delivery._outboxes:
            outbox._disconnect()
            outbox._let_go()
        self.files.close()

    def close(self) -> None:
        """End as a process should."""
        self.delivery.close(time.monotonic())
        self.files.close()

    def positions(self, name: str = NAME) -> dict[str, int]:
        """Return what is saved for a transport, by file."""
        path = self.base / ".eventlog" / "delivery.sqlite3"
        with contextlib.closing(sqlite3.connect(path)) as database:
            query = "SELECT path, position FROM acked WHERE transport = ?"
            return dict(database.execute(query, (name,)).fetchall())

    def end(self, path: str, lines: int) -> int:
        """Return where a file's first lines end."""
        return sum(map(len, (self.base / path).read_bytes().splitlines(True)[:lines]))

    def parked(self, name: str = NAME) -> list[dict[str, Any]]:
        """Return what is parked for a transport."""
        path = self.base / ".eventlog" / "rejected" / f"{name}.jsonl"
        return (
            [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        )

    async def run_dry(self, name: str = NAME, most: int = 200) -> list[float]:
        """Step until nothing is left to send; return the pauses that there were."""
        lane, pauses = self.lane(name), list[float]()
        for _ in range(most):
            pause = await lane.step()
            if pause > 0 and not lane.deaf and not lane.backlog.lag_events:
                return pauses
            if pause:
                pauses.append(pause)
                self.clock.now += pause
        raise AssertionError("it does not come to an end")


Begin = Callable[..., Process]


@pytest.fixture
def begin(tmp_path: Path, heard: Heard, clock: Clock) -> Iterator[Callable[..., Process]]:
    """Begin processes on one base directory."""
    made: list[Process] = []

    def make(*transports: Any, **options: Any) -> Process:
        made.append(Process(tmp_path / "base", heard, clock, *transports, **options))
        return made[-1]

    yield make
    for process in made:
        process.die()


def number(line: bytes) -> int:
    """Return an event's number."""
    found: int = orjson.loads(line)["event"]["n"]
    return found


class Single(RecordingTransport):
    """Takes single events; each attempt is answered as the test says, else with True.

    Args:
        *answers: Of the first attempts: raised or returned.
        name: Its name.
    """

    def __init__(self, *answers: Any, name: str = NAME) -> None:
        super().__init__(name)
        self.answers = deque(answers)
        self.errors: dict[int, Exception] = {}
        """What is raised for an event, by its number, whenever it comes."""
        self.tried: list[int] = []
        self.well: Any = True
        self.checks = 0

    def answer(self) -> Any:
        """Return the next answer, or raise it."""
        answer = self.answers.popleft() if self.answers else True
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Answer, and remember the event if that is True."""
        self.tried.append(number(event))
        if number(event) in self.errors:
            raise self.errors[number(event)]
        answer: bool = self.answer()
        if answer is True:
            await super().send(event, metadata)
        return answer

    async def health_check(self) -> bool:
        """Say what the test says."""
        self.checks += 1
        found: bool = self.well
        return found

    @property
    def taken(self) -> list[int]:
        """The numbers of the events that were taken, in order."""
        return [number(line) for line, _ in self.sent]


class Together(Single):
    """Takes batches; what it returns of them is what the test says, else True."""

    def __init__(self, *answers: Any, name: str = NAME) -> None:
        super().__init__(*answers, name=name)
        self.batches: list[list[int]] = []

    async def send_batch(self, batch: Sequence[OutgoingEvent]) -> Any:
        """Answer, and remember the events that were taken."""
        numbers = [number(event.line) for event in batch]
        self.batches.append(numbers)
        answer: Any = self.answer()
        if answer is True and any(n in self.errors for n in numbers):
            answer = [self.errors.get(n) for n in numbers]
        each = answer if isinstance(answer, (list, tuple)) else [answer] * len(batch)
        for event, outcome in zip(batch, each, strict=False):
            if outcome is None or outcome is True:
                self.sent.append((event.line, event.metadata))
        return answer


async def wait_until(predicate: Callable[[], object]) -> None:
    """Wait for something to become true, with a bound against hanging only."""
    with anyio.fail_after(30):
        while not predicate():
            await anyio.sleep(0.001)


def grace() -> float:
    """Return what a close may take."""
    return 30.0


CONNECTION = TransportConnectionError("refused")
OWN = TransportError("this one is not liked")
REFUSED = TransportRejectedError("too large")


# Batches.


@pytest.mark.anyio
async def test_events_are_sent_in_order_with_line_and_metadata(begin: Begin) -> None:
    """A transport gets each event once: the very line of the file, and what it is routed by."""
    process = begin(there := Single())
    process.write("a", 1, 2, 3)
    await process.run_dry()
    lines = (process.base / "a/log.jsonl").read_bytes().splitlines()
    assert [line for line, _ in there.sent] == lines
    for line, metadata in there.sent:
        found = orjson.loads(line)
        assert metadata == {
            "id": found["id"],
            "session_id": "a",
            "type": "note",
            "timestamp": found["timestamp"],
        }


@pytest.mark.anyio
async def test_a_lane_with_nothing_to_send_waits(begin: Begin) -> None:
    """Without events there is nothing to do but to look for what others leave, now and then."""
    process = begin(Single())
    assert await process.lane().step() == _sender.TEND_SECONDS
    assert not process.lane().deaf


@pytest.mark.anyio
async def test_a_batch_has_no_more_events_than_asked_for(begin: Begin) -> None:
    """`batch_events` is the most in one call."""
    process = begin(there := Together(), batch_events=3)
    process.write("a", *range(7))
    await process.run_dry()
    assert there.batches == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.anyio
async def test_a_batch_has_no_more_bytes_than_asked_for(begin: Begin) -> None:
    """`batch_bytes` of lines is the most in one call, but an event that is larger goes alone."""
    process = begin(there := Together(), batch_bytes=3500)
    process.write("a", 1, 2, 3, 4, size=1000)
    process.write("a", 5, size=9000)
    process.write("a", 6)
    await process.run_dry()
    assert there.batches == [[1, 2, 3], [4], [5], [6]]


@pytest.mark.anyio
async def test_a_batch_holds_events_of_many_sessions(begin: Begin) -> None:
    """Sessions with few events share a call."""
    process = begin(there := Together())
    for n, session in enumerate("abc"):
        process.write(session, n)
    await process.run_dry()
    assert there.batches == [[0, 1, 2]]


@pytest.mark.anyio
async def test_a_batch_waits_for_its_age(begin: Begin, clock: Clock) -> None:
    """With `batch_seconds` a batch that is not full waits for more, from its first event on."""
    process = begin(there := Together(), batch_seconds=5)
    process.write("a", 1)
    assert await process.lane().step() == 5
    clock.now += 3
    process.write("b", 2)
    assert await process.lane().step() == 2
    clock.now += 2
    assert await process.lane().step() == 0
    assert there.batches == [[1, 2]]


@pytest.mark.anyio
async def test_each_batch_has_an_age_of_its_own(begin: Begin, clock: Clock) -> None:
    """An event that comes after a batch waits as long as that one did."""
    process = begin(Together(), batch_seconds=5)
    process.write("a", 1)
    await process.run_dry()
    clock.now += 4
    process.write("a", 2)
    assert await process.lane().step() == 5


@pytest.mark.anyio
async def test_the_age_of_a_batch_ends_with_its_events(begin: Begin, clock: Clock) -> None:
    """What the callback took out of a batch has no part in the age of the next one."""
    process, found = begin(Together(), batch_seconds=5), list[Written]()
    process.write("a", 1, then=lambda w: found.append(process.delivery.send(w, undecided=True)))
    assert await process.lane().step() == 5
    process.delivery.decide(found[0], 0, taken=True)
    await process.lane().step()
    clock.now += 4
    process.write("a", 2)
    assert await process.lane().step() == 5


@pytest.mark.anyio
async def test_what_is_due_ends_with_its_events(begin: Begin) -> None:
    """A batch of which nothing was left to send does not have the next one sent at once."""
    process, found = begin(Together(), batch_seconds=5, batch_events=3), list[Written]()
    process.write(
        "a", 1, 2, 3, then=lambda w: found.append(process.delivery.send(w, undecided=True))
    )
    await process.lane().step()
    for index in range(3):
        process.delivery.decide(found[0], index, taken=True)
    await process.lane().step()
    process.write("a", 4)
    assert await process.lane().step() == 5


@pytest.mark.anyio
async def test_a_full_batch_does_not_wait(begin: Begin) -> None:
    """`batch_events` events go at once."""
    process = begin(there := Together(), batch_seconds=5, batch_events=3)
    process.write("a", 1, 2)
    assert await process.lane().step() == 5
    process.write("a", 3)
    assert await process.lane().step() == 0
    assert there.batches == [[1, 2, 3]]


@pytest.mark.anyio
async def test_a_batch_that_is_full_by_its_bytes_does_not_wait(begin: Begin) -> None:
    """`batch_bytes` of lines go at once."""
    process = begin(there := Together(), batch_seconds=5, batch_bytes=2500)
    process.write("a", 1, 2, 3, size=1000)
    assert await process.lane().step() == 0
    assert there.batches == [[1, 2]]


@pytest.mark.anyio
async def test_what_is_left_of_a_batch_does_not_wait_again(begin: Begin, clock: Clock) -> None:
    """Events that were due go one after the other, however slow their transport is."""

    class Slow(Single):
        async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
            clock.now += 1
            return await super().send(event, metadata)

    process = begin(there := Slow(), batch_seconds=5)
    process.write("a", 1, 2, 3)
    assert await process.run_dry() == [5]
    assert there.taken == [1, 2, 3]


@pytest.mark.anyio
async def test_what_comes_while_a_batch_is_sent_waits_for_its_own(
    begin: Begin, clock: Clock
) -> None:
    """Events that were due go at once, in however many calls; the next one begins to wait."""

    class Slow(Single):
        async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
            clock.now += 1
            return await super().send(event, metadata)

    process = begin(there := Slow(), batch_seconds=5)
    process.write("a", 1, 2)
    clock.now += await process.lane().step()
    await process.lane().step()
    process.write("b", 3)
    await process.lane().step()
    assert there.taken == [1, 2]
    assert await process.lane().step() == 5


@pytest.mark.anyio
async def test_what_comes_while_the_last_of_a_batch_is_sent_waits_too(
    begin: Begin, clock: Clock
) -> None:
    """An event that finds all others sent begins a batch."""

    class Busy(Single):
        async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
            process.write("b", 2)
            return await super().send(event, metadata)

    process = begin(Busy(), batch_seconds=5)
    process.write("a", 1)
    clock.now += await process.lane().step()
    await process.lane().step()
    assert await process.lane().step() == 5


@pytest.mark.anyio
async def test_who_waits_for_an_event_does_not_wait_for_the_age_of_its_batch(begin: Begin) -> None:
    """A flush, or a caller who awaits, has the batch sent now, and is released by it."""
    process, released = begin(there := Together(), batch_seconds=5), list[int]()
    process.write("a", 1)
    assert await process.lane().step() == 5
    assert process.lane().backlog.when(lambda: released.append(len(there.sent)), None) == 1
    assert await process.lane().step() == 0
    assert released == [1]


@pytest.mark.anyio
async def test_the_end_does_not_wait_for_the_age_of_a_batch(begin: Begin) -> None:
    """A lane that ends sends what it has."""
    process = begin(there := Together(), batch_seconds=1000)
    process.write("a", 1)
    process.lane().ending = True
    with anyio.fail_after(30):
        await process.lane().run(grace)
    assert there.batches == [[1]]


@pytest.mark.anyio
async def test_slow_single_events_are_saved_in_between(begin: Begin, clock: Clock) -> None:
    """A transport that takes one by one keeps a kill from costing many of them again."""

    class Slow(Single):
        async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
            clock.now += _batch.SAVE_SECONDS * 0.6
            return await super().send(event, metadata)

    process = begin(there := Slow())
    process.write("a", *range(5))
    await process.lane().step()
    assert there.taken == [0, 1]
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 2)}


# What a transport answers.


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [True, [None, None], (None, None)])
async def test_a_batch_is_acknowledged(begin: Begin, answer: Any) -> None:
    """True is all of it; a list or tuple has None for each event."""
    process = begin(there := Together(answer))
    process.write("a", 1, 2)
    await process.run_dry()
    assert there.batches == [[1, 2]]
    assert (process.lane().stats().sent, process.lane().stats().failed) == (2, 0)


@pytest.mark.anyio
async def test_a_transport_may_use_up_its_batch(begin: Begin) -> None:
    """Who takes the events off the list that it is given has acknowledged them all the same."""

    class Hungry(Single):
        async def send_batch(self, batch: Sequence[OutgoingEvent]) -> bool:
            self.tried += [number(event.line) for event in batch]
            if isinstance(batch, list):
                batch.clear()
            return True

    process = begin(there := Hungry())
    process.write("a", 1, 2)
    await process.run_dry()
    assert there.tried == [1, 2]


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [None, False, 1, "ok", [None], [None] * 3, []])
async def test_what_says_nothing_of_a_batch_is_a_failure(
    begin: Begin, heard: Heard, answer: Any
) -> None:
    """Neither a missing `return` nor a list of another length passes for an acknowledgement."""
    process = begin(there := Together(answer))
    process.write("a", 1, 2)
    await process.run_dry()
    assert there.batches[1:] == [[1], [2]]
    assert len(heard) == 1
    error, context = heard[0]
    assert type(error) is TransportError
    assert str(error).startswith(f"send_batch returned {answer!r}; return True, or a list")
    assert context == NAME


@pytest.mark.anyio
@pytest.mark.parametrize("outcome", [False, True, "ok", SystemExit()])
async def test_only_none_acknowledges_one_of_a_batch(
    begin: Begin, heard: Heard, outcome: Any
) -> None:
    """What a list has for an event that is neither None nor an exception is its failure."""
    process = begin(there := Together([None, outcome, None]))
    process.write("a", 1)
    process.write("b", 2)
    process.write("c", 3)
    await process.run_dry()
    assert there.batches == [[1, 2, 3], [2]]
    assert str(heard[0][0]) == (
        f"send_batch returned {outcome!r} for an event; only None acknowledges it"
    )


@pytest.mark.anyio
@pytest.mark.parametrize("error", [OWN, CONNECTION, SystemExit(1)], ids=repr)
async def test_a_failed_batch_goes_on_one_by_one_and_then_doubles(
    begin: Begin, error: BaseException
) -> None:
    """Which event it was is not known: so one alone is tried, then two, four, up to the most."""
    process = begin(there := Together(error), batch_events=4)
    process.write("a", *range(12))
    await process.run_dry()
    assert there.batches == [[0, 1, 2, 3], [0], [1, 2], [3, 4, 5, 6], [7, 8, 9, 10], [11]]
    assert process.lane().stats().failed == 1


@pytest.mark.anyio
async def test_a_failed_batch_is_one_by_one_until_one_is_taken(begin: Begin) -> None:
    """A failure of the single event keeps the next attempts single."""
    process = begin(there := Together(CONNECTION, CONNECTION, CONNECTION))
    process.write("a", 1, 2, 3)
    await process.run_dry()
    assert there.batches == [[1, 2, 3], [1], [1], [1], [2, 3]]


@pytest.mark.anyio
async def test_the_culprit_of_a_batch_is_found_and_parked(begin: Begin) -> None:
    """Where one event makes a whole batch fail, the others are taken in the end."""

    class AllOrNothing(Together):
        async def send_batch(self, batch: Sequence[OutgoingEvent]) -> Any:
            if any(number(event.line) == 3 for event in batch):
                raise OWN
            return await super().send_batch(batch)

    process = begin(there := AllOrNothing(), breaker_failures=3)
    for n in range(6):
        process.write(f"s{n}", n)
    await process.run_dry()
    assert sorted(there.taken) == [0, 1, 2, 4, 5]
    assert [number(orjson.dumps(each["line"])) for each in process.parked()] == [3]


@pytest.mark.anyio
async def test_a_refused_event_of_a_batch_is_parked_and_the_others_go_on(begin: Begin) -> None:
    """A rejection costs neither its batch nor its session a pause, and is no failure."""
    process = begin(there := Together([None, REFUSED, None]))
    process.write("a", 1, 2, 3)
    assert await process.run_dry() == []
    assert there.batches == [[1, 2, 3]]
    assert [each["rejected"]["reason"] for each in process.parked()] == [
        "TransportRejectedError: too large"
    ]
    stats = process.lane().stats()
    assert (stats.sent, stats.rejected, stats.failed) == (2, 1, 0)


@pytest.mark.anyio
async def test_a_session_goes_on_where_its_batch_was_taken_to(begin: Begin) -> None:
    """What a batch has behind an event that failed is sent again, after that event."""
    process = begin(there := Together([None, OWN, None]))
    process.write("a", 1, 2, 3)
    await process.run_dry()
    assert there.batches == [[1, 2, 3], [2, 3]]


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [None, False, 1, "true"])
async def test_only_true_acknowledges_a_single_event(
    begin: Begin, heard: Heard, answer: Any
) -> None:
    """What a `send` returns that is not True is a failure, and is tried again."""
    process = begin(there := Single(answer))
    process.write("a", 1, 2)
    await process.run_dry()
    assert there.tried == [1, 1, 2]
    error, context = heard[0]
    assert len(heard) == 1
    assert type(error) is TransportError
    assert str(error) == f"send returned {answer!r}; True is the only acknowledgement"
    assert context == NAME


# Failures.


@pytest.mark.anyio
async def test_failed_attempts_are_retried_before_the_next_event(begin: Begin) -> None:
    """A failed event is sent again until it is taken; each session keeps its order."""
    process = begin(there := FailingTransport(failures=2, name=NAME))
    process.write("a", 1, 2)
    await process.run_dry()
    assert [event["n"] for event in there.events] == [1, 2]
    stats = process.lane().stats()
    assert (stats.sent, stats.failed, stats.retried, stats.rejected) == (2, 2, 2, 0)


@pytest.mark.anyio
async def test_only_attempts_are_counted_as_retries(begin: Begin) -> None:
    """An event that had its turn behind one that failed again was not retried."""
    process = begin(there := Single(OWN, OWN, OWN), retry_delay_seconds=0)
    process.write("a", 1)
    process.write("b", 2)
    await process.run_dry()
    assert there.tried == [1, 2, 1, 2, 1]
    assert process.lane().stats().retried == 3


@pytest.mark.anyio
async def test_a_failed_batch_retries_what_had_failed_before(begin: Begin) -> None:
    """Each attempt with an event that has failed by itself counts once, together or alone."""
    process = begin(there := Together([OWN], CONNECTION))
    process.write("a", 1)
    process.clock.now += await process.lane().step()
    process.clock.now += await process.lane().step()
    process.write("b", 2, 3)
    await process.run_dry()
    assert sorted(there.batches[1]) == [1, 2, 3]
    assert process.lane().stats().retried == sum(1 in batch for batch in there.batches) - 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error", [RuntimeError("bad"), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError()]
)
async def test_whatever_a_send_raises_is_its_failure(
    begin: Begin, heard: Heard, error: BaseException
) -> None:
    """Even a driver's SystemExit is told, counted and retried, and ends nothing."""
    process = begin(there := Single(error))
    process.write("a", 1)
    await process.run_dry()
    assert there.taken == [1]
    assert len(heard) == process.lane().stats().failed == 1
    assert process.lane().stats().last_error is not None


@pytest.mark.anyio
async def test_a_send_that_hangs_is_timed_out_and_sent_again(begin: Begin, heard: Heard) -> None:
    """A time-out is ambiguous: the event goes out again under the same id."""
    ids: list[str] = []

    class HangsOnce(Single):
        async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
            ids.append((metadata or {})["id"])
            if len(ids) == 1:
                await anyio.sleep_forever()
            return await super().send(event, metadata)

    process = begin(there := HangsOnce(), send_timeout_seconds=0.01)
    process.write("a", 1)
    await process.run_dry()
    assert there.taken == [1]
    assert (len(ids), len(set(ids))) == (2, 1)
    assert heard.kinds == ["TransportTimeoutError"]


@pytest.mark.anyio
async def test_only_the_culprits_session_is_held_back(begin: Begin) -> None:
    """An event that fails with an error of its own lets all other sessions pass, at once."""
    process = begin(there := Single(OWN))
    process.write("a", 1, 2)
    process.write("b", 3, 4)
    assert [await process.lane().step() for _ in range(2)] == [0, 0]
    assert there.tried == [1, 3, 4]
    assert process.lane().stats().lag_events == 2
    await process.run_dry()
    assert there.taken == [3, 4, 1, 2]


@pytest.mark.anyio
async def test_a_culprit_in_a_batch_holds_back_its_session_only(begin: Begin) -> None:
    """Where a batch says which events failed, all other sessions are acknowledged."""
    process = begin(there := Together([OWN, None, None, None]))
    process.write("a", 1, 2)
    process.write("b", 3, 4)
    await process.lane().step()
    assert process.lane().stats().lag_events == 2
    assert process.positions() == {"a/log.jsonl": 0, "b/log.jsonl": process.end("b/log.jsonl", 2)}
    assert await process.lane().step() == process.settings.retry_delay_seconds
    await process.run_dry()
    assert there.batches == [[1, 2, 3, 4], [1, 2]]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error",
    [
        CONNECTION,
        TransportTimeoutError("nothing heard"),
        OSError("no route"),
        ConnectionResetError(),
        asyncio.TimeoutError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_of_the_connection_pauses_the_whole_lane(
    begin: Begin, error: Exception
) -> None:
    """What any event would have met is not one session's: nothing is tried until the pause ends."""
    process = begin(there := Single(error), retry_delay_seconds=7)
    process.write("a", 1)
    process.write("b", 2)
    await process.lane().step()
    assert await process.lane().step() == 7
    assert process.lane().deaf
    assert there.tried == [1]
    await process.run_dry()
    assert sorted(there.taken) == [1, 2]


@pytest.mark.anyio
async def test_the_pauses_of_an_outage_grow(begin: Begin) -> None:
    """Each failure in a row doubles the pause, up to the longest; the breaker has its own."""
    there = Single(*[CONNECTION] * 6)
    process = begin(there, retry_delay_seconds=1, retry_max_delay_seconds=5, breaker_failures=6)
    process.write("a", 1)
    assert await process.run_dry() == [1, 2, 4, 5, 5, 30]


@pytest.mark.anyio
async def test_the_pauses_of_a_session_grow(begin: Begin) -> None:
    """An event that fails again waits longer; its session alone does."""
    process = begin(Single(OWN, OWN, OWN), retry_delay_seconds=1)
    process.write("a", 1)
    assert await process.run_dry() == [1, 2, 4]


@pytest.mark.anyio
async def test_a_far_side_that_asks_to_be_left_alone_is(begin: Begin) -> None:
    """`retry_after_seconds` is heeded for all sessions, even with an error of one event's own."""
    there = Single(TransportError("slow down", retry_after_seconds=77))
    process = begin(there, retry_delay_seconds=1)
    process.write("a", 1)
    process.write("b", 2)
    assert await process.run_dry() == [77]
    assert there.tried == [1, 2, 1]


@pytest.mark.anyio
async def test_a_batch_that_asks_to_be_left_alone_is(begin: Begin) -> None:
    """`retry_after_seconds` is heeded where a whole batch failed, too."""
    process = begin(Together(TransportError("slow down", retry_after_seconds=77)))
    process.write("a", 1, 2)
    assert await process.run_dry() == [77]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("asked", "paused"),
    [
        (1e9, 3600),
        (math.inf, 3600),
        (3600, 3600),
        (0, 1),
        (-5, 1),
        (None, 1),
        (math.nan, 1),
        ("soon", 1),
    ],
)
async def test_what_a_far_side_asks_for_is_bounded(begin: Begin, asked: Any, paused: float) -> None:
    """Neither a typing error of an hour's length nor nonsense switches a transport off."""
    there = Single(TransportConnectionError("wait", retry_after_seconds=asked))
    process = begin(there, retry_delay_seconds=1)
    process.write("a", 1)
    assert await process.run_dry() == [paused]


@pytest.mark.anyio
async def test_a_pause_that_is_too_long_for_a_float_is_bounded(begin: Begin) -> None:
    """A far side that sends a header of many digits is left alone as for any other."""
    asked = 10**400
    process = begin(Single(TransportError("wait", retry_after_seconds=asked)))
    process.write("a", 1)
    assert await process.run_dry() == [3600]


# What is refused.


@pytest.mark.anyio
async def test_an_event_that_is_refused_for_good_is_parked(begin: Begin, heard: Heard) -> None:
    """It is kept with what there is to say, counted, told, and holds back nothing."""
    process = begin(there := Single(REFUSED))
    process.write("a", 1, 2)
    await process.lane().step()
    lines = (process.base / "a/log.jsonl").read_bytes().splitlines()
    (parked,) = process.parked()
    assert orjson.dumps(parked["line"]) == lines[0]
    about = parked["rejected"]
    assert about.pop("time") > "2020"
    assert about == {
        "transport": NAME,
        "reason": "TransportRejectedError: too large",
        "id": parked["line"]["id"],
        "session_id": "a",
        "type": "note",
    }
    assert there.taken == [2]
    stats = process.lane().stats()
    assert (stats.rejected, stats.failed, stats.breaker) == (1, 0, "closed")
    assert heard == [(REFUSED, "there: rejected")]


@pytest.mark.anyio
async def test_the_reason_is_cut_short(begin: Begin) -> None:
    """No more than 500 characters of an error are kept."""
    process = begin(Single(TransportRejectedError("x" * 1000)))
    process.write("a", 1)
    await process.run_dry()
    assert len(process.parked()[0]["rejected"]["reason"]) == 500


@pytest.mark.anyio
async def test_an_event_that_fails_all_attempts_at_a_healthy_transport_is_parked(
    begin: Begin,
) -> None:
    """Where the far side is well and does not take one event, the next ones go on."""
    there = Single()
    there.errors[1] = OWN
    process = begin(there, max_retry_attempts=2)
    process.write("a", 1, 2)
    await process.run_dry()
    assert there.tried == [1, 1, 1, 2]
    assert process.parked()[0]["rejected"]["reason"] == "TransportError: this one is not liked"
    stats = process.lane().stats()
    assert (stats.sent, stats.failed, stats.retried, stats.rejected) == (1, 3, 2, 1)
    assert (stats.breaker, there.checks) == ("closed", 1)
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 2)}


@pytest.mark.anyio
async def test_no_retries_means_one_attempt(begin: Begin) -> None:
    """`max_retry_attempts=0` parks after the first failure."""
    process = begin(there := Single(OWN), max_retry_attempts=0)
    process.write("a", 1, 2)
    await process.lane().step()
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 1)}
    assert await process.run_dry() == []
    assert there.tried == [1, 2]
    assert (process.lane().stats().retried, process.lane().stats().rejected) == (0, 1)


@pytest.mark.anyio
async def test_the_failures_of_a_parked_event_are_not_the_transports(begin: Begin) -> None:
    """Once it is known whose fault it was, the next event does not wait for a probe."""
    process = begin(there := Single(OWN, OWN, OWN), max_retry_attempts=2, breaker_failures=3)
    process.write("a", 1, 2)
    assert await process.run_dry() == [1, 2]
    assert there.taken == [2]


@pytest.mark.anyio
async def test_nothing_is_parked_while_the_transport_is_not_well(begin: Begin) -> None:
    """After its last attempt the far side is asked; if it is not well, that is an outage."""
    there = Single()
    there.errors[1], there.well = OWN, False
    process = begin(there, max_retry_attempts=0)
    process.write("a", 1)
    await process.lane().step()
    assert process.lane().stats().breaker == "open"
    there.errors.clear()
    there.well = True
    await process.run_dry()
    assert (there.taken, process.parked()) == ([1], [])


@pytest.mark.anyio
async def test_an_event_that_times_out_is_never_parked(begin: Begin) -> None:
    """Whether it was taken is not known: so it is sent again for ever, and the others pass it."""
    there = Single()
    there.errors[1] = TransportTimeoutError("nothing heard")
    process = begin(there, max_retry_attempts=1, retry_max_delay_seconds=1)
    process.write("a", 1, 2)
    for n in range(10, 30):
        process.write("b", n)
        for _ in range(4):
            process.clock.now += await process.lane().step()
    assert there.tried.count(1) > 5
    assert there.taken == list(range(10, 30))
    assert (process.parked(), process.lane().stats().rejected) == ([], 0)


@pytest.mark.anyio
async def test_what_fails_in_an_outage_keeps_its_attempts(begin: Begin) -> None:
    """A time-out says nothing of the event: only what the far side says of it counts."""
    process = begin(there := Single(*[CONNECTION] * 9, OWN), max_retry_attempts=3)
    process.write("a", 1)
    await process.run_dry()
    assert (there.taken, process.parked()) == ([1], [])


@pytest.mark.anyio
async def test_what_an_unwell_far_side_refuses_keeps_its_attempts(begin: Begin) -> None:
    """Only what the far side says while it is well counts against an event."""
    there = Single(*[OWN] * 5)
    there.well = False
    process = begin(there, max_retry_attempts=3)
    process.write("a", 1)
    while there.answers:
        process.clock.now += await process.lane().step()
        # The last of them is answered after the far side has come back.
        there.well = len(there.answers) < 2
    await process.run_dry()
    assert (there.taken, process.parked()) == ([1], [])


@pytest.mark.anyio
@pytest.mark.parametrize("error", [REFUSED, OWN], ids=["refused", "out of attempts"])
async def test_nothing_is_acknowledged_that_cannot_be_parked(
    begin: Begin, error: Exception
) -> None:
    """While there is no room to keep a refused event, it is sent again, and kept once there is."""
    there = Single()
    there.errors[1] = error
    process = begin(there, max_retry_attempts=0, breaker_failures=100)
    process.write("a", 1, 2)
    in_the_way = process.base / ".eventlog" / "rejected"
    in_the_way.write_bytes(b"")
    for _ in range(6):
        process.clock.now += await process.lane().step()
    assert there.tried.count(1) > 1
    assert process.positions() == {"a/log.jsonl": 0}
    assert process.lane().stats().rejected == 0
    in_the_way.unlink()
    await process.run_dry()
    assert (len(process.parked()), set(there.taken)) == (1, {2})


@pytest.mark.anyio
async def test_a_full_disk_is_told(begin: Begin, heard: Heard) -> None:
    """Where a refused event cannot be kept, the error handler hears why."""
    process = begin(Single(REFUSED))
    process.write("a", 1)
    (process.base / ".eventlog" / "rejected").write_bytes(b"")
    await process.lane().step()
    assert heard.kinds == ["FileExistsError"]


@pytest.mark.anyio
async def test_a_full_disk_is_told_after_the_last_attempt(begin: Begin, heard: Heard) -> None:
    """Where an event without attempts cannot be kept, the error handler hears why."""
    process = begin(Single(OWN), max_retry_attempts=0)
    process.write("a", 1)
    (process.base / ".eventlog" / "rejected").write_bytes(b"")
    await process.lane().step()
    assert "FileExistsError" in heard.kinds


@pytest.mark.anyio
async def test_without_local_logging_what_is_refused_is_counted_only(begin: Begin) -> None:
    """Who wants no files gets none, not even of what is refused."""
    process = begin(there := Single(REFUSED), enable_local_logging=False)
    process.write("a", 1, 2)
    await process.run_dry()
    assert there.taken == [2]
    assert process.lane().stats().rejected == 1
    assert not process.base.exists()


@pytest.mark.anyio
async def test_what_is_refused_of_live_only_delivery_is_parked_too(begin: Begin) -> None:
    """Files in another format than `jsonl` are not read back, but what is refused is kept."""
    process = begin(Single(REFUSED), log_format="json")
    process.write("a", 1)
    await process.run_dry()
    assert [each["line"]["event"]["n"] for each in process.parked()] == [1]


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [Single, Together])
@pytest.mark.parametrize("place", [0, 1, 2])
async def test_a_line_that_is_no_json_is_parked_and_not_sent(
    begin: Begin, kind: type[Single], place: int
) -> None:
    """What somebody has damaged reaches no far side, holds back nothing, and is kept as text."""
    dead = begin(Single())
    dead.write("a", 1, 2)
    path = dead.base / "a/log.jsonl"
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join([*lines[:place], b'no "JSON"\n', *lines[place:]]))
    dead.die()
    process = begin(there := kind())
    await process.run_dry()
    assert there.taken == [1, 2]
    (parked,) = process.parked()
    assert parked["line"] == 'no "JSON"'
    assert parked["rejected"]["reason"].endswith("this line of the file cannot be read")
    assert process.lane().stats().rejected == 1


def leave(process: Process, **files: bytes) -> None:
    """Have a process die with these files of its sessions; each `#` stands for the next event."""
    for n, (session, text) in enumerate(files.items()):
        path = process.base / f"{session}/log.jsonl"
        process.write(session, *range(n * 10 + 1, n * 10 + 1 + text.count(b"#")))
        lines = iter(path.read_bytes().splitlines())
        path.write_bytes(
            b"".join((next(lines) if line == b"#" else line) + b"\n" for line in text.split())
        )
    process.die()


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [Single, Together])
async def test_lines_that_are_no_json_do_not_shift_the_answers(
    begin: Begin, kind: type[Single]
) -> None:
    """Each event has its own outcome, however many lines between them are not sent."""
    leave(begin(Single()), a=b"bad bad # bad bad # bad")
    there = kind()
    there.errors[2] = REFUSED
    process = begin(there)
    await process.lane().step()
    assert there.taken == [1]
    texts = [each["line"] for each in process.parked()]
    assert texts[:4] + texts[5:] == ["bad"] * 5
    assert texts[4]["event"]["n"] == 2


@pytest.mark.anyio
async def test_a_line_that_is_no_json_is_not_taken_for_one_that_had_no_turn(begin: Begin) -> None:
    """Where an attempt fails, nothing behind it is decided: neither sent nor parked."""
    leave(begin(Single()), a=b"#", b=b"# bad")
    process = begin(there := Single(OWN))
    await process.lane().step()
    assert (there.tried, process.parked()) == ([1], [])
    await process.run_dry()
    assert sorted(there.taken) == [1, 11]
    assert [each["line"] for each in process.parked()] == ["bad"]


@pytest.mark.anyio
async def test_a_batch_of_nothing_readable_is_not_sent(begin: Begin) -> None:
    """`send_batch` is never called with an empty batch."""
    dead = begin(Single())
    dead.write("a", 1)
    (dead.base / "a/log.jsonl").write_bytes(b"one\ntwo\n")
    dead.die()
    process = begin(there := Together())
    await process.run_dry()
    assert there.batches == []
    assert [each["line"] for each in process.parked()] == ["one", "two"]


@pytest.mark.anyio
async def test_a_line_that_is_no_json_waits_for_those_before_it(begin: Begin) -> None:
    """It is parked in its turn: what is before it and fails stays before it."""
    leave(begin(Single()), a=b"# bad")
    process = begin(Single(OWN))
    await process.lane().step()
    assert process.parked() == []
    await process.run_dry()
    assert len(process.parked()) == 1


@pytest.mark.anyio
async def test_a_line_that_is_no_json_says_nothing_of_the_far_side(begin: Begin) -> None:
    """In an outage damaged lines do not keep the breaker from opening."""
    leave(begin(Single()), a=b"bad #", b=b"bad #", c=b"bad #", d=b"bad #")
    process = begin(Together(*[CONNECTION] * 8), batch_events=2, breaker_failures=2)
    for _ in range(8):
        process.clock.now += await process.lane().step()
    assert process.lane().stats().breaker == "open"


@pytest.mark.anyio
async def test_a_connection_that_breaks_under_many_sessions_is_one_failure(begin: Begin) -> None:
    """One error that befell several events is told and counted once, and asks for health once."""
    process = begin(there := Together(*[[None, *[CONNECTION] * 4]] * 2), max_retry_attempts=0)
    for n, session in enumerate("abcde"):
        process.write(session, n)
    await process.lane().step()
    stats = process.lane().stats()
    assert (stats.sent, stats.failed, stats.breaker) == (1, 1, "closed")
    assert there.checks == 1


@pytest.mark.anyio
async def test_after_a_broken_connection_events_go_one_by_one(begin: Begin) -> None:
    """If it is one of them that breaks it, the others get past."""
    process = begin(there := Together([None, *[CONNECTION] * 3]), breaker_failures=9)
    for n, session in enumerate("abcd"):
        process.write(session, n)
    await process.run_dry()
    assert [len(batch) for batch in there.batches[:3]] == [4, 1, 2]


# The breaker.


@pytest.mark.anyio
async def test_an_open_breaker_asks_for_health_and_sends_nothing(
    begin: Begin, clock: Clock
) -> None:
    """After failures in a row only health checks go out, one in a pause, until one says yes."""
    there = Single(CONNECTION, CONNECTION)
    there.well = False
    process = begin(there, breaker_failures=2, max_retry_attempts=9, retry_delay_seconds=0)
    process.write("a", 1)
    lane = process.lane()
    assert [await lane.step() for _ in range(3)] == [0, 0, 30]
    assert (there.tried, there.checks) == ([1, 1], 0)
    for checks in (1, 2, 3):
        clock.now += 30
        assert [await lane.step() for _ in range(2)] == [0, 30]
        assert there.checks == checks
    assert there.tried == [1, 1]
    there.well = True
    clock.now += 30
    await lane.step()
    assert (there.taken, lane.stats().breaker) == ([1], "closed")


@pytest.mark.anyio
async def test_recovery_is_no_storm(begin: Begin) -> None:
    """A far side that has come back gets one event, then two, then four."""
    there = Together(CONNECTION)
    process = begin(there, breaker_failures=1, batch_events=8)
    for n in range(4):
        process.write(f"s{n}", *range(n * 5, n * 5 + 5))
    await process.run_dry()
    assert [len(batch) for batch in there.batches] == [8, 1, 2, 4, 8, 5]
    assert there.checks == 1


@pytest.mark.anyio
async def test_a_probe_that_fails_opens_the_breaker_again(begin: Begin) -> None:
    """Where health is claimed but the send fails, one attempt is made for each pause."""
    there = Single(*[CONNECTION] * 4)
    process = begin(there, breaker_failures=1, max_retry_attempts=9, retry_delay_seconds=0)
    process.write("a", 1)
    assert await process.run_dry() == [30] * 4
    assert (there.tried, there.checks) == ([1] * 5, 4)


@pytest.mark.anyio
async def test_a_probe_with_nothing_to_send_closes_the_breaker(begin: Begin, clock: Clock) -> None:
    """Where all was decided meanwhile, the health check is enough."""
    process = begin(there := Single())
    process.lane()._breaker.trip(clock.now)
    assert await process.lane().step() == 30
    assert process.lane().deaf
    clock.now += 30
    await process.lane().step()
    assert (process.lane().stats().breaker, there.checks) == ("closed", 1)


@pytest.mark.anyio
@pytest.mark.parametrize("well", [None, RuntimeError("bad"), SystemExit()], ids=repr)
async def test_an_outage_goes_on_while_health_cannot_be_told(
    begin: Begin, clock: Clock, well: Any
) -> None:
    """A health check that raises or says nothing is a no."""

    class Unsure(Single):
        async def health_check(self) -> bool:
            found: Any = await super().health_check()
            if isinstance(found, BaseException):
                raise found
            return found  # type: ignore[no-any-return]

    there = Unsure(CONNECTION)
    there.well = well
    process = begin(there, breaker_failures=1)
    process.write("a", 1)
    for _ in range(8):
        clock.now += await process.lane().step()
    assert (there.tried, process.lane().stats().breaker) == ([1], "open")
    there.well = True
    await process.run_dry()
    assert there.taken == [1]


@pytest.mark.anyio
async def test_an_outage_costs_no_event(begin: Begin, clock: Clock) -> None:
    """While the far side is down events wait, beyond all retries, and go out in order after."""
    there = FailingTransport.down()
    process = begin(there, max_retry_attempts=1, breaker_failures=3)
    for n in range(20):
        process.write(f"s{n % 3}", n)
        clock.now += await process.lane("down").step()
    stats = process.lane("down").stats()
    assert (stats.lag_events, stats.state, stats.breaker) == (20, "behind", "open")
    there.recover()
    await process.run_dry("down")
    found = [event["n"] for event in there.events]
    assert sorted(found) == list(range(20))
    for rest in range(3):
        assert [n for n in found if n % 3 == rest] == list(range(rest, 20, 3))
    stats = process.lane("down").stats()
    assert (stats.rejected, stats.dropped, stats.breaker) == (0, 0, "closed")


@pytest.mark.anyio
async def test_after_an_outage_no_session_waits_for_its_own_pause(begin: Begin) -> None:
    """The pauses of single sessions are over once the transport has recovered."""
    there = Single(OWN, CONNECTION)
    process = begin(there, breaker_failures=2, retry_delay_seconds=59, breaker_reset_seconds=1)
    process.write("a", 1)
    process.write("b", 2)
    lane = process.lane()
    assert [await lane.step() for _ in range(3)] == [0, 0, 1]
    process.clock.now += 1
    assert [await lane.step() for _ in range(2)] == [0, 0]
    assert sorted(there.taken) == [1, 2]


@pytest.mark.anyio
async def test_a_transport_recovers_with_batches_that_wait_for_their_age(begin: Begin) -> None:
    """`batch_seconds` and an outage together end in delivery, too."""
    process = begin(there := Together(CONNECTION), breaker_failures=1, batch_seconds=5)
    process.write("a", 1)
    await process.run_dry()
    assert there.taken == [1]


@pytest.mark.anyio
async def test_a_probe_that_breaks_down_is_not_the_last_one(begin: Begin, clock: Clock) -> None:
    """A defect that ends a step in the middle of a probe does not switch the transport off."""

    class Odd:
        def __repr__(self) -> str:
            raise ValueError

    process = begin(there := Single(CONNECTION, Odd()), breaker_failures=1)
    process.write("a", 1)
    lane = process.lane()
    await lane.step()
    clock.now += 30
    with pytest.raises(ValueError, match=r"^$"):
        await lane.step()
    lane.recover()
    await process.run_dry()
    assert there.taken == [1]


@pytest.mark.anyio
async def test_a_lane_is_cancelled_during_a_health_check(begin: Begin, clock: Clock) -> None:
    """Our own cancellation gets out of a probe, which leaves room for the next one."""

    class Hangs(Single):
        async def health_check(self) -> bool:
            self.checks += 1
            if self.checks == 1:
                await anyio.sleep_forever()
            return True

    process = begin(there := Hangs(CONNECTION), breaker_failures=1)
    process.write("a", 1)
    lane = process.lane()
    await lane.step()
    clock.now += 30
    async with anyio.create_task_group() as group:
        group.start_soon(lane.step)
        await wait_until(lambda: there.checks)
        lane.cancelled = True
        group.cancel_scope.cancel()
    assert lane.stats().breaker == "open"
    await lane.step()
    assert there.taken == [1]


# How far it is.


@pytest.mark.anyio
async def test_what_is_sent_is_saved(begin: Begin) -> None:
    """After each batch the database says up to which byte of each file all is done with."""
    process = begin(Together(), batch_events=3)
    process.write("a", 1, 2, 3, 4)
    assert process.positions() == {"a/log.jsonl": 0}
    await process.lane().step()
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 3)}
    await process.lane().step()
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 4)}


@pytest.mark.anyio
@pytest.mark.parametrize("error", [OWN, CONNECTION])
async def test_what_is_saved_stops_before_what_failed(begin: Begin, error: Exception) -> None:
    """Neither what failed nor what came after it is ever past."""
    process = begin(Together([None, None, error, None, REFUSED, None]))
    process.write("a", 1, 2, 3, 4, 5, 6)
    await process.lane().step()
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 2)}


@pytest.mark.anyio
async def test_what_is_saved_stops_before_an_earlier_stretch_of_the_file(begin: Begin) -> None:
    """Where a transport missed a part of a file, its position is that of what comes first."""
    process = begin(there := Single(OWN))
    process.write("a", 1)
    process.write("a", 2, then=lambda written: None)
    process.write("a", 3)
    await process.lane().step()
    assert process.positions() == {"a/log.jsonl": 0}
    await process.run_dry()
    assert there.taken == [1, 3]
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 3)}


@pytest.mark.anyio
async def test_what_cannot_be_saved_is_made_up_for(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process has the database, delivery goes on; later it is saved how far."""
    for name, seconds in (("BUSY_SECONDS", 0.01), ("RETRY_SECONDS", 0.0)):
        monkeypatch.setattr(_outbox, name, seconds)
    process = begin(there := Single())
    process.write("a", 1)
    process.write("b", 2)
    path = process.base / ".eventlog" / "delivery.sqlite3"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await process.lane().step()
        assert there.taken == [1, 2]
        assert process.positions() == {"a/log.jsonl": 0, "b/log.jsonl": 0}
        other.execute("ROLLBACK")
    await process.lane().step()
    assert process.positions() == {
        "a/log.jsonl": process.end("a/log.jsonl", 1),
        "b/log.jsonl": process.end("b/log.jsonl", 1),
    }


@pytest.mark.anyio
async def test_what_a_lost_database_had_is_saved_again(
    begin: Begin, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the database is deleted under the process, what it still owes is entered anew."""
    monkeypatch.setattr(_outbox, "RETRY_SECONDS", 0.0)
    process = begin(Together([None, TransportError("wait", retry_after_seconds=1000)]))
    process.write("a", 1, 2)
    await process.lane().step()
    for path in (process.base / ".eventlog").glob("delivery.sqlite3*"):
        path.unlink()
    clock.now += _sender.TEND_SECONDS
    assert await process.lane().step() == 1000 - _sender.TEND_SECONDS
    clock.now += _sender.RETRY_SECONDS
    await process.lane().step()
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 1)}


@pytest.mark.anyio
async def test_how_far_an_adopted_file_is_sent_is_saved(begin: Begin) -> None:
    """A kill does not cost more than a batch again, whoever has written the file."""
    leave(begin(Single()), a=b"# # #")
    process = begin(Together(), batch_events=2)
    await process.lane().step()
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 2)}


@pytest.mark.anyio
async def test_what_the_callback_took_is_saved_at_the_end(begin: Begin) -> None:
    """What was decided after the last step is not sent by the next process."""
    process, found = begin(Single()), list[Written]()
    process.write("a", 1, 2, then=lambda w: found.append(process.delivery.send(w, undecided=True)))
    process.delivery.decide(found[0], 0, taken=True)
    process.close()
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 1)}


@pytest.mark.anyio
async def test_what_is_saved_is_not_saved_again_for_nothing(begin: Begin, clock: Clock) -> None:
    """As long as the database is well, a look for what others left writes nothing."""
    process = begin(Single(*[OWN] * 9), max_retry_attempts=9, retry_delay_seconds=1000)
    process.write("a", 1)
    await process.lane().step()
    await process.lane().step()
    path = process.base / ".eventlog" / "delivery.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as database:
        before = database.execute("PRAGMA data_version").fetchone()
        clock.now += _sender.TEND_SECONDS
        await process.lane().step()
        assert database.execute("PRAGMA data_version").fetchone() == before


# What dead processes left.


@pytest.mark.anyio
async def test_files_of_a_dead_process_come_before_the_sessions_newer_one(begin: Begin) -> None:
    """Who goes on with a session sends what is left of it first, in order, and nothing twice."""
    dead = begin(Together(True), batch_events=2)
    dead.write("a", 1, 2, 3)
    await dead.lane().step()
    dead.die()
    dead = begin(Single())
    dead.write("a", 4)
    dead.die()
    process = begin(there := Single())
    process.write("a", 5)
    await process.run_dry()
    assert there.taken == [3, 4, 5]
    assert len(process.positions()) == 1


@pytest.mark.anyio
async def test_sessions_that_do_not_go_on_are_adopted(begin: Begin) -> None:
    """What a dead process left is sent without an event of the living one, and its rows go."""
    dead = begin(Single())
    dead.write("a", 1)
    dead.write("b", 2)
    dead.die()
    process = begin(there := Single())
    await process.run_dry()
    assert there.taken == [1, 2]
    assert process.positions() == {}


@pytest.mark.anyio
async def test_files_of_the_living_are_left_alone(begin: Begin) -> None:
    """Two processes on one base directory send their own files only, until one of them dies."""
    other = begin(Single())
    other.write("a", 1)
    process = begin(there := Single())
    await process.run_dry()
    other.die()
    process.clock.now += _sender.TEND_SECONDS - 1
    await process.run_dry()
    assert there.taken == []
    process.clock.now += 1
    await process.run_dry()
    assert there.taken == [1]


@pytest.mark.anyio
async def test_what_others_had_sent_to_the_end_needs_no_well_transport(begin: Begin) -> None:
    """Rows in which nothing is left go even where nothing can be sent now."""
    other = begin(Single())
    other.write("a", 1)
    await other.run_dry()
    process = begin(Single(TransportError("wait", retry_after_seconds=1000)))
    process.write("b", 2)
    await process.lane().step()
    other.die()
    process.clock.now += _sender.TEND_SECONDS
    await process.lane().step()
    assert process.positions() == {"b/log.jsonl": 0}


@pytest.mark.anyio
async def test_a_file_that_we_write_is_not_adopted(begin: Begin) -> None:
    """A row that has lost its owner is not taken for a dead process's file."""
    process = begin(there := Single())
    process.write("a", 1)
    await process.run_dry()
    path = process.base / ".eventlog" / "delivery.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE acked SET owner = '', position = 0")
        database.commit()
    process.clock.now += _sender.TEND_SECONDS
    await process.run_dry()
    assert there.taken == [1]


@pytest.mark.anyio
async def test_a_file_that_is_gone_is_told(begin: Begin, heard: Heard) -> None:
    """What somebody has deleted cannot be sent: that is said once, and the rest goes on."""
    dead = begin(Single())
    dead.write("a", 1)
    dead.write("b", 2)
    (dead.base / "a/log.jsonl").unlink()
    dead.die()
    process = begin(there := Single())
    await process.run_dry()
    assert there.taken == [2]
    assert [str(error) for error, _ in heard] == [
        "a/log.jsonl is gone or cut: what was left is not sent"
    ]
    assert process.positions() == {}


@pytest.mark.anyio
async def test_a_file_that_cannot_be_read_is_told_and_tried_again(
    begin: Begin, heard: Heard
) -> None:
    """A fault of the disk costs no event once it is over; its row stays meanwhile."""
    dead = begin(Single())
    dead.write("a", 1)
    dead.die()
    path = dead.base / "a/log.jsonl"
    path.rename(dead.base / "a/elsewhere")
    path.symlink_to("elsewhere")
    process = begin(there := Single())
    await process.run_dry()
    assert (there.taken, len(process.positions())) == ([], 1)
    assert [context for _, context in heard] == ["there: reading a/log.jsonl"]
    path.unlink()
    (dead.base / "a/elsewhere").rename(path)
    process.clock.now += _sender.TEND_SECONDS
    await process.run_dry()
    assert (there.taken, process.positions()) == ([1], {})


@pytest.mark.anyio
async def test_what_could_not_be_read_is_left_to_the_next_process(begin: Begin) -> None:
    """A process that ends before a fault is over keeps the row of the file that has it."""
    dead = begin(Single())
    dead.write("a", 1)
    dead.die()
    path = dead.base / "a/log.jsonl"
    path.rename(dead.base / "a/elsewhere")
    path.symlink_to("elsewhere")
    process = begin(Single())
    await process.run_dry()
    process.close()
    path.unlink()
    (dead.base / "a/elsewhere").rename(path)
    process = begin(there := Single())
    await process.run_dry()
    assert there.taken == [1]


@pytest.mark.anyio
async def test_what_could_not_be_read_is_left_to_a_new_transport_too(begin: Begin) -> None:
    """A fault of the disk costs no event where the transport is replaced before it is over."""
    leave(begin(Single()), a=b"#")
    process = begin(Single())
    path = process.base / "a/log.jsonl"
    path.rename(process.base / "a/elsewhere")
    path.symlink_to("elsewhere")
    await process.run_dry()
    before = process.lane()
    process.use(Single())
    await before.run(grace)
    await process.run_dry()
    process.close()
    path.unlink()
    (process.base / "a/elsewhere").rename(path)
    process = begin(there := Single())
    await process.run_dry()
    assert there.taken == [1]


@pytest.fixture
def two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files adopted in twos."""
    monkeypatch.setattr(_outbox, "CHUNK_ROWS", 2)
    monkeypatch.setattr(_sender, "CHUNK_ROWS", 2)


@pytest.mark.anyio
@pytest.mark.usefixtures("two_at_once")
async def test_many_files_come_in_chunks(begin: Begin) -> None:
    """However much dead processes left, no more than a chunk of it is in memory at once."""
    dead = begin(Single())
    for n in range(7):
        dead.write(f"s{n}", n)
    dead.die()
    process = begin(there := Together(), batch_events=1)
    most = 0
    while len(there.taken) < 7:
        assert await process.lane().step() == 0
        most = max(most, process.lane().backlog.sessions)
    assert there.taken == list(range(7))
    assert most <= 2


@pytest.mark.anyio
@pytest.mark.usefixtures("two_at_once")
async def test_a_chunk_in_which_nothing_is_left_is_followed_by_the_next(begin: Begin) -> None:
    """Many files that were sent to their end do not hold up the one that was not."""
    dead = begin(there := Single())
    for n in range(7):
        dead.write(f"s{n}", n)
    await dead.run_dry()
    dead.write("s6", 7)
    dead.die()
    process = begin(there := Single())
    assert sum([await process.lane().step() for _ in range(4)]) == 0
    assert there.taken == [7]


@pytest.mark.anyio
@pytest.mark.usefixtures("two_at_once")
async def test_a_chunk_that_has_to_wait_is_waited_for(begin: Begin) -> None:
    """While a chunk's sessions are held back the lane sleeps, though there are more files."""
    leave(begin(Single()), a=b"#", b=b"#", c=b"#")
    process = begin(there := Together([OWN, OWN]), retry_delay_seconds=7)
    assert [await process.lane().step() for _ in range(2)] == [0, 7]
    await process.run_dry()
    assert sorted(there.taken) == [1, 11, 21]


@pytest.mark.anyio
async def test_nothing_is_given_up_while_the_base_directory_is_away(
    begin: Begin, heard: Heard
) -> None:
    """A disk that is not mounted for a moment is no reason to take its files for deleted."""
    leave(begin(Single()), a=b"#")
    process = begin(there := Single())
    outbox = process.delivery.outbox
    assert outbox is not None
    (owed,) = outbox.adopt(NAME, [NAME])
    away = process.base.rename(process.base.parent / "away")
    assert process.lane().owe(outbox, owed) == 0
    assert heard.kinds == ["FileNotFoundError"]
    away.rename(process.base)
    await process.run_dry()
    assert there.taken == [1]


@pytest.mark.anyio
async def test_a_lane_that_ends_adopts_nothing(begin: Begin) -> None:
    """Who is about to go does not take over the work of others."""
    dead = begin(Single())
    dead.write("a", 1)
    dead.die()
    process = begin(there := Single())
    process.lane().ending = True
    await process.lane().run(grace)
    assert there.taken == []


@pytest.mark.anyio
async def test_a_database_that_failed_is_asked_again_soon(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it cannot be asked what is left, the next look is not half a minute away."""
    monkeypatch.setattr(_outbox, "BUSY_SECONDS", 0.01)
    dead = begin(Single())
    dead.write("a", 1)
    dead.die()
    process = begin(there := Single())
    path = process.base / ".eventlog" / "delivery.sqlite3"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert await process.lane().step() == _outbox.RETRY_SECONDS
    monkeypatch.setattr(process.delivery.outbox, "_retry_at", 0.0)
    process.clock.now += _outbox.RETRY_SECONDS
    await process.run_dry()
    assert there.taken == [1]


# Sent again on demand.


@pytest.mark.anyio
async def test_what_was_refused_is_sent_again_with_the_very_same_line(begin: Begin) -> None:
    """Parked events reach a far side that takes them now as they were; then their file goes."""
    process = begin(there := Single(REFUSED, REFUSED))
    process.write("a", 1, 2, 3)
    process.write("b", 4)
    await process.run_dry()
    assert there.taken == [3, 4]
    assert process.lane().resend() == 2
    await process.run_dry()
    assert there.taken == [3, 4, 1, 2]
    lines = (process.base / "a/log.jsonl").read_bytes().splitlines()
    assert [line for line, _ in there.sent[2:]] == lines[:2]
    assert [metadata["session_id"] for _, metadata in there.sent] == ["a", "b", "a", "a"]
    assert list((process.base / ".eventlog" / "rejected").iterdir()) == []
    assert set(process.positions()) == {"a/log.jsonl", "b/log.jsonl"}


@pytest.mark.anyio
async def test_what_is_refused_again_is_parked_again(begin: Begin) -> None:
    """It may be sent again as often as somebody likes, and is never lost."""
    there = Single()
    there.errors[1] = REFUSED
    process = begin(there)
    process.write("a", 1)
    await process.run_dry()
    first = process.parked()[0]["line"]
    for _ in range(3):
        assert process.lane().resend() == 1
        await process.run_dry()
        assert [each["line"] for each in process.parked()] == [first]
    assert len(list((process.base / ".eventlog" / "rejected").iterdir())) == 1
    assert process.lane().stats().rejected == 4


@pytest.mark.anyio
async def test_what_is_being_sent_again_is_not_begun_anew(begin: Begin) -> None:
    """Asking once more while it is under way adds nothing, and loses no position."""
    process = begin(there := Together([REFUSED] * 3), batch_events=3)
    process.write("a", 1, 2, 3)
    await process.run_dry()
    there.answers.append([None, OWN, OWN])
    assert process.lane().resend() == 3
    await process.lane().step()
    saved = process.positions()
    assert process.lane().resend() == 0
    assert process.positions() == saved
    await process.run_dry()
    assert there.taken == [1, 2, 3]


@pytest.mark.anyio
async def test_what_is_sent_again_is_deleted_after_that_is_saved(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file stays as long as a row may ask for it."""
    for name, seconds in (("BUSY_SECONDS", 0.01), ("RETRY_SECONDS", 0.0)):
        monkeypatch.setattr(_outbox, name, seconds)
    process = begin(there := Single(REFUSED))
    process.write("a", 1)
    await process.run_dry()
    process.lane().resend()
    path = process.base / ".eventlog" / "delivery.sqlite3"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await process.lane().step()
        assert there.taken == [1]
        assert len(list((process.base / ".eventlog" / "rejected").iterdir())) == 1
        other.execute("ROLLBACK")
    await process.lane().step()
    assert list((process.base / ".eventlog" / "rejected").iterdir()) == []


@pytest.mark.anyio
async def test_what_was_being_sent_again_is_adopted(begin: Begin) -> None:
    """A kill does not cost what somebody had asked to be sent again."""
    dead = begin(Single(REFUSED))
    dead.write("a", 1)
    await dead.run_dry()
    assert dead.lane().resend() == 1
    dead.die()
    process = begin(there := Single())
    await process.run_dry()
    assert there.taken == [1]
    assert list((process.base / ".eventlog" / "rejected").iterdir()) == []


@pytest.mark.anyio
@pytest.mark.parametrize("options", [{}, {"log_format": "json"}])
async def test_there_may_be_nothing_to_send_again(begin: Begin, options: dict[str, Any]) -> None:
    """Without refused events, or without files that are read back, nothing happens."""
    process = begin(there := Single(), **options)
    process.write("a", 1)
    await process.run_dry()
    assert process.lane().resend() == 0
    await process.run_dry()
    assert there.taken == [1]


@pytest.mark.anyio
async def test_what_cannot_be_read_stays_as_it_is_however_often_it_is_sent_again(
    begin: Begin,
) -> None:
    """A damaged line is parked again with the very same text."""
    dead = begin(Single())
    dead.write("a", 1)
    (dead.base / "a/log.jsonl").write_bytes(b'no "JSON"\n')
    dead.die()
    process = begin(Single())
    await process.run_dry()
    process.lane().resend()
    await process.run_dry()
    assert [each["line"] for each in process.parked()] == ['no "JSON"']


# Another transport of the same name.


@pytest.mark.anyio
async def test_a_new_transport_waits_for_the_batch_in_hand(begin: Begin) -> None:
    """Who takes over a name begins once the one before has ended, where that one stopped."""
    old, new = GatedTransport(NAME), Single()
    process = begin(old)
    process.write("a", 1)
    before = process.lane()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(before.run, grace)
            await wait_until(lambda: old.arrived)
            process.write("a", 2)
            process.use(new)
            group.start_soon(process.lane().step)
            await anyio.wait_all_tasks_blocked()
            assert new.tried == []
            old.open()
    await process.run_dry()
    assert ([event["n"] for event in old.events], new.taken) == ([1], [2])
    assert old.closed
    assert process.lane().stats().sent == 2


class Stubborn(GatedTransport):
    """Does not let itself be cancelled."""

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Remember the event once the gate is open, not before."""
        with anyio.CancelScope(shield=True):
            return await super().send(event, metadata)


@pytest.mark.anyio
async def test_a_new_transport_does_not_wait_for_one_that_hangs(begin: Begin, heard: Heard) -> None:
    """After the time of an attempt its batch is sent again, and what it then says is ignored."""
    old, new = Stubborn(NAME), Single()
    process = begin(old, send_timeout_seconds=0.01, batch_events=1)
    process.write("a", 1, 2, 3)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(process.lane().run, grace)
            await wait_until(lambda: old.arrived)
            process.use(new)
            await process.lane().step()
            assert new.taken == [1]
            old.open()
    await process.run_dry()
    assert new.taken == [1, 2, 3]
    assert process.lane().stats().sent == 3
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 3)}
    assert heard == []


@pytest.mark.anyio
async def test_a_new_transport_gets_what_is_in_memory_only(begin: Begin) -> None:
    """Without files, what the one before has not sent is not lost with it."""
    process = begin(Single(), enable_local_logging=False, batch_events=1)
    process.write("a", 1, 2)
    before = process.lane()
    process.use(there := Single())
    await before.run(grace)
    await process.run_dry()
    assert [n for one in (before.transport, there) for n in one.taken] == [1, 2]
    assert process.lane().stats().dropped == 0


@pytest.mark.anyio
async def test_one_that_has_ended_takes_nothing_from_the_new_one(begin: Begin) -> None:
    """Who comes back has the events to itself: the end of the one before is over."""
    process = begin(Single(), enable_local_logging=False)
    before = process.lane()
    process.use()
    await before.run(grace)
    process.use(there := Single())
    await process.lane().step()
    process.write("a", 1)
    before.abandon()
    await process.run_dry()
    assert (there.taken, process.lane().stats().dropped) == ([1], 0)


class Unwell(Single):
    """Takes nothing, and thinks long about its health."""

    def __init__(self, healthy: bool) -> None:
        super().__init__()
        self.healthy = healthy
        self.go_on = anyio.Event()

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Refuse."""
        self.tried.append(number(event))
        return False

    async def health_check(self) -> bool:
        """Answer when the test says so, not before."""
        self.checks += 1
        with anyio.CancelScope(shield=True):
            await self.go_on.wait()
        return self.healthy


@pytest.mark.anyio
async def test_one_that_hangs_in_its_health_check_costs_no_event(begin: Begin) -> None:
    """What an ignored transport would have parked is not taken off what is left for the new one."""
    old, new = Unwell(healthy=True), Single()
    process = begin(old, max_retry_attempts=0, send_timeout_seconds=0.01, batch_events=1)
    process.write("a", 1, 2, 3)
    async with anyio.create_task_group() as group:
        group.start_soon(process.lane().step)
        await wait_until(lambda: old.checks)
        process.use(new)
        await process.lane().step()
        assert new.taken == [1]
        old.go_on.set()
    await process.run_dry()
    assert new.taken == [1, 2, 3]


@pytest.mark.anyio
async def test_one_that_is_unwell_does_not_disturb_the_new_ones_batch(begin: Begin) -> None:
    """What an ignored transport says of a session does not concern the batch of the new one."""
    old, inside, go_on = Unwell(healthy=False), anyio.Event(), anyio.Event()

    class New(Single):
        async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
            inside.set()
            with anyio.CancelScope(shield=True):
                await go_on.wait()
            return await super().send(event, metadata)

    new, errors = New(), list[Exception]()
    process = begin(old, max_retry_attempts=0, send_timeout_seconds=0.01)
    process.write("a", 1)

    async def step() -> None:
        try:
            await process.lane().step()
        except Exception as error:
            errors.append(error)

    async with anyio.create_task_group() as group:
        before = process.lane()
        group.start_soon(before.step)
        await wait_until(lambda: old.checks)
        process.use(new)
        group.start_soon(step)
        await inside.wait()
        old.go_on.set()
        await anyio.wait_all_tasks_blocked()
        go_on.set()
    for error in errors:
        raise error
    await process.run_dry()
    assert new.taken == [1]


@pytest.mark.anyio
@pytest.mark.parametrize("healthy", [True, False])
async def test_one_that_hangs_in_its_probe_sends_nothing_any_more(
    begin: Begin, clock: Clock, healthy: bool
) -> None:
    """A far side that answers a health check too late is not sent what another one has."""
    old, new = Unwell(healthy), Single()
    process = begin(old, send_timeout_seconds=0.01)
    process.lane()._breaker.trip(clock.now - 30)
    process.write("a", 1)
    async with anyio.create_task_group() as group:
        group.start_soon(process.lane().step)
        await wait_until(lambda: old.checks)
        process.use(new)
        await process.lane().step()
        process.write("a", 2)
        old.go_on.set()
    await process.run_dry()
    assert (old.tried, new.taken) == ([], [1, 2])


@pytest.mark.anyio
async def test_one_that_is_unwell_does_not_break_the_new_lane(begin: Begin) -> None:
    """What an ignored transport says of a session that is sent meanwhile is nothing."""
    old, new = Unwell(healthy=False), Single()
    process = begin(old, max_retry_attempts=0, send_timeout_seconds=0.01)
    process.write("a", 1)
    async with anyio.create_task_group() as group:
        group.start_soon(process.lane().step)
        await wait_until(lambda: old.checks)
        process.use(new)
        await process.run_dry()
        old.go_on.set()
    process.write("b", 2)
    process.clock.now += 1000
    await process.run_dry()
    assert new.taken == [1, 2]


@pytest.mark.anyio
async def test_the_figures_never_go_back(begin: Begin) -> None:
    """What a name has sent is told without a gap while one transport takes over from another."""
    process = begin(Single())
    process.write("a", 1)
    await process.run_dry()
    process.use(Single())
    assert process.lane().stats().sent == 1


@pytest.mark.anyio
async def test_a_name_may_change_hands_without_end(begin: Begin) -> None:
    """An application that renews its transport each hour goes on doing so for years."""
    process = begin(Single())
    for _ in range(1100):
        process.lane().ended = True
        process.use(Single())
        await process.lane().step()
    assert process.lane().stats().sent == 0


@pytest.mark.anyio
async def test_a_transport_that_was_replaced_is_let_go(begin: Begin) -> None:
    """Once it has ended, nothing of ours keeps a transport in memory."""
    process = begin(Single())
    gone = weakref.ref(process.lane().transport)
    before = process.lane()
    process.use(Single())
    await before.run(grace)
    await process.lane().step()
    process.delivery._parting.clear()
    del before
    gc.collect()
    assert gone() is None


@pytest.mark.anyio
async def test_a_decision_while_a_transport_is_away_is_not_missed(begin: Begin) -> None:
    """Who comes back sends what the callback has refused meanwhile."""
    process, found = begin(there := Single()), list[Written]()
    process.write("a", 1, then=lambda w: found.append(process.delivery.send(w, undecided=True)))
    before = process.lane()
    process.use()
    await before.run(grace)
    process.delivery.decide(found[0], 0, taken=False)
    process.use(there)
    await process.lane().step()
    await process.lane().step()
    assert there.taken == [1]


@pytest.mark.anyio
async def test_a_transport_that_comes_back_goes_on_where_it_stopped(begin: Begin) -> None:
    """Taken away and given back before it has ended, it sends what was left, once."""
    process = begin(there := Single(OWN))
    process.write("a", 1)
    before = process.lane()
    await before.step()
    process.use()
    process.use(there)
    with anyio.fail_after(30):
        await before.run(grace)
    process.write("a", 2)
    await process.run_dry()
    assert there.tried == [1, 1, 2]


@pytest.mark.anyio
async def test_a_transport_that_comes_back_after_its_end_goes_on_too(begin: Begin) -> None:
    """What it left when it ended stays this process's, for one of that name."""
    process = begin(FailingTransport(name=NAME), breaker_failures=1)
    process.write("a", 1)
    before = process.lane()
    process.use()
    with anyio.fail_after(30):
        await before.run(grace)
    assert before.ended
    process.use(there := Single())
    await process.run_dry()
    assert there.taken == [1]


# Its end.


@pytest.mark.anyio
async def test_a_lane_that_ends_sends_what_is_left_and_closes(begin: Begin) -> None:
    """Events that were written before the end are sent before the close."""
    process = begin(there := Single())
    process.write("a", 1, 2, 3)
    process.lane().ending = True
    with anyio.fail_after(30):
        await process.lane().run(grace)
    assert (there.taken, there.closed) == ([1, 2, 3], True)
    assert not process.lane().stats().connected


@pytest.mark.anyio
async def test_an_outage_does_not_hold_up_the_end(begin: Begin) -> None:
    """A lane that ends while its far side is down leaves the rest in the files, and closes."""
    process = begin(there := FailingTransport.down(), breaker_failures=1)
    process.write("a", 1, 2)
    process.lane("down").ending = True
    with anyio.fail_after(30):
        await process.lane("down").run(grace)
    assert there.closed
    assert process.positions("down") == {"a/log.jsonl": 0}
    process.close()
    there = FailingTransport.down()
    there.recover()
    process = begin(there)
    await process.run_dry("down")
    assert [event["n"] for event in there.events] == [1, 2]


@pytest.mark.anyio
async def test_a_lane_is_finished_when_nothing_more_can_be_done(begin: Begin, clock: Clock) -> None:
    """It is not while something can be sent; it is in an outage, or when another takes over."""
    process = begin(Single(OWN))
    lane = process.lane()
    assert lane.finished
    process.write("a", 1)
    assert not lane.finished
    await lane.step()
    assert not lane.finished
    lane._breaker.trip(clock.now)
    assert lane.finished
    lane._breaker.succeeded()
    assert not lane.finished
    process.use(Single())
    assert lane.finished


@pytest.mark.anyio
async def test_a_lane_that_is_cut_off_leaves_its_batch_in_the_files(begin: Begin) -> None:
    """What was under way is sent again by the next process; the transport is closed."""
    there = GatedTransport(NAME)
    process = begin(there)
    process.write("a", 1, 2)
    lane = process.lane()
    async with anyio.create_task_group() as group:
        group.start_soon(lane.run, grace)
        await wait_until(lambda: there.arrived)
        lane.ending = lane.cancelled = True
        group.cancel_scope.cancel()
    assert there.closed
    process.close()
    process = begin(following := Single())
    await process.run_dry()
    assert following.taken == [1, 2]


@pytest.mark.anyio
async def test_a_clean_end_leaves_no_rows(begin: Begin) -> None:
    """Where all is sent, the next process has nothing to look at."""
    process = begin(Single())
    process.write("a", 1)
    await process.run_dry()
    process.close()
    assert process.positions() == {}


@pytest.mark.anyio
async def test_live_only_events_end_with_their_lane(begin: Begin) -> None:
    """What has no file to be read from is dropped at the end, and counted."""
    process = begin(FailingTransport(name=NAME), log_format="json", breaker_failures=1)
    process.write("a", 1, 2)
    process.lane().ending = True
    with anyio.fail_after(30):
        await process.lane().run(grace)
    stats = process.lane().stats()
    assert (stats.dropped, stats.lag_events) == (2, 0)


@pytest.mark.anyio
async def test_an_outage_of_live_only_delivery_drops_what_finds_no_room(begin: Begin) -> None:
    """Without files `max_pending_events` is all that is kept for a transport; more is counted."""
    there = FailingTransport(name=NAME)
    process = begin(there, enable_local_logging=False, max_pending_events=2, breaker_failures=1)
    process.write("a", 1)
    process.clock.now += await process.lane().step()
    process.write("a", 2, 3, 4)
    stats = process.lane().stats()
    assert (stats.dropped, stats.lag_events) == (2, 2)
    there.recover()
    await process.run_dry()
    assert [event["n"] for event in there.events] == [1, 2]


@pytest.mark.anyio
async def test_files_below_two_directories_are_both_let_go(begin: Begin, tmp_path: Path) -> None:
    """Where the base directory was changed, what is left below the old one keeps its row too."""
    process = begin(there := Single(OWN, OWN), breaker_failures=100)
    process.write("a", 1)
    await process.lane().step()
    given = {"log_base_dir": tmp_path / "new", "file_naming_pattern": "log"}
    process.delivery.use_settings(resolve(given, {}))
    process.files = SessionFiles(
        resolve(given, {}).paths("u"),
        Layout("jsonl"),
        max_open_files=8,
        file_mode=0o600,
        directory_mode=0o700,
        registrar=FileRegister(process.delivery),
    )
    process.write("a", 2)
    assert there.tried == [1]
    process.close()
    assert process.positions() == {"a/log.jsonl": 0}
    process.base = tmp_path / "new"
    assert process.positions() == {"a/log.jsonl": 0}


class BadlyClosed(Single):
    """Closes with an error, or never."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error = error

    async def close(self) -> None:
        """Raise, or hang."""
        if self.error is None:
            await anyio.sleep_forever()
        else:
            raise self.error


@pytest.mark.anyio
@pytest.mark.parametrize("error", [RuntimeError("bad close"), SystemExit(1)], ids=repr)
async def test_a_close_that_raises_is_told(
    begin: Begin, heard: Heard, error: BaseException
) -> None:
    """An error of a transport's `close` reaches the error handler and nobody else."""
    lane = begin(BadlyClosed(error)).lane()
    lane.ending = True
    with anyio.fail_after(30):
        await lane.run(grace)
    assert [context for _, context in heard] == ["there: close"]
    assert heard[0][0] is error or heard[0][0].__cause__ is error


@pytest.mark.anyio
async def test_a_close_that_hangs_has_its_time_and_no_more(begin: Begin) -> None:
    """A transport that does not close does not hold up the lane's end."""
    lane = begin(BadlyClosed(None)).lane()
    lane.ending = True
    with anyio.fail_after(30):
        await lane.run(lambda: 0.01)


@pytest.mark.anyio
async def test_a_close_has_its_time_even_where_the_lane_is_cut_off(begin: Begin) -> None:
    """A cancelled lane still lets its transport say goodbye."""
    said: list[str] = []

    class Polite(Single):
        async def close(self) -> None:
            await anyio.sleep(0.001)
            said.append("goodbye")

    lane = begin(Polite()).lane()
    async with anyio.create_task_group() as group:
        group.start_soon(lane.run, grace)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert said == ["goodbye"]


# A fork, a defect, and what is told.


def in_a_child(process: Process, check: Callable[[], object]) -> None:
    """Have something checked in a forked child, while the parent lives on."""
    child = os.fork()
    if not child:
        try:
            process.files.forked()
            process.delivery.after_fork_in_child()
            check()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_child_has_nothing_to_send(begin: Begin) -> None:
    """What is left is the parent's to send; the child sends what it writes itself."""
    process = begin(there := Single(OWN))
    process.write("a", 1)
    anyio.run(process.lane().step)

    def check() -> None:
        assert (process.lane().stats().lag_events, process.lane().finished) == (0, True)
        process.write("b", 2)
        anyio.run(process.run_dry)
        assert there.taken == [2]

    in_a_child(process, check)
    anyio.run(process.run_dry)
    assert there.taken == [1]


def test_a_child_that_is_forked_during_a_probe_sends(begin: Begin, clock: Clock) -> None:
    """The probe that is under way is the parent's: the child makes one of its own."""
    process = begin(there := Single())
    process.lane()._breaker.trip(0.0)
    assert process.lane()._breaker.allow(clock.now)

    def check() -> None:
        process.write("a", 1)
        anyio.run(process.run_dry)
        assert (there.taken, there.checks) == ([1], 1)

    in_a_child(process, check)


def test_a_child_that_is_forked_during_a_send_is_live(begin: Begin) -> None:
    """Since when the parent's attempt runs is nothing to a child."""
    process = begin(Single(), downstream_wait_seconds=1)
    process.lane()._downstream.busy_since = 0.0
    assert not process.lane().live

    def check() -> None:
        process.write("a", 1)
        anyio.run(process.run_dry)
        assert process.lane().live

    in_a_child(process, check)


def test_a_child_leaves_the_parents_faults_to_the_parent(begin: Begin) -> None:
    """A file that the parent could not read is none of the child's, not even later."""
    leave(begin(Single()), a=b"#")
    process = begin(there := Single())
    path = process.base / "a/log.jsonl"
    path.rename(process.base / "a/elsewhere")
    path.symlink_to("elsewhere")
    anyio.run(process.run_dry)
    path.unlink()
    (process.base / "a/elsewhere").rename(path)
    process.clock.now += _sender.TEND_SECONDS

    def check() -> None:
        anyio.run(process.run_dry)
        assert there.taken == []

    in_a_child(process, check)
    anyio.run(process.run_dry)
    assert there.taken == [1]


def test_a_child_looks_for_what_is_left_at_once(begin: Begin, clock: Clock) -> None:
    """When the parent has looked is nothing to a child."""
    process = begin(Single())
    process.write("a", 1)
    anyio.run(process.run_dry)
    clock.now += 10

    def check() -> None:
        assert anyio.run(process.lane().step) == _sender.TEND_SECONDS

    in_a_child(process, check)


def test_a_child_does_not_wait_for_the_parents_transports(begin: Begin) -> None:
    """Who takes over a name in the parent has nobody to wait for in the child."""
    process = begin(Single())
    process.use(there := Single())

    async def send() -> None:
        process.write("a", 1)
        with anyio.fail_after(5):
            await process.run_dry()
        assert there.taken == [1]

    in_a_child(process, lambda: anyio.run(send))


def test_a_child_of_a_process_that_ends_does_not_end(begin: Begin) -> None:
    """A lane that is at its end in the parent is at its beginning in the child."""
    lane = begin(Single()).lane()
    lane.ending = lane.cancelled = lane.ended = True
    lane.forked()
    assert (lane.ending, lane.cancelled, lane.ended) == (False, False, False)


@pytest.mark.anyio
async def test_what_was_in_hand_when_a_step_broke_down_is_sent_again(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect costs a pause, not an event."""
    process = begin(there := Single())
    process.write("a", 1)
    fuse = [RuntimeError("a defect")]

    def broken(self: Sender, batch: object) -> Any:
        if fuse:
            raise fuse.pop()
        return real(self, batch)

    real: Any = Sender._send
    monkeypatch.setattr(Sender, "_send", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        await process.lane().step()
    process.lane().recover()
    await process.run_dry()
    assert there.taken == [1]


@pytest.mark.parametrize("other", [True, False])
def test_an_event_that_the_callback_has_not_decided_on_blocks_nothing(
    begin: Begin, other: bool
) -> None:
    """A step passes it by, and comes to an end whether or not another session has something."""
    process, found = begin(there := Single()), list[Written]()
    process.write("a", 1, then=lambda w: found.append(process.delivery.send(w, undecided=True)))
    if other:
        process.write("b", 2)

    def step() -> None:
        # A decision in the very middle of a step is not what this is about.
        with contextlib.suppress(KeyError):
            anyio.run(process.lane().step)

    thread = threading.Thread(target=step, daemon=True)
    thread.start()
    thread.join(0.3)
    stuck = thread.is_alive()
    process.delivery.decide(found[0], 0, taken=True)
    thread.join(30)
    assert not stuck
    assert there.taken == ([2] if other else [])


@pytest.mark.anyio
@pytest.mark.parametrize("taken", [True, False])
async def test_what_the_callback_has_taken_is_not_sent(begin: Begin, taken: bool) -> None:
    """Once the callback has decided, the transport goes past the event, or sends it."""
    process, found = begin(there := Single()), list[Written]()
    process.write("a", 1, 2, then=lambda w: found.append(process.delivery.send(w, undecided=True)))
    process.delivery.decide(found[0], 0, taken)
    process.delivery.decide(found[0], 1, taken=False)
    await process.run_dry()
    assert there.taken == ([2] if taken else [1, 2])
    assert process.positions() == {"a/log.jsonl": process.end("a/log.jsonl", 2)}


@pytest.mark.anyio
@pytest.mark.parametrize(("patience", "live"), [(1000, True), (0, False)])
async def test_a_busy_lane_is_live_for_as_long_as_callers_wait(
    begin: Begin, patience: float, live: bool
) -> None:
    """A lane whose send takes longer than callers wait is not waited for."""
    there = GatedTransport(NAME)
    process = begin(there, downstream_wait_seconds=patience)
    assert process.lane().live
    process.write("a", 1)
    async with anyio.create_task_group() as group:
        group.start_soon(process.lane().step)
        await wait_until(lambda: there.arrived)
        assert process.lane().live is live
        there.open()
    assert process.lane().live


@pytest.mark.anyio
async def test_a_lane_that_is_behind_is_not_live(begin: Begin) -> None:
    """Nobody waits for a lane that has more than a batch to send before."""
    process = begin(Together(), batch_events=2)
    process.write("a", 1, 2)
    assert process.lane().live
    process.write("a", 3)
    assert not process.lane().live
    await process.run_dry()
    assert process.lane().live


@pytest.mark.anyio
async def test_a_lane_in_an_outage_is_not_live(begin: Begin) -> None:
    """Nobody waits for a lane whose breaker is open."""
    process = begin(FailingTransport.down(), breaker_failures=1)
    process.write("a", 1)
    await process.lane("down").step()
    assert not process.lane("down").live


@pytest.mark.anyio
async def test_a_lane_that_was_asked_to_leave_the_far_side_alone_is_not_live(begin: Begin) -> None:
    """Nobody waits for a lane that pauses for longer than callers wait."""
    process = begin(Single(TransportError("slow down", retry_after_seconds=1000)))
    process.write("a", 1)
    await process.lane().step()
    assert not process.lane().live


@pytest.mark.anyio
async def test_other_settings_are_used_at_once(begin: Begin) -> None:
    """A lane goes by new options, as that of how often it retries."""
    process = begin(Single(OWN), max_retry_attempts=0)
    process.write("a", 1)
    given = {"log_base_dir": process.base, "file_naming_pattern": "log", "max_retry_attempts": 1}
    process.delivery.use_settings(resolve(given, {}))
    await process.run_dry()
    assert process.lane().stats().rejected == 0


@pytest.mark.anyio
async def test_a_smaller_batch_is_used_at_once(begin: Begin) -> None:
    """No batch is larger than the option that is in force."""
    process = begin(there := Together())
    process.write("a", *range(4))
    given = {"log_base_dir": process.base, "file_naming_pattern": "log", "batch_events": 2}
    process.delivery.use_settings(resolve(given, {}))
    await process.run_dry()
    assert there.batches == [[0, 1], [2, 3]]


@pytest.mark.anyio
async def test_the_lag_is_told(begin: Begin) -> None:
    """How many events wait, and since when the oldest does."""
    process = begin(Single())
    process.write("a", 1, 2)
    process.write("b", 3)
    stats = process.lane().stats()
    assert stats.lag_events == 3
    assert stats.lag_seconds > 3600
    await process.run_dry()
    stats = process.lane().stats()
    assert (stats.lag_events, stats.lag_seconds) == (0, 0.0)


@pytest.mark.anyio
async def test_a_transport_that_cannot_say_is_not_connected(begin: Begin) -> None:
    """`stats()` does not fail where `is_connected` does."""

    class Unsure(Single):
        @property
        def is_connected(self) -> bool:
            raise RuntimeError

    assert begin(Unsure()).lane().stats().connected is False
