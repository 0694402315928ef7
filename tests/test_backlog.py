"""What a transport has yet to get: order, fairness, memory, files that fail, and who waits."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventlog_handler import TransportError, _backlog, _cursor, _lines
from eventlog_handler._backlog import READ_AGAIN_SECONDS, Backlog
from eventlog_handler._cursor import Cursor
from eventlog_handler._files import Layout, SessionFiles
from eventlog_handler._lines import measure
from eventlog_handler._outbox import Outbox, Owed
from eventlog_handler._paths import SessionPaths
from eventlog_handler._report import Report
from eventlog_handler._stamp import timestamp
from eventlog_handler.typing import EncodedEvent, OutgoingEvent, Written

Batch = list[tuple[Cursor, OutgoingEvent]]


class Heard(list[tuple[Exception, str]]):
    """An error handler that remembers."""

    def __call__(self, error: Exception, context: str) -> None:
        self.append((error, context))


class Fused(Backlog):
    """A backlog whose `take` fails where it would go round for ever."""

    rounds = 0

    def take(self, now: float, limit: int, most_bytes: int) -> Batch:
        """Take, in so many rounds at most."""
        self.rounds = 100
        return super().take(now, limit, most_bytes)

    def _next(self) -> Cursor | None:
        self.rounds -= 1
        assert self.rounds, "it goes round for ever"
        return super()._next()


class Registered:
    """Has files belong to an outbox; what is saved there is of no interest here."""

    generation = 0

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox

    def register(self, path: str, session: str, size: int) -> int:
        """Know the file."""
        return self.generation


class Writer:
    """Writes events that are told by their numbers to session files."""

    def __init__(self, base: Path) -> None:
        self.outbox = Outbox(base, 0o700, Report(None), list)
        self.begin()

    def begin(self) -> None:
        """Write new files from now on, as another process would."""
        self.files = SessionFiles(
            SessionPaths(self.outbox.base, "{session_id}", "unknown_{uuid}", "log", ".jsonl", "u1"),
            Layout("jsonl"),
            max_open_files=8,
            file_mode=0o600,
            directory_mode=0o700,
            registrar=Registered(self.outbox),
        )

    def __call__(self, session: str, *numbers: int, padding: int = 0) -> Written:
        """Write events together."""
        found: list[Written] = []
        events = [event(number, session, padding) for number in numbers]
        assert self.files.append(session, events, found.append) == len(numbers)
        return found[0]

    def path(self, session: str) -> Path:
        """Return the file that is written."""
        return self.files.path(session)


class Live:
    """Hands on events that are in no file, numbered as the delivery does."""

    def __init__(self) -> None:
        self.numbers = itertools.count()

    def __call__(self, session: str, *numbers: int) -> Written:
        """Hand on events together."""
        events = [event(number, session) for number in numbers]
        ends = [next(self.numbers) + 1 for _ in numbers]
        return Written(None, "", session, ends[0] - 1, None, events, ends)


class Calls:
    """Counts calls."""

    count = 0

    def __call__(self) -> None:
        self.count += 1


def stamp(number: int) -> str:
    """Return a timestamp that grows with the event's number."""
    return timestamp(number)


def event(number: int, session: str = "s", padding: int = 0) -> EncodedEvent:
    """Return an event that is told by its number."""
    body = orjson.dumps({"type": "note", "n": number, "pad": "x" * padding})
    return EncodedEvent(session, "note", f"id-{number}", number, body)


def number_of(sent: OutgoingEvent) -> int:
    """Return the number that tells an event."""
    number: int = orjson.loads(sent.line)["event"]["n"]
    return number


def numbers_of(batch: Batch) -> list[int]:
    """Return the numbers of the events in a batch."""
    return [number_of(sent) for _, sent in batch]


def grow(backlog: Backlog, written: Written, undecided: bool = False, room: int = 1000) -> Written:
    """Have a backlog take what was written."""
    backlog.grow(written, undecided, room)
    return written


def take(backlog: Backlog, limit: int = 100, most_bytes: int = 1_000_000, now: float = 0) -> Batch:
    """Take a batch; the limits are wide where they do not matter."""
    return backlog.take(now, limit, most_bytes)


def settle(backlog: Backlog, batch: Batch) -> list[int]:
    """Have all of a batch be sent; return the numbers of its events."""
    counts = dict.fromkeys((cursor for cursor, _ in batch), 0)
    for cursor, _ in batch:
        counts[cursor] += 1
    for cursor, count in counts.items():
        backlog.settle(cursor, count)
    return numbers_of(batch)


def drain(backlog: Backlog, limit: int = 100, now: float = 0) -> list[int]:
    """Send until there is nothing to take; return the numbers of the events."""
    sent = []
    while batch := take(backlog, limit, now=now):
        sent += settle(backlog, batch)
    return sent


def in_memory(backlog: Backlog) -> int:
    """Return how many events are kept in memory."""
    return sum(len(cursor.buffer) for cursor in backlog.cursors())


def owe(backlog: Backlog, writer: Writer, session: str, path: Path, position: int = 0) -> int:
    """Have a backlog take what is left of a file that nobody writes any more."""
    below = path.relative_to(writer.outbox.base).as_posix()
    extent = measure(writer.outbox.base, below, position)
    return backlog.owe(writer.outbox, Owed(below, session, position), extent)


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Let every open fail with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def replaced_by_a_link(path: Path, target: Path) -> Iterator[None]:
    """Have a link lie where a file or directory was."""
    aside = path.with_name("aside")
    path.rename(aside)
    path.symlink_to(target)
    try:
        yield
    finally:
        path.unlink()
        aside.rename(path)


@pytest.fixture
def heard() -> Heard:
    """What the error handler hears."""
    return Heard()


@pytest.fixture
def backlog(heard: Heard) -> Backlog:
    """An empty one."""
    return Fused("peer", Report(heard))


@pytest.fixture
def writer(base: Path) -> Iterator[Writer]:
    """Writes session files."""
    writer = Writer(base)
    yield writer
    writer.files.close()


@pytest.fixture
def live() -> Live:
    """Hands on events without files."""
    return Live()


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every event be read from its file."""
    monkeypatch.setattr(_backlog, "BUFFER_BYTES", 0)


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have room for five events in memory."""
    size = len(event(1).line(1)) + _backlog._OBJECT_BYTES
    monkeypatch.setattr(_backlog, "BUFFER_BYTES", 5 * size + 100)


# Order and turns


def test_there_is_nothing_to_take_at_first(backlog: Backlog) -> None:
    """An empty backlog has no batch, no session, no lag, and no time at which to look again."""
    assert take(backlog) == []
    assert backlog.seconds_to_next(0.0) == math.inf
    assert (backlog.lag_events, backlog.sessions, backlog.oldest) == (0, 0, "")
    assert (backlog.cursors(), backlog.changes(), backlog.awaited) == ([], [], False)


def test_events_come_as_transports_get_them(backlog: Backlog, writer: Writer) -> None:
    """A batch has the lines of the file, with what is needed to route them."""
    written = grow(backlog, writer("s", 1, 2))
    assert [sent for _, sent in take(backlog)] == [written.outgoing(0), written.outgoing(1)]


@pytest.mark.usefixtures("no_memory")
def test_events_that_are_read_are_the_same(backlog: Backlog, writer: Writer) -> None:
    """Nothing tells a transport whether an event comes from memory or from the file."""
    written = grow(backlog, writer("s", 1, 2))
    assert [sent for _, sent in take(backlog)] == [written.outgoing(0), written.outgoing(1)]


def test_a_session_is_sent_in_order(backlog: Backlog, writer: Writer) -> None:
    """Events come as they were written, over any number of batches."""
    for number in range(10):
        grow(backlog, writer("s", number))
    assert drain(backlog, limit=3) == list(range(10))
    assert (backlog.lag_events, backlog.sessions) == (0, 0)


def test_sessions_take_turns(backlog: Backlog, writer: Writer) -> None:
    """A session that has filled a batch waits until each other one had its turn."""
    grow(backlog, writer("a", *range(5)))
    grow(backlog, writer("b", *range(10, 15)))
    grow(backlog, writer("c", *range(20, 22)))
    batches = [settle(backlog, take(backlog, limit=2)) for _ in range(7)]
    assert batches == [[0, 1], [10, 11], [20, 21], [2, 3], [12, 13], [4, 14], []]


def test_a_batch_is_filled_from_many_sessions(backlog: Backlog, writer: Writer) -> None:
    """What one session leaves of a batch the next one gets."""
    for number, session in enumerate("abcd"):
        grow(backlog, writer(session, number))
    assert numbers_of(take(backlog, limit=3)) == [0, 1, 2]


def test_a_session_is_not_served_while_its_events_are_out(backlog: Backlog, writer: Writer) -> None:
    """Later events of a session cannot overtake those that are being sent."""
    grow(backlog, writer("a", 1))
    grow(backlog, writer("b", 11))
    out = take(backlog, limit=1)
    grow(backlog, writer("a", 2))
    assert settle(backlog, take(backlog)) == [11]
    assert (take(backlog), backlog.seconds_to_next(0.0)) == ([], math.inf)
    settle(backlog, out)
    assert backlog.seconds_to_next(0.0) == 0.0
    assert drain(backlog) == [2]


def test_what_was_sent_in_part_goes_on_behind_it(backlog: Backlog, writer: Writer) -> None:
    """Of a batch whose first events are done with, the next one begins with the rest."""
    grow(backlog, writer("s", 1, 2, 3))
    cursor, _ = take(backlog)[0]
    backlog.settle(cursor, 2)
    assert (backlog.lag_events, drain(backlog)) == (1, [3])


def test_attempts_count_for_the_next_event_only(backlog: Backlog, writer: Writer) -> None:
    """An event that is done with takes its failed attempts along."""
    grow(backlog, writer("s", 1, 2))
    cursor, _ = take(backlog)[0]
    cursor.attempts = 3
    backlog.settle(cursor, 0)
    assert cursor.attempts == 3
    backlog.settle(take(backlog)[0][0], 1)
    assert cursor.attempts == 0


# Limits of a batch


def test_a_batch_ends_at_its_count(backlog: Backlog, writer: Writer) -> None:
    """Never more events than asked for, of one session or of several."""
    grow(backlog, writer("a", 1, 2))
    grow(backlog, writer("b", *range(11, 20)))
    assert settle(backlog, take(backlog, limit=1)) == [1]
    assert settle(backlog, take(backlog, limit=3)) == [11, 12, 13]
    assert settle(backlog, take(backlog, limit=3)) == [2, 14, 15]


def test_a_batch_ends_before_its_bytes_are_exceeded(backlog: Backlog, writer: Writer) -> None:
    """Lines are taken as long as they fit, in one session or in many."""
    size = len(grow(backlog, writer("a", 1, 2, 3)).outgoing(0).line)
    grow(backlog, writer("b", 4))
    assert settle(backlog, take(backlog, most_bytes=2 * size + size // 2)) == [1, 2]
    assert settle(backlog, take(backlog, most_bytes=size)) in ([3], [4])


def test_one_event_is_taken_whatever_its_size(backlog: Backlog, writer: Writer) -> None:
    """An event larger than a batch is a batch of its own."""
    grow(backlog, writer("s", 1, 2, padding=1000))
    assert settle(backlog, take(backlog, most_bytes=10)) == [1]
    assert settle(backlog, take(backlog, most_bytes=10)) == [2]


def test_what_does_not_fit_waits_for_another_batch(backlog: Backlog, writer: Writer) -> None:
    """A session of which nothing fits is served later, with all it has."""
    grow(backlog, writer("a", 1))
    grow(backlog, writer("b", 2, 3, padding=1000))
    assert settle(backlog, take(backlog, most_bytes=500)) == [1]
    assert drain(backlog) == [2, 3]


def test_a_large_event_gets_its_turn_among_small_ones(backlog: Backlog, writer: Writer) -> None:
    """What does not fit into the rest of a batch begins the next one, however busy others are."""
    grow(backlog, writer("a", 1))
    grow(backlog, writer("large", 99, padding=1000))
    grow(backlog, writer("b", 2))
    sent: list[OutgoingEvent] = []
    for number in range(3, 10):
        batch = take(backlog, most_bytes=1000)
        settle(backlog, batch)
        sent += [each for _, each in batch]
        # Whoever is served has something new at once.
        grow(backlog, writer(sent[-1].session_id, number))
    assert "large" in [each.session_id for each in sent]


# Memory and files


def test_a_transport_that_keeps_up_causes_no_reading(backlog: Backlog, writer: Writer) -> None:
    """What was just written comes from memory: the files could as well be gone."""
    for number in range(5):
        grow(backlog, writer("s", number))
        writer.path("s").unlink()
        assert drain(backlog) == [number]


@pytest.mark.usefixtures("small_memory")
def test_memory_is_bounded_and_the_lag_counts_all(backlog: Backlog, writer: Writer) -> None:
    """However much is written, a little of it is kept in memory, and the rest is known of."""
    for number in range(20):
        grow(backlog, writer(f"s{number % 3}", number))
    assert (backlog.lag_events, in_memory(backlog)) == (20, 5)
    assert sorted(drain(backlog)) == list(range(20))


@pytest.mark.usefixtures("small_memory")
def test_one_writing_may_fit_in_part(backlog: Backlog, writer: Writer) -> None:
    """Of what was written together memory keeps the beginning, and never leaves one out."""
    grow(backlog, writer("s", *range(20)))
    assert in_memory(backlog) == 5
    assert numbers_of(take(backlog)) == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("small_memory")
def test_memory_that_was_left_out_is_not_filled_further_on(
    backlog: Backlog, writer: Writer
) -> None:
    """Where an event is too large for memory the smaller ones behind it are read, too."""
    grow(backlog, writer("s", 1))
    grow(backlog, writer("s", 2, padding=10_000))
    grow(backlog, writer("s", 3))
    assert in_memory(backlog) == 1
    assert drain(backlog) == [1, 2, 3]


@pytest.mark.usefixtures("small_memory")
def test_who_is_behind_reads_until_the_writer_is_met(backlog: Backlog, writer: Writer) -> None:
    """After what is in memory comes the file, to the last event that is written meanwhile."""
    grow(backlog, writer("s", *range(10)))
    sent = settle(backlog, take(backlog, limit=7))
    grow(backlog, writer("s", 10, 11))
    assert sent + drain(backlog) == list(range(12))


@pytest.mark.usefixtures("small_memory")
def test_who_has_met_the_writer_reads_no_more(backlog: Backlog, writer: Writer) -> None:
    """Once the file is read to its end, what is written next comes from memory again."""
    grow(backlog, writer("s", *range(8)))
    settle(backlog, take(backlog))
    out = take(backlog)
    grow(backlog, writer("s", 8))
    writer.path("s").unlink()
    assert settle(backlog, out) + drain(backlog) == [5, 6, 7, 8]


def test_memory_is_given_back(
    backlog: Backlog, writer: Writer, small_memory: None, live: Live
) -> None:
    """Room that was needed once is there again, wherever its events have gone."""
    for _ in range(3):
        grow(backlog, writer("s", *range(5)))
        assert in_memory(backlog) == 5
        drain(backlog)
    grow(backlog, writer("s", *range(5)))
    backlog.postpone(take(backlog)[0][0], 1.0)
    grow(backlog, writer("t", *range(5)))
    assert in_memory(backlog) == 5
    drain(backlog, now=1.0)
    grow(backlog, live("l", *range(5)))
    backlog.abandon()
    grow(backlog, writer("t", *range(5)))
    assert in_memory(backlog) == 5


@pytest.mark.usefixtures("no_memory")
def test_no_more_is_kept_of_a_file_than_is_taken(backlog: Backlog, writer: Writer) -> None:
    """After an outage, what is read and not yet sent does not grow with the sessions."""
    for session in range(20):
        grow(backlog, writer(f"s{session}", *range(20)))
    for _ in range(20):
        settle(backlog, take(backlog, limit=5))
    assert in_memory(backlog) == 0


@pytest.mark.usefixtures("no_memory")
def test_what_does_not_fit_is_not_kept_for_every_session(backlog: Backlog, writer: Writer) -> None:
    """Where bytes end a batch, what was read beyond it does not add up either."""
    for session in range(20):
        size = len(grow(backlog, writer(f"s{session}", *range(10))).outgoing(0).line)
    for _ in range(10):
        assert 14 <= len(settle(backlog, take(backlog, most_bytes=15 * size))) <= 15
    assert in_memory(backlog) <= 30


@pytest.mark.usefixtures("no_memory")
def test_nothing_is_read_past_what_was_written_for_good(backlog: Backlog, writer: Writer) -> None:
    """What a failed write has left behind in the file is not sent, even if it is a whole line."""
    grow(backlog, writer("s", 1, 2))
    with writer.path("s").open("ab") as file:
        file.write(event(3).line(3) + b"\n")
    assert drain(backlog) == [1, 2]
    assert take(backlog) == []


@pytest.mark.usefixtures("no_memory")
def test_a_line_that_cannot_be_read_is_an_event_without_an_id(
    backlog: Backlog, writer: Writer
) -> None:
    """Damage in a file is handed on, for the sender to park, and hides nothing behind it."""
    written = grow(backlog, writer("s", 1, 2))
    data, size = writer.path("s").read_bytes(), len(written.outgoing(0).line)
    writer.path("s").write_bytes(b"#" * size + data[size:])
    batch = take(backlog)
    assert [sent.id for _, sent in batch] == ["", "id-2"]
    assert batch[0][1].line == b"#" * size


@pytest.mark.usefixtures("no_memory")
def test_a_deleted_file_is_dropped_and_told(backlog: Backlog, writer: Writer, heard: Heard) -> None:
    """What nobody can read any more is counted as lost by name; nobody waits for it longer."""
    written, calls = grow(backlog, writer("s", 1, 2, 3)), Calls()
    backlog.when(calls, "s")
    writer.path("s").unlink()
    assert take(backlog) == []
    assert (backlog.dropped, backlog.lag_events, backlog.sessions, calls.count) == (3, 0, 0, 1)
    [(error, context)] = heard
    assert (str(error), context) == ("3 events were not sent: s/log.jsonl is gone or cut", "peer")
    assert isinstance(error, TransportError)
    assert isinstance(error.__cause__, FileNotFoundError)
    [cursor] = backlog.changes()
    assert (cursor.done, cursor.position) == (True, written.ends[-1])


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("more", [0, 10])
def test_a_cut_file_is_dropped_from_the_cut_on(
    backlog: Backlog, writer: Writer, heard: Heard, more: int
) -> None:
    """The lines before the cut are sent; those behind it, and the one in it, are lost by name."""
    written, calls = grow(backlog, writer("s", 1, 2, 3)), Calls()
    backlog.when(calls, None)
    os.truncate(writer.path("s"), written.ends[0] + more)
    assert drain(backlog) == [1]
    assert (backlog.dropped, backlog.lag_events, backlog.sessions, calls.count) == (2, 0, 0, 1)
    assert [type(error.__cause__) for error, _ in heard] == [EOFError]


@pytest.mark.usefixtures("no_memory")
def test_a_lost_file_costs_no_other_events(backlog: Backlog, writer: Writer) -> None:
    """What is in the session's next file, and in other sessions', is sent in the same batch."""
    grow(backlog, writer("a", 1))
    grow(backlog, writer("b", 11))
    writer.path("a").rename(writer.path("a").with_name("gone"))
    writer.begin()
    (writer.path("a").parent / "log.jsonl").mkdir()
    grow(backlog, writer("a", 2))
    (writer.path("a").parent / "log.jsonl").rmdir()
    assert sorted(numbers_of(take(backlog))) == [2, 11]
    assert backlog.dropped == 1


@pytest.mark.usefixtures("no_memory")
def test_a_lost_file_may_be_asked_for_while_it_is_told_of(writer: Writer) -> None:
    """An error handler takes its time, in which others flush: that harms nothing."""
    calls = Calls()
    backlog = Fused("peer", Report(lambda error, context: backlog.when(calls, None)))
    grow(backlog, writer("a", 1))
    grow(backlog, writer("b", 11))
    writer.path("a").unlink()
    assert drain(backlog) == [11]
    grow(backlog, writer("a", 2))
    assert drain(backlog) == [2]


def make_link_to_directory(
    writer: Writer, tmp_path: Path
) -> contextlib.AbstractContextManager[Any]:
    """Replace the session's directory."""
    return replaced_by_a_link(writer.path("a").parent, tmp_path / "elsewhere")


def make_link_to_file(writer: Writer, tmp_path: Path) -> contextlib.AbstractContextManager[Any]:
    """Replace the session's file."""
    return replaced_by_a_link(writer.path("a"), tmp_path / "elsewhere" / "log.jsonl")


def run_out_of_descriptors(
    writer: Writer, tmp_path: Path
) -> contextlib.AbstractContextManager[Any]:
    """Let nothing be opened."""
    return no_descriptors_left()


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    "trouble", [make_link_to_directory, make_link_to_file, run_out_of_descriptors]
)
def test_a_file_that_cannot_be_read_is_tried_again(
    backlog: Backlog,
    writer: Writer,
    heard: Heard,
    tmp_path: Path,
    trouble: Callable[[Writer, Path], contextlib.AbstractContextManager[Any]],
) -> None:
    """It is told and postponed, nothing is lost, and a link in its place is not followed."""
    (tmp_path / "elsewhere").mkdir()
    planted = b"".join(event(n).line(n) + b"\n" for n in (66, 67))
    (tmp_path / "elsewhere" / "log.jsonl").write_bytes(planted)
    grow(backlog, writer("a", 1, 2))
    with trouble(writer, tmp_path):
        assert take(backlog, now=100.0) == []
        assert backlog.seconds_to_next(100.0) == READ_AGAIN_SECONDS
        assert (backlog.dropped, backlog.lag_events) == (0, 2)
    [(error, context)] = heard
    assert isinstance(error, OSError)
    assert context == "peer: reading a/log.jsonl"
    assert take(backlog, now=100.0) == []
    assert drain(backlog, now=100.0 + READ_AGAIN_SECONDS) == [1, 2]


@pytest.mark.usefixtures("no_memory")
def test_a_file_that_cannot_be_read_holds_back_no_other(
    backlog: Backlog, writer: Writer, tmp_path: Path
) -> None:
    """The other sessions are served in the same batch."""
    grow(backlog, writer("a", 1))
    grow(backlog, writer("b", 2))
    with replaced_by_a_link(writer.path("a"), tmp_path):
        assert numbers_of(take(backlog)) == [2]


# Postponed sessions


def test_a_postponed_session_is_served_when_it_is_time(backlog: Backlog, writer: Writer) -> None:
    """Not before, whatever comes; then from the event that has failed."""
    grow(backlog, writer("s", 1))
    backlog.postpone(take(backlog)[0][0], 10.0)
    grow(backlog, writer("s", 2))
    assert [backlog.seconds_to_next(now) for now in (4.0, 10.0, 11.0)] == [6.0, 0.0, 0.0]
    assert take(backlog, now=9.9) == []
    assert drain(backlog, now=10.0) == [1, 2]


def test_the_next_time_is_the_earliest(backlog: Backlog, writer: Writer) -> None:
    """Of several postponed sessions the first one counts; one that is ready needs no wait."""
    for number, session in enumerate("abc"):
        grow(backlog, writer(session, number))
    for until, (cursor, _) in zip((30.0, 10.0, 20.0), take(backlog), strict=True):
        backlog.postpone(cursor, until)
    assert backlog.seconds_to_next(0.0) == 10.0
    assert drain(backlog, now=20.0) == [1, 2]
    grow(backlog, writer("d", 4))
    assert backlog.seconds_to_next(20.0) == 0.0


def test_a_postponed_session_can_be_taken_out_of_its_turn(backlog: Backlog, writer: Writer) -> None:
    """Postponing what is ready, too, holds it back."""
    grow(backlog, writer("s", 1))
    backlog.postpone(backlog.cursors()[0], 10.0)
    assert take(backlog) == []
    assert drain(backlog, now=10.0) == [1]


def test_what_is_postponed_and_has_a_file_is_not_kept_in_memory(
    backlog: Backlog, writer: Writer
) -> None:
    """An outage costs disk: the events are read again."""
    grow(backlog, writer("s", 1, 2))
    backlog.postpone(take(backlog)[0][0], 1.0)
    assert (in_memory(backlog), backlog.lag_events) == (0, 2)
    assert drain(backlog, now=1.0) == [1, 2]


def test_what_is_postponed_and_has_no_file_stays_in_memory(backlog: Backlog, live: Live) -> None:
    """Live-only, there is nothing to read again."""
    grow(backlog, live("s", 1, 2))
    backlog.postpone(take(backlog)[0][0], 1.0)
    assert drain(backlog, now=1.0) == [1, 2]


def test_a_recovered_transport_resumes_all_at_once(backlog: Backlog, writer: Writer) -> None:
    """Nobody waits out a pause that has lost its reason."""
    for number, session in enumerate("ab"):
        grow(backlog, writer(session, number))
    for cursor, _ in take(backlog):
        backlog.postpone(cursor, 1000.0)
    backlog.resume()
    assert backlog.seconds_to_next(0.0) == 0.0
    assert drain(backlog) == [0, 1]


def test_what_was_resumed_is_not_served_once_more_at_its_time(
    backlog: Backlog, writer: Writer
) -> None:
    """While its events are out, the end of the pause that was cut short means nothing."""
    grow(backlog, writer("s", 1))
    backlog.postpone(take(backlog)[0][0], 10.0)
    backlog.resume()
    out = take(backlog)
    assert take(backlog, now=10.0) == []
    assert settle(backlog, out) == [1]


def test_what_was_never_given_back_is_served_again(backlog: Backlog, writer: Writer) -> None:
    """After its sender broke down, a batch is taken once more, from its beginning."""
    grow(backlog, writer("a", 1, 2))
    grow(backlog, writer("b", 11))
    assert sorted(numbers_of(take(backlog))) == [1, 2, 11]
    assert take(backlog) == []
    backlog.land()
    assert sorted(drain(backlog)) == [1, 2, 11]
    assert backlog.lag_events == 0


def test_a_failed_event_holds_its_session_until_it_is_dealt_with(
    backlog: Backlog, writer: Writer
) -> None:
    """Between what was sent of a batch and the word on what failed, nothing of it is taken."""
    grow(backlog, writer("s", 1, 2, 3))
    cursor, _ = take(backlog)[0]
    backlog.settle(cursor, 1, hold=True)
    assert (take(backlog), backlog.lag_events) == ([], 2)
    backlog.settle(cursor, 1)
    assert drain(backlog) == [3]


# Files of the dead


def test_what_a_file_still_holds_is_sent_from_its_position(
    backlog: Backlog, writer: Writer
) -> None:
    """What its transport has acknowledged is not read again."""
    written = writer("s", 1, 2, 3)
    assert owe(backlog, writer, "s", writer.path("s"), written.ends[0]) == 2
    assert (backlog.lag_events, backlog.oldest) == (2, stamp(2))
    assert drain(backlog) == [2, 3]


def test_a_file_that_is_owed_is_at_an_end_when_it_is_sent(backlog: Backlog, writer: Writer) -> None:
    """Nobody writes it any more, and so its row can go."""
    written = writer("s", 1)
    owe(backlog, writer, "s", writer.path("s"))
    drain(backlog)
    [cursor] = backlog.changes()
    assert (cursor.path, cursor.done, cursor.growing) == ("s/log.jsonl", True, False)
    assert cursor.position == written.ends[-1]


def test_a_file_of_which_nothing_is_left_is_done_at_once(backlog: Backlog, writer: Writer) -> None:
    """There is nothing to take of it, and its row can go."""
    written = writer("s", 1)
    assert owe(backlog, writer, "s", writer.path("s"), written.ends[-1]) == 0
    assert (take(backlog), backlog.sessions) == ([], 0)
    assert [cursor.done for cursor in backlog.changes()] == [True]


def test_a_file_is_owed_once(backlog: Backlog, writer: Writer) -> None:
    """Whoever brings a file that is here already brings nothing."""
    writer("s", 1, 2)
    assert owe(backlog, writer, "s", writer.path("s")) == 2
    assert owe(backlog, writer, "s", writer.path("s")) == 0
    assert (backlog.lag_events, drain(backlog)) == (2, [1, 2])


def test_an_older_file_comes_before_what_is_here(backlog: Backlog, writer: Writer) -> None:
    """A session is sent in the order of its events, in whichever order its files are found."""
    paths = []
    for number in range(1, 5):
        writer.begin()
        written = writer("s", 10 * number, 10 * number + 1)
        paths.append(writer.path("s"))
    grow(backlog, written)
    for index in (1, 2, 0):
        owe(backlog, writer, "s", paths[index])
    assert drain(backlog) == [10, 11, 20, 21, 30, 31, 40, 41]


def test_an_older_file_comes_next_where_a_newer_one_is_being_sent(
    backlog: Backlog, writer: Writer
) -> None:
    """What is out already stays out; what is left of it comes behind the older file."""
    writer("s", 1, 2)
    older = writer.path("s")
    writer.begin()
    grow(backlog, writer("s", 11, 12))
    out = take(backlog, limit=1)
    owe(backlog, writer, "s", older)
    assert take(backlog) == []
    assert settle(backlog, out) + drain(backlog) == [11, 1, 2, 12]


# Who waits


def test_who_waits_is_called_when_all_that_is_here_now_is_sent(
    backlog: Backlog, writer: Writer
) -> None:
    """Not before its last event, and without regard to what comes later."""
    calls = Calls()
    grow(backlog, writer("s", 1, 2))
    assert (backlog.when(calls, "s"), backlog.awaited) == (1, True)
    grow(backlog, writer("s", 3))
    settle(backlog, take(backlog, limit=1))
    assert calls.count == 0
    settle(backlog, take(backlog, limit=1))
    assert (calls.count, backlog.awaited) == (1, False)
    assert drain(backlog) == [3]
    assert calls.count == 1


def test_who_waits_for_a_session_waits_for_no_other(backlog: Backlog, writer: Writer) -> None:
    """Only its own files count, each once."""
    calls = Calls()
    grow(backlog, writer("a", 1))
    grow(backlog, writer("b", 2))
    assert backlog.when(calls, "b") == 1
    out = take(backlog)
    backlog.settle(out[1][0], 1)
    assert calls.count == 1


def test_who_waits_for_all_waits_for_each_file(backlog: Backlog, writer: Writer) -> None:
    """There is one call for each, of every session."""
    calls = Calls()
    grow(backlog, writer("a", 1))
    writer.begin()
    grow(backlog, writer("a", 2))
    grow(backlog, writer("b", 3))
    assert backlog.when(calls, None) == 3
    drain(backlog)
    assert calls.count == 3


def test_who_waits_for_an_event_waits_for_nothing_behind_it(
    backlog: Backlog, writer: Writer
) -> None:
    """What was written before it counts, as it is sent before; what came after does not."""
    calls = Calls()
    grow(backlog, writer("s", 1))
    awaited = grow(backlog, writer("s", 2))
    grow(backlog, writer("s", 3))
    assert backlog.when(calls, "s", awaited) == 1
    settle(backlog, take(backlog, limit=1))
    assert calls.count == 0
    settle(backlog, take(backlog, limit=1))
    assert calls.count == 1


def test_who_waits_for_an_event_waits_for_no_other_file(backlog: Backlog, writer: Writer) -> None:
    """What the session has in files behind it does not count."""
    calls = Calls()
    awaited = grow(backlog, writer("s", 1))
    writer.begin()
    grow(backlog, writer("s", 2))
    assert backlog.when(calls, "s", awaited) == 1
    settle(backlog, take(backlog, limit=1))
    assert calls.count == 1


def test_who_waits_does_not_wait_for_what_was_dropped(backlog: Backlog, live: Live) -> None:
    """Live-only, an event that found no room is never sent."""
    calls = Calls()
    grow(backlog, live("s", 1, 2), room=1)
    backlog.when(calls, "s")
    assert (drain(backlog), calls.count) == ([1], 1)


def test_who_waits_for_what_is_sent_is_called_at_once(backlog: Backlog, writer: Writer) -> None:
    """Where the file is past the event already there is no wait."""
    calls = Calls()
    awaited = grow(backlog, writer("s", 1))
    grow(backlog, writer("s", 2))
    settle(backlog, take(backlog, limit=1))
    assert (backlog.when(calls, "s", awaited), calls.count) == (1, 1)


def test_where_nothing_is_left_nobody_is_called(backlog: Backlog, writer: Writer) -> None:
    """No call is announced, and none comes."""
    calls = Calls()
    awaited = grow(backlog, writer("s", 1))
    drain(backlog)
    assert backlog.when(calls, "s", awaited) == 0
    assert backlog.when(calls, "s") == 0
    assert backlog.when(calls, None) == 0
    assert calls.count == 0


def test_at_the_end_who_waits_is_released(backlog: Backlog, writer: Writer, live: Live) -> None:
    """What stays in files is not waited for any longer, and neither is what is dropped."""
    calls = Calls()
    grow(backlog, writer("s", 1))
    grow(backlog, live("t", 2))
    assert backlog.when(calls, None) == 2
    backlog.abandon()
    assert (calls.count, backlog.awaited) == (2, False)
    drain(backlog)
    assert calls.count == 2


# What the callback takes


def test_an_undecided_event_holds_back_its_session_and_no_other(
    backlog: Backlog, writer: Writer
) -> None:
    """While the callback is asked, what comes later in that session waits, and nothing else."""
    grow(backlog, writer("a", 1))
    asked = grow(backlog, writer("a", 2), undecided=True)
    grow(backlog, writer("a", 3))
    grow(backlog, writer("b", 11))
    assert sorted(settle(backlog, take(backlog))) == [1, 11]
    assert take(backlog) == []
    backlog.decide(asked, 0, taken=False)
    assert drain(backlog) == [2, 3]


def test_there_is_no_hurry_while_the_callback_is_asked(backlog: Backlog, writer: Writer) -> None:
    """Until it has decided there is nothing to take, and no time at which to look again."""
    asked = grow(backlog, writer("s", 1), undecided=True)
    assert (take(backlog), backlog.seconds_to_next(0.0)) == ([], math.inf)
    backlog.decide(asked, 0, taken=False)
    assert backlog.seconds_to_next(0.0) == 0.0


@pytest.mark.usefixtures("no_memory")
def test_an_undecided_event_holds_back_what_is_read(backlog: Backlog, writer: Writer) -> None:
    """It makes no difference whether events come from memory or from the file."""
    grow(backlog, writer("s", 1))
    asked = grow(backlog, writer("s", 2, 3), undecided=True)
    assert settle(backlog, take(backlog)) == [1]
    assert take(backlog) == []
    backlog.decide(asked, 0, taken=True)
    assert take(backlog) == []
    backlog.decide(asked, 1, taken=False)
    assert drain(backlog) == [3]


def test_what_the_callback_takes_is_not_sent(backlog: Backlog, writer: Writer) -> None:
    """The transport gets the others, in order, and nothing counts as waiting in the end."""
    asked = grow(backlog, writer("s", *range(6)), undecided=True)
    for index in range(6):
        backlog.decide(asked, index, taken=index in (0, 2, 3, 5))
    assert drain(backlog) == [1, 4]
    assert (backlog.lag_events, backlog.sessions) == (0, 0)


def test_what_the_callback_takes_counts_as_reached(backlog: Backlog, writer: Writer) -> None:
    """Who waits for the transport waits for nothing that it will not get."""
    calls = Calls()
    asked = grow(backlog, writer("s", 1), undecided=True)
    backlog.when(calls, "s", asked)
    backlog.decide(asked, 0, taken=True)
    assert (calls.count, backlog.lag_events, backlog.sessions) == (1, 0, 0)
    [cursor] = backlog.changes()
    assert cursor.position == asked.ends[-1]


def test_what_is_taken_while_earlier_events_are_out_is_not_sent(
    backlog: Backlog, writer: Writer
) -> None:
    """The position cannot pass what is being sent; afterwards it passes both."""
    grow(backlog, writer("s", 1))
    asked = grow(backlog, writer("s", 2), undecided=True)
    out = take(backlog)
    backlog.decide(asked, 0, taken=True)
    assert (backlog.lag_events, settle(backlog, out)) == (2, [1])
    assert (backlog.lag_events, backlog.sessions) == (0, 0)


@pytest.mark.usefixtures("small_memory")
def test_what_is_taken_need_not_be_in_memory(backlog: Backlog, writer: Writer) -> None:
    """Of many events in a row that the callback takes not even the file is read."""
    grow(backlog, writer("s", 0))
    asked = grow(backlog, writer("s", *range(1, 50)), undecided=True)
    out = take(backlog)
    for index in range(49):
        backlog.decide(asked, index, taken=True)
    writer.path("s").unlink()
    assert settle(backlog, out) == [0]
    assert (backlog.lag_events, backlog.sessions, backlog.dropped) == (0, 0, 0)


@pytest.mark.parametrize("order", [range(50), range(49, -1, -1)], ids=["forwards", "backwards"])
def test_many_adjoining_events_need_room_for_one(
    backlog: Backlog, writer: Writer, monkeypatch: pytest.MonkeyPatch, order: range
) -> None:
    """What the callback takes during an outage of the transport costs no memory for each."""
    monkeypatch.setattr(_cursor, "MOST_STRETCHES", 1)
    grow(backlog, writer("s", 99))
    out = take(backlog)
    asked = grow(backlog, writer("s", *range(50)), undecided=True)
    for index in order:
        backlog.decide(asked, index, taken=True)
    assert settle(backlog, out) + drain(backlog) == [99]


def test_beyond_that_the_transport_gets_what_the_callback_has(
    backlog: Backlog, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room to note another one, it is sent twice rather than lost."""
    monkeypatch.setattr(_cursor, "MOST_STRETCHES", 2)
    asked = grow(backlog, writer("s", *range(8)), undecided=True)
    for index in (1, 3, 5, 7, 0, 2, 4, 6):
        backlog.decide(asked, index, taken=index % 2 == 1)
    assert drain(backlog) == [0, 2, 4, 5, 6, 7]
    assert backlog.lag_events == 0


def test_a_decision_on_what_is_gone_changes_nothing(backlog: Backlog, live: Live) -> None:
    """Events that were dropped for lack of room, or in a fork, are nobody's to decide on."""
    asked = grow(backlog, live("s", 1, 2), undecided=True, room=1)
    backlog.decide(asked, 1, taken=True)
    backlog.decide(asked, 0, taken=False)
    assert drain(backlog) == [1]
    backlog.decide(asked, 0, taken=True)
    assert (backlog.lag_events, backlog.dropped) == (0, 1)


def test_a_decision_finds_its_file(backlog: Backlog, writer: Writer) -> None:
    """Of a session with several files, or a file with a gap, the part that the event is in."""
    asked = [grow(backlog, writer("s", 1), undecided=True)]
    writer("s", 2)
    asked.append(grow(backlog, writer("s", 3), undecided=True))
    writer.begin()
    asked.append(grow(backlog, writer("s", 4), undecided=True))
    for number, written in reversed(list(enumerate(asked))):
        backlog.decide(written, 0, taken=number > 0)
    assert (drain(backlog), backlog.lag_events) == ([1], 0)


def while_reading(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], error: OSError | None = None
) -> Callable[[], None]:
    """Have another thread do something while a file is being read, which may fail.

    Args:
        monkeypatch: Undoes it.
        call: What is done, once.
        error: What the reading ends with.

    Returns:
        What does it now, where no file was read.
    """
    real, left = _backlog.read_lines, [call]

    def do() -> None:
        while left:
            left.pop()()

    def read(*where: Any) -> list[bytes]:
        lines = real(*where)
        do()
        if error is not None:
            raise error
        return lines

    monkeypatch.setattr(_backlog, "read_lines", read)
    return do


@pytest.mark.usefixtures("no_memory")
def test_what_is_written_while_the_file_is_read_comes_behind_it(
    backlog: Backlog, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer never waits for a reading, and does not get between its events."""
    grow(backlog, writer("s", 1, 2))
    while_reading(monkeypatch, lambda: grow(backlog, writer("s", 3)))
    assert settle(backlog, take(backlog)) == [1, 2]
    assert drain(backlog) == [3]


@pytest.mark.usefixtures("no_memory")
def test_what_is_taken_while_the_file_is_read_is_not_sent(
    backlog: Backlog, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decision that comes during a slow reading counts, and once."""
    asked = grow(backlog, writer("s", 1), undecided=True)
    grow(backlog, writer("s", 2, 3))
    decide = while_reading(monkeypatch, lambda: backlog.decide(asked, 0, taken=True))
    batch = take(backlog, limit=2)
    decide()
    assert backlog.lag_events == 2
    assert settle(backlog, batch) + drain(backlog) == [2, 3]


@pytest.mark.usefixtures("no_memory")
def test_the_last_event_may_be_taken_while_the_file_is_read(
    backlog: Backlog, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that has come to its end meanwhile is no hindrance."""
    asked = grow(backlog, writer("s", 1), undecided=True)
    decide = while_reading(monkeypatch, lambda: backlog.decide(asked, 0, taken=True))
    assert drain(backlog) == []
    decide()
    grow(backlog, writer("t", 2))
    assert (drain(backlog), backlog.sessions) == ([2], 0)


@pytest.mark.usefixtures("no_memory")
def test_a_session_may_end_while_its_file_cannot_be_read(
    backlog: Backlog, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the callback takes meanwhile leaves nothing to try again."""
    asked = grow(backlog, writer("s", 1), undecided=True)
    error = OSError("Input/output error")
    decide = while_reading(monkeypatch, lambda: backlog.decide(asked, 0, taken=True), error)
    assert drain(backlog) == []
    decide()
    monkeypatch.undo()
    grow(backlog, writer("t", 2))
    assert (drain(backlog, now=READ_AGAIN_SECONDS), backlog.sessions) == ([2], 0)


def test_all_that_is_taken_is_passed_at_once(backlog: Backlog, live: Live) -> None:
    """Live-only, other sessions' events between a session's own make no difference."""
    grow(backlog, live("s", 1))
    out = take(backlog)
    for number in (2, 3, 4):
        grow(backlog, live("other", 0))
        asked = grow(backlog, live("s", number), undecided=True)
        backlog.decide(asked, 0, taken=True)
    calls = Calls()
    backlog.when(calls, "s")
    assert settle(backlog, out) == [1]
    assert (backlog.lag_events, calls.count) == (3, 1)


# Without files


def test_live_only_events_come_from_memory(backlog: Backlog, live: Live) -> None:
    """There is no file, and none is read."""
    grow(backlog, live("a", 1, 2))
    grow(backlog, live("b", 3))
    grow(backlog, live("a", 4))
    assert sorted(drain(backlog)) == [1, 2, 3, 4]
    assert (backlog.lag_events, backlog.sessions) == (0, 0)


def test_live_only_memory_is_not_bounded_by_bytes(backlog: Backlog, live: Live) -> None:
    """What may wait is a number of events, which is an option."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_backlog, "BUFFER_BYTES", 0)
        grow(backlog, live("s", *range(20)))
    assert drain(backlog) == list(range(20))


def test_live_only_what_finds_no_room_is_dropped(backlog: Backlog, live: Live) -> None:
    """The oldest events are kept, the newest are counted as dropped."""
    grow(backlog, live("a", 1, 2), room=3)
    grow(backlog, live("b", 3, 4, 5), room=3)
    grow(backlog, live("c", 6), room=3)
    assert (backlog.dropped, backlog.lag_events, backlog.sessions) == (3, 3, 2)
    assert sorted(drain(backlog)) == [1, 2, 3]


def test_live_only_room_comes_back(backlog: Backlog, live: Live) -> None:
    """What is sent makes room for what comes next."""
    grow(backlog, live("s", 1, 2), room=2)
    settle(backlog, take(backlog, limit=1))
    grow(backlog, live("s", 3, 4), room=2)
    assert (backlog.dropped, drain(backlog)) == (1, [2, 3])


def test_live_only_the_end_costs_what_waits(backlog: Backlog, live: Live) -> None:
    """What has no file is counted as dropped when its transport ends."""
    grow(backlog, live("a", 1, 2))
    grow(backlog, live("b", 3))
    backlog.abandon()
    assert (backlog.dropped, backlog.lag_events, backlog.sessions) == (3, 0, 0)
    assert (take(backlog), in_memory(backlog)) == ([], 0)


def test_live_only_the_end_leaves_nothing_to_try_again(backlog: Backlog, live: Live) -> None:
    """What was postponed is dropped, and its time passes without anything."""
    grow(backlog, live("s", 1))
    backlog.postpone(take(backlog)[0][0], 10.0)
    backlog.abandon()
    assert (backlog.seconds_to_next(0.0), take(backlog, now=10.0)) == (math.inf, [])


def test_the_end_costs_nothing_that_has_a_file(backlog: Backlog, writer: Writer) -> None:
    """It is there for whoever comes next."""
    grow(backlog, writer("s", 1, 2))
    backlog.abandon()
    assert (backlog.dropped, backlog.lag_events) == (0, 2)
    assert drain(backlog) == [1, 2]


def test_a_batch_may_come_back_after_the_end(backlog: Backlog, live: Live) -> None:
    """What was out when the rest was dropped is no error of its sender."""
    grow(backlog, live("s", 1, 2))
    out = take(backlog)
    backlog.abandon()
    settle(backlog, out)
    assert backlog.lag_events == 0
    backlog.land()
    assert take(backlog) == []


# Figures, positions, forks


def test_changes_are_told_once(backlog: Backlog, writer: Writer) -> None:
    """Each cursor that has moved since the last question, however often it has moved."""
    grow(backlog, writer("a", 1, 2, 3))
    grow(backlog, writer("b", 4))
    backlog.changes()
    for _ in range(2):
        out = take(backlog, limit=1)
        backlog.settle(out[0][0], 1)
    found = backlog.changes()
    assert sorted(cursor.path for cursor in found) == ["a/log.jsonl", "b/log.jsonl"]
    assert backlog.changes() == []


def test_the_position_is_where_the_first_unsent_event_begins(
    backlog: Backlog, writer: Writer
) -> None:
    """Of a file of which nothing is left it is what the asker knows."""
    written = grow(backlog, writer("s", 1, 2))
    where = (writer.outbox, "s", "s/log.jsonl")
    assert backlog.position(*where, 77) == 0
    settle(backlog, take(backlog, limit=1))
    assert backlog.position(*where, 77) == written.ends[0]
    assert backlog.position(writer.outbox, "s", "s/log-1.jsonl", 77) == 77
    assert backlog.position(None, "s", "s/log.jsonl", 77) == 77
    drain(backlog)
    assert backlog.position(*where, 77) == 77


def test_the_position_is_that_of_the_first_of_two_stretches(
    backlog: Backlog, writer: Writer
) -> None:
    """A file with a gap that is not for this transport is not further on than its first part."""
    first = grow(backlog, writer("s", 1))
    gap = writer("s", 2)
    last = grow(backlog, writer("s", 3))
    assert [cursor.position for cursor in backlog.cursors()] == [0, gap.ends[-1]]
    where = (writer.outbox, "s", "s/log.jsonl")
    assert backlog.position(*where, 77) == 0
    assert settle(backlog, take(backlog, limit=1)) == [1]
    assert first.ends[-1] < backlog.position(*where, 77) == last.begin
    assert drain(backlog) == [3]


def test_the_oldest_is_the_time_of_the_event_that_waits_longest(
    backlog: Backlog, writer: Writer
) -> None:
    """Of all sessions; it grows as they are sent."""
    grow(backlog, writer("b", 3, 4, 5))
    grow(backlog, writer("a", 6))
    assert backlog.oldest == stamp(3)
    settle(backlog, take(backlog, limit=2))
    assert stamp(3) < backlog.oldest < stamp(6)
    drain(backlog)
    assert backlog.oldest == ""
    grow(backlog, writer("a", 7))
    assert backlog.oldest == stamp(7)


@pytest.mark.usefixtures("no_memory")
def test_a_file_of_unknown_age_hides_no_other(backlog: Backlog, writer: Writer) -> None:
    """Where a first line cannot be read, how long the others wait is known all the same."""
    writer("a", 1)
    writer.path("a").write_bytes(b"rubbish\n")
    owe(backlog, writer, "a", writer.path("a"))
    grow(backlog, writer("b", 2))
    assert backlog.oldest == stamp(2)


def test_a_child_begins_with_nothing(backlog: Backlog, writer: Writer) -> None:
    """After a fork all that waits is the parent's, also what is being sent or postponed."""
    for number, session in enumerate("abc"):
        grow(backlog, writer(session, number))
    out = take(backlog, limit=2)
    backlog.postpone(out[0][0], 1.0)
    backlog.forked()
    assert (backlog.lag_events, backlog.sessions, backlog.changes()) == (0, 0, [])
    backlog.land()
    backlog.resume()
    assert (take(backlog, now=2.0), backlog.seconds_to_next(2.0)) == ([], math.inf)
    writer.begin()
    grow(backlog, writer("a", 4))
    assert drain(backlog) == [4]


def test_a_child_waits_for_no_thread_of_its_parent(backlog: Backlog, writer: Writer) -> None:
    """Whoever was in here when the process was copied is not there to come out."""
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        go_on.wait(30)

    awaited = grow(backlog, writer("s", 1))
    grow(backlog, writer("s", 2))
    settle(backlog, take(backlog, limit=1))
    thread = threading.Thread(target=backlog.when, args=(hold, "s", awaited))
    thread.start()
    assert inside.wait(30)
    backlog.forked()
    writer.begin()
    grow(backlog, writer("s", 3))
    assert drain(backlog) == [3]
    go_on.set()
    thread.join(30)


# Any order of anything

WRITE = st.tuples(st.just("write"), st.integers(1, 4), st.integers(0, 1))
DECIDE = st.tuples(st.just("decide"), st.integers(0, 30), st.integers(0, 1))
TAKE = st.tuples(st.just("take"), st.integers(1, 5), st.integers(0, 5))
OTHERS = st.tuples(st.sampled_from(["postpone", "land", "memory"]), st.just(0), st.just(0))


class Play:
    """A session that is written, decided on and sent, beside a model of what has to come out."""

    def __init__(self, base: Path, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.backlog = Fused("peer", Report(None))
        self.writer = Writer(base)
        self.calls = Calls()
        self.expected_calls = 0
        self.asked: list[tuple[Written, int, int]] = []
        self.count = 0
        self.taken: set[int] = set()
        self.undecided: set[int] = set()
        self.sent: list[int] = []

    def write(self, count: int, asked: int) -> None:
        """Write events, and have somebody wait for them."""
        numbers = range(self.count, self.count + count)
        written = grow(self.backlog, self.writer("s", *numbers), undecided=bool(asked))
        self.expected_calls += self.backlog.when(self.calls, "s", written)
        self.count += count
        if asked:
            self.undecided.update(numbers)
            self.asked += [(written, index, number) for index, number in enumerate(numbers)]

    def decide(self, which: int, taken: int) -> None:
        """Decide on one of the events that are undecided."""
        if self.asked:
            written, index, number = self.asked.pop(which % len(self.asked))
            self.undecided.discard(number)
            if taken:
                self.taken.add(number)
            self.backlog.decide(written, index, bool(taken))

    def take(self, limit: int, sent: int) -> None:
        """Send a batch, or a part of it."""
        batch = take(self.backlog, limit)
        if not batch:
            return
        numbers = numbers_of(batch)
        assert not self.undecided & set(range(numbers[-1] + 1)), "it has overtaken"
        self.sent += numbers[:sent]
        self.backlog.settle(batch[0][0], len(numbers[:sent]))

    def postpone(self, *_: int) -> None:
        """Have an event fail."""
        if batch := take(self.backlog):
            self.backlog.postpone(batch[0][0], 0.0)

    def land(self, *_: int) -> None:
        """Have a sender break down."""
        take(self.backlog)
        self.backlog.land()

    def memory(self, *_: int) -> None:
        """Have other transports' events fill the memory, or give it back."""
        full = _backlog.BUFFER_BYTES == 0
        self.patch.setattr(_backlog, "BUFFER_BYTES", 1_000_000 if full else 0)

    def finish(self) -> None:
        """Decide on all, send all."""
        while self.asked:
            self.decide(0, len(self.asked) % 2)
        self.sent += drain(self.backlog)


@given(steps=st.lists(WRITE | DECIDE | TAKE | OTHERS, max_size=25), chunk=st.integers(50, 400))
@settings(deadline=None)
def test_whatever_happens_what_is_not_taken_is_sent_in_order(
    steps: list[tuple[str, int, int]], chunk: int
) -> None:
    """Through decisions in any order, failures, lost batches and full memory the lag ends at 0."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_lines, "CHUNK_BYTES", chunk)
        play = Play(Path(folder), patch)
        for name, first, second in steps:
            getattr(play, name)(first, second)
        play.finish()
        play.writer.files.close()
    assert play.sent == [n for n in range(play.count) if n not in play.taken]
    backlog = play.backlog
    assert (backlog.lag_events, backlog.sessions, backlog.dropped) == (0, 0, 0)
    assert play.calls.count == play.expected_calls


@pytest.mark.usefixtures("no_memory")
def test_a_base_directory_that_is_away_costs_no_event(
    backlog: Backlog, writer: Writer, base: Path
) -> None:
    """Where all of it is gone, an unmounted disk perhaps, it is looked for again later."""
    grow(backlog, writer("s", 1, 2))
    base.rename(base.with_name("away"))
    assert take(backlog) == []
    base.with_name("away").rename(base)
    assert drain(backlog, now=READ_AGAIN_SECONDS) == [1, 2]
    assert backlog.dropped == 0
