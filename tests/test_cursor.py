"""How far a transport is in one file: what is next, and what a callback has taken."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventlog_handler import _cursor
from eventlog_handler._cursor import Cursor
from eventlog_handler._outbox import Outbox
from eventlog_handler._report import Report
from eventlog_handler.typing import OutgoingEvent, Written

PATH = "s/log.jsonl"


def make_outbox(base: Path) -> Outbox:
    """Return an outbox that is never asked for anything."""
    return Outbox(base, 0o700, Report(None), list)


def make_cursor(outbox: Outbox | None = None) -> Cursor:
    """Return one at the beginning of a session."""
    return Cursor(outbox, PATH, "s", 0, growing=True)


def written(outbox: Outbox | None, path: str, begin: int) -> Written:
    """Return what was written somewhere; which events that were is of no interest here."""
    return Written(outbox, path, "s", begin, 1, [], [])


def filled(*begins: int) -> Cursor:
    """Return a cursor with events of ten bytes in its memory, told by where they begin."""
    cursor = make_cursor()
    for begin in begins:
        event = OutgoingEvent(b"", str(begin), "s", "note", "")
        cursor.buffer.append((event, begin, begin + 10))
    return cursor


def sendable(cursor: Cursor) -> list[int]:
    """Return where the events begin that could be sent now."""
    return [int(event.id) for event in cursor.sendable()]


def test_it_is_told_by_outbox_and_path(tmp_path: Path) -> None:
    """The same path below another base is another file."""
    outbox, other = make_outbox(tmp_path / "a"), make_outbox(tmp_path / "b")
    cursor = make_cursor(outbox)
    assert cursor.is_of(outbox, PATH)
    assert not cursor.is_of(outbox, "s/log-1.jsonl")
    assert not cursor.is_of(other, PATH)
    assert not cursor.is_of(None, PATH)


def test_what_follows_its_end_continues_it(tmp_path: Path) -> None:
    """Of the same file, only what begins where it ends belongs to it: a gap is not to be sent."""
    outbox = make_outbox(tmp_path)
    cursor = make_cursor(outbox)
    cursor.end = 30
    assert cursor.continues(written(outbox, PATH, 30))
    assert not cursor.continues(written(outbox, PATH, 40))
    assert not cursor.continues(written(outbox, "s/log-1.jsonl", 30))
    assert not cursor.continues(written(None, PATH, 30))


def test_without_a_file_any_number_continues_it() -> None:
    """Live-only, other sessions' events are numbered in between, and are no gap."""
    cursor = make_cursor()
    cursor.end = 30
    assert cursor.continues(written(None, PATH, 99))


def test_a_file_is_done_at_its_end(tmp_path: Path) -> None:
    """With a file it is the position that counts, whatever is in memory."""
    cursor = make_cursor(make_outbox(tmp_path))
    cursor.end = 10
    assert not cursor.done
    cursor.position = 10
    assert cursor.done


def test_without_a_file_it_is_done_when_memory_is_empty() -> None:
    """Live-only, what is in memory is all there is."""
    cursor = filled(0)
    assert not cursor.done
    cursor.buffer.clear()
    assert cursor.done


def test_the_head_is_the_first_in_memory_or_the_position() -> None:
    """The next event begins where the memory does; without any, at the position."""
    cursor = filled(20, 30)
    assert cursor.head == 20
    cursor.buffer.clear()
    cursor.position = 15
    assert cursor.head == 15


def test_all_in_memory_is_sendable() -> None:
    """Without a callback nothing is held back."""
    assert sendable(filled(0, 10, 20)) == [0, 10, 20]


def test_an_undecided_event_holds_back_itself_and_all_behind_it() -> None:
    """What the callback is being asked about is not overtaken."""
    cursor = filled(0, 10, 20)
    cursor.undecided.add(10)
    assert sendable(cursor) == [0]


def test_a_taken_event_ends_a_batch() -> None:
    """What the callback has taken is not sent; what is behind it comes with the next batch."""
    cursor = filled(0, 10, 20)
    cursor.skip(10, 20)
    assert sendable(cursor) == [0]


def test_taken_events_at_the_head_are_passed() -> None:
    """The position goes on to the first event that is not taken, and the passed are counted."""
    cursor = make_cursor()
    cursor.skip(0, 10)
    cursor.skip(10, 20)
    cursor.skip(30, 40)
    assert (cursor.pass_taken(), cursor.position) == (2, 20)
    assert (cursor.pass_taken(), cursor.position) == (0, 20)


def test_a_gap_between_taken_events_can_be_filled() -> None:
    """An event that is taken last joins those before and behind it."""
    cursor = make_cursor()
    for begin in (0, 20, 10):
        cursor.skip(begin, begin + 10)
    assert (cursor.pass_taken(), cursor.position) == (3, 30)


@pytest.mark.parametrize("order", [range(10, 10_000, 10), range(9_990, 0, -10)], ids=["up", "down"])
def test_adjoining_taken_events_are_one_stretch(
    order: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many events are taken in a row, they need room for one."""
    monkeypatch.setattr(_cursor, "MOST_STRETCHES", 1)
    cursor = make_cursor()
    for begin in order:
        cursor.skip(begin, begin + 10)
    assert cursor.pass_taken() == 0
    cursor.skip(0, 10)
    assert (cursor.pass_taken(), cursor.position) == (1000, 10_000)


def test_beyond_the_most_stretches_an_event_counts_as_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where there is no room for another stretch the transport gets the event too."""
    monkeypatch.setattr(_cursor, "MOST_STRETCHES", 2)
    cursor = filled(0, 10, 20, 30, 40)
    for begin in (10, 30, 50):
        cursor.skip(begin, begin + 10)
    cursor.buffer.clear()
    passed = []
    for position in (10, 30, 50):
        cursor.position = position
        passed.append(cursor.pass_taken())
    assert passed == [1, 1, 0]


def test_room_is_given_back_by_what_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only stretches that lie ahead count."""
    monkeypatch.setattr(_cursor, "MOST_STRETCHES", 1)
    cursor = make_cursor()
    cursor.skip(0, 10)
    assert cursor.pass_taken() == 1
    cursor.position = 20
    cursor.skip(20, 30)
    assert cursor.pass_taken() == 1


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=30), st.data())
@settings(deadline=None)
def test_the_position_is_behind_the_taken_ones_whatever_the_order(
    events: list[tuple[int, bool]], data: st.DataObject
) -> None:
    """After each decision the position is at the first event that is not, or not yet, taken."""
    ends = list(itertools.accumulate(size for size, _ in events))
    begins = [0, *ends[:-1]]
    cursor, taken, passed = make_cursor(), set[int](), 0
    for index in data.draw(st.permutations(range(len(events)))):
        if events[index][1]:
            taken.add(index)
            cursor.skip(begins[index], ends[index])
        passed += cursor.pass_taken()
        first = next(n for n in range(len(events) + 1) if n not in taken)
        assert (passed, cursor.position) == (first, [*begins, ends[-1]][first])


@given(st.lists(st.sampled_from(["undecided", "taken", "free"]), max_size=20))
@settings(deadline=None)
def test_sendable_is_up_to_the_first_that_is_not_free(states: list[str]) -> None:
    """Whatever is decided of which events, exactly those before the first other are sendable."""
    cursor = filled(*range(0, 10 * len(states), 10))
    for number, state in enumerate(states):
        if state == "undecided":
            cursor.undecided.add(10 * number)
        elif state == "taken":
            cursor.skip(10 * number, 10 * number + 10)
    free = itertools.takewhile(lambda state: state == "free", states)
    assert sendable(cursor) == [10 * n for n, _ in enumerate(free)]
