"""The ring: what is written into it is found again, in order, in any state of it."""

from __future__ import annotations

import secrets
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventlog_handler._payload import head_of, pack_body, unpack
from eventlog_handler._ring import (
    ALIGN,
    HEADER_BYTES,
    Damage,
    Ring,
    read_note,
    read_ring,
    space,
)
from eventlog_handler.typing import EncodedEvent


def event(number: int = 1, body: bytes = b"{}", session_id: str | None = "s1") -> EncodedEvent:
    """Return an event of a process that is called `p`."""
    return EncodedEvent(session_id, "log", f"p-{number}", 1.5, body)


def packed(event: EncodedEvent) -> bytes:
    """Return an event as a ring's payload."""
    return pack_body(head_of(event), event.body)


def read(content: bytes) -> tuple[list[EncodedEvent], list[Damage]]:
    """Return a ring's events, all of one process that is called `p`, and what is damaged."""
    payloads, damage = read_ring(content)
    return [unpack(payload, "p") for payload in payloads], damage


def append(ring: Ring, payload: bytes) -> tuple[int, int] | None:
    """Append a payload; return where its record begins and ends."""
    place = ring.append(payload)
    return None if place is None else place[:2]


def new_ring(capacity: int = 1024) -> Ring:
    """Return an empty ring in memory."""
    return Ring(memoryview(bytearray(HEADER_BYTES + capacity)), secrets.randbits(64))


def content(ring: Ring) -> bytearray:
    """Return a copy of what a file of this ring holds."""
    return bytearray(ring.buffer)


def ids(ring: Ring) -> list[str]:
    """Return the ids of the events that stand in a ring that is not damaged."""
    events, damage = read(bytes(ring.buffer))
    assert damage == []
    return [each.id for each in events]


def test_a_new_ring_is_empty() -> None:
    """A ring into which nothing was written has no event and no damage."""
    assert ids(new_ring()) == []


def test_events_are_read_in_order() -> None:
    """What is appended is read, whole and in the order of the calls."""
    ring = new_ring()
    events = [event(n, b"x" * n) for n in range(5)]
    for each in events:
        assert append(ring, packed(each)) is not None
    assert read(bytes(ring.buffer)) == (events, [])


def test_append_tells_where_a_record_stands() -> None:
    """The region that `append` returns begins where the last ended, in steps of 16 bytes."""
    ring = new_ring()
    payload = packed(event())
    assert append(ring, payload) == (0, space(payload))
    assert append(ring, payload) == (space(payload), 2 * space(payload))
    assert space(payload) % ALIGN == 0
    assert 16 + len(payload) <= space(payload) < 32 + len(payload)


@pytest.mark.parametrize("length", [0, 1, 16_000, 16 * 1024, 40_000])
def test_append_returns_what_is_to_be_kept(length: int) -> None:
    """The payload is there behind the bytes that are told, and nothing is behind it."""
    place = new_ring(65536).append(b"x" * length)
    assert place is not None
    _, _, kept, skip = place
    assert kept[skip:] == b"x" * length


def test_what_is_done_is_not_read_again() -> None:
    """A record that was let go of is not among the events."""
    ring = new_ring()
    regions = [append(ring, packed(event(n))) for n in range(3)]
    assert regions[0] is not None
    ring.done(*regions[0])
    assert ids(ring) == ["p-1", "p-2"]


def test_a_record_that_is_done_early_waits_for_those_before_it() -> None:
    """The room of a later record is free only when all before it are done."""
    ring = new_ring()
    regions = [append(ring, packed(event(n))) for n in range(3)]
    assert regions[0] is not None
    assert regions[1] is not None
    ring.done(*regions[1])
    assert ids(ring) == ["p-0", "p-1", "p-2"]
    ring.done(*regions[0])
    assert ids(ring) == ["p-2"]


def test_clear_lets_go_of_everything() -> None:
    """After `clear` nothing is read, and what was done before it is forgotten."""
    ring = new_ring()
    regions = [append(ring, packed(event(n))) for n in range(3)]
    assert regions[1] is not None
    ring.done(*regions[1])
    ring.clear()
    assert ids(ring) == []
    append(ring, packed(event(7)))
    assert ids(ring) == ["p-7"]


def test_a_full_ring_takes_nothing_more() -> None:
    """`append` returns None when there is no room, and what is there stays."""
    ring = new_ring(256)
    payload = packed(event())
    fit = 256 // space(payload)
    for _ in range(fit):
        assert append(ring, payload) is not None
    before = content(ring)
    assert append(ring, payload) is None
    assert content(ring) == before
    assert len(ids(ring)) == fit


def test_a_ring_can_be_filled_to_its_last_byte() -> None:
    """A record that takes the whole ring is written and read."""
    ring = new_ring(256)
    whole = event(1, b"x" * (240 - len(packed(event(1, b"")))))
    assert append(ring, packed(whole)) == (0, 256)
    assert read(bytes(ring.buffer)) == ([whole], [])
    ring.done(0, 256)
    assert append(ring, packed(whole)) == (256, 512)


def test_a_record_does_not_cross_the_end_of_the_ring() -> None:
    """What does not fit into the rest of a lap begins the next one, and the rest is skipped."""
    ring = new_ring(256)
    first = append(ring, packed(event(1, b"x" * 100)))
    assert first is not None
    ring.done(*first)
    second = append(ring, packed(event(2, b"y" * 100)))
    assert second is not None
    assert second[0] == first[1]
    assert second[1] - 256 == space(packed(event(2, b"y" * 100)))
    assert ids(ring) == ["p-2"]


def test_the_skipped_rest_counts_as_room() -> None:
    """There is no room for a record that would have to skip to where an older one still stands."""
    ring = new_ring(256)
    assert append(ring, packed(event(1, b"x" * 100))) is not None
    assert append(ring, packed(event(2, b"y" * 100))) is None


def test_a_record_without_a_committed_header_does_not_count() -> None:
    """Where the second word is missing, as after a kill in mid-append, there is no event yet."""
    ring = new_ring()
    append(ring, packed(event(1)))
    region = append(ring, packed(event(2)))
    assert region is not None
    cut = content(ring)
    at = HEADER_BYTES + region[0]
    cut[at + 8 : at + 16] = bytes(8)
    cut[2048:2056] = region[0].to_bytes(8, "little")
    events, damage = read(bytes(cut))
    assert [each.id for each in events] == ["p-1"]
    assert damage == []


def test_a_record_that_was_not_noted_in_the_head_is_read() -> None:
    """A process that died between a record and its note of the head has left that record."""
    ring = new_ring()
    region = append(ring, packed(event(1)))
    assert region is not None
    cut = content(ring)
    cut[2048:2056] = bytes(8)
    assert [each.id for each in read(bytes(cut))[0]] == ["p-1"]


def test_what_an_earlier_lap_left_is_not_read() -> None:
    """Behind the last record stands an older lap's, whole, and it is no event."""
    ring = new_ring(256)
    size = space(packed(event()))
    for number in range(256 // size * 3):
        region = append(ring, packed(event(number)))
        assert region is not None
        ring.done(*region)
    append(ring, packed(event(77)))
    assert ids(ring) == ["p-77"]


def test_the_tail_is_found_when_one_slot_is_torn() -> None:
    """With the newer slot of the tail damaged the older one is taken: no event is missed."""
    ring = new_ring()
    for number in range(3):
        region = append(ring, packed(event(number)))
        assert region is not None
        if number < 2:
            ring.done(*region)
    torn = content(ring)
    newer = max((1024, 1536), key=lambda at: int.from_bytes(torn[at : at + 8], "little"))
    torn[newer + 8] ^= 1
    events, damage = read(bytes(torn))
    assert [each.id for each in events] == ["p-1", "p-2"]
    assert damage == []


def test_no_event_is_missed_when_the_newer_tail_is_torn_after_a_lap() -> None:
    """Where the room since the older tail is used again, the events are found all the same."""
    ring = new_ring(256)
    payload = packed(event())
    regions = deque[tuple[int, int]]()
    for number in range(40):
        region = append(ring, packed(event(number)))
        while region is None:
            ring.done(*regions.popleft())
            region = append(ring, packed(event(number)))
        regions.append(region)
    assert len(regions) == 256 // space(payload)
    torn = content(ring)
    newer = max((1024, 1536), key=lambda at: int.from_bytes(torn[at : at + 8], "little"))
    torn[newer + 8] ^= 1
    found = [each.id for each in read(bytes(torn))[0]]
    assert found == [f"p-{n}" for n in range(40 - len(regions), 40)]


def test_both_tails_torn_lose_nothing_in_the_first_lap() -> None:
    """Without any whole slot of the tail reading begins at 0."""
    ring = new_ring()
    region = append(ring, packed(event(1)))
    assert region is not None
    ring.done(*region)
    append(ring, packed(event(2)))
    torn = content(ring)
    torn[1032] ^= 1
    torn[1544] ^= 1
    assert [each.id for each in read(bytes(torn))[0]] == ["p-1", "p-2"]


def test_a_damaged_copy_of_the_header_costs_nothing() -> None:
    """With one of the two headers unreadable the other is taken."""
    ring = new_ring()
    append(ring, packed(event(1)))
    for at in (0, 512):
        torn = content(ring)
        torn[at] ^= 1
        events, damage = read(bytes(torn))
        assert [each.id for each in events] == ["p-1"]
        assert damage == []


def test_a_file_without_a_header_is_one_damage() -> None:
    """Where neither header can be read, the whole file is kept as damaged."""
    ring = new_ring()
    append(ring, packed(event(1)))
    torn = content(ring)
    torn[0] ^= 1
    torn[512] ^= 1
    events, damage = read(bytes(torn))
    assert events == []
    assert [(each.position, each.content) for each in damage] == [(0, bytes(torn))]


def test_a_file_that_was_never_written_is_empty() -> None:
    """Zeros, or no bytes at all, are a ring whose process died while it made it."""
    assert read(b"") == ([], [])
    assert read(bytes(HEADER_BYTES + 256)) == ([], [])


def test_a_damaged_record_costs_that_record_alone() -> None:
    """The records around a damaged one are read, and its bytes are returned as damage."""
    ring = new_ring()
    regions = [append(ring, packed(event(n))) for n in range(3)]
    assert regions[1] is not None
    begin, end = regions[1]
    torn = content(ring)
    torn[HEADER_BYTES + begin + 20] ^= 1
    events, damage = read(bytes(torn))
    assert [each.id for each in events] == ["p-0", "p-2"]
    stretch = bytes(torn[HEADER_BYTES + begin : HEADER_BYTES + end])
    assert [(each.position, each.content) for each in damage] == [(begin, stretch)]


def test_damage_at_the_end_is_kept_up_to_the_head() -> None:
    """A damaged last record is damage too, of exactly its own bytes."""
    ring = new_ring()
    regions = [append(ring, packed(event(n))) for n in range(2)]
    assert regions[1] is not None
    begin, end = regions[1]
    torn = content(ring)
    torn[HEADER_BYTES + begin] ^= 1
    events, damage = read(bytes(torn))
    assert [each.id for each in events] == ["p-0"]
    stretch = bytes(torn[HEADER_BYTES + begin : HEADER_BYTES + end])
    assert [(each.position, each.content) for each in damage] == [(begin, stretch)]


def test_damage_across_the_end_of_the_ring_is_kept_whole() -> None:
    """A damaged stretch that goes on at the ring's beginning is put together."""
    ring = new_ring(256)
    first = append(ring, packed(event(1, b"x" * 100)))
    assert first is not None
    ring.done(*first)
    append(ring, packed(event(2, b"y" * 100)))
    torn = content(ring)
    torn[HEADER_BYTES + first[1]] ^= 1
    torn[HEADER_BYTES] ^= 1
    events, damage = read(bytes(torn))
    assert events == []
    area = bytes(torn[HEADER_BYTES:])
    end = ring.head - 256
    assert [each.content for each in damage] == [area[first[1] :] + area[:end]]


def test_content_that_looks_like_a_record_is_no_event() -> None:
    """The bytes of a whole record inside a damaged one's body do not pass for an event."""
    inner = new_ring()
    append(inner, packed(event(9)))
    forged = bytes(inner.buffer[HEADER_BYTES:])[: inner.head]
    ring = new_ring()
    append(ring, packed(event(1, b"x" * (-(16 + len(packed(event(1, b"")))) % ALIGN) + forged)))
    torn = content(ring)
    torn[HEADER_BYTES] ^= 1
    assert read(bytes(torn))[0] == []


Steps = list[tuple[int, int]]
STEPS = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 3)), min_size=1, max_size=60)


def used(ring: Ring, steps: Steps) -> list[EncodedEvent]:
    """Append an event of each length, each time let go of as many; return what has to be there."""
    waiting: deque[tuple[EncodedEvent, tuple[int, int]]] = deque()
    for number, (length, done) in enumerate(steps):
        each = event(number, b"z" * length)
        region = append(ring, packed(each))
        if region is not None:
            waiting.append((each, region))
        for _ in range(min(done, len(waiting))):
            ring.done(*waiting.popleft()[1])
    return [each for each, _ in waiting]


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_what_is_not_done_is_read(steps: Steps) -> None:
    """After any calls the ring reads as the records that were accepted and not let go of."""
    ring = new_ring(512)
    waiting = used(ring, steps)
    assert read(bytes(ring.buffer)) == (waiting, [])


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_a_torn_tail_costs_no_event(steps: Steps) -> None:
    """With the newer slot of the tail torn, whatever has to be there is read, in order."""
    ring = new_ring(512)
    waiting = used(ring, steps)
    torn = content(ring)
    newer = max((1024, 1536), key=lambda at: int.from_bytes(torn[at : at + 8], "little"))
    torn[newer] ^= 1
    events, _ = read(bytes(torn))
    assert events[len(events) - len(waiting) :] == waiting


def test_a_note_is_read_back() -> None:
    """What the owner noted is there; where it cannot be read there is none."""
    ring = Ring(memoryview(bytearray(HEADER_BYTES + 512)), 7, b"unknown_1")
    torn = bytearray(ring.buffer)
    torn[2560 + 16] ^= 1
    assert [read_note(bytes(each)) for each in (ring.buffer, torn, b"short")] == [
        b"unknown_1",
        b"",
        b"",
    ]


class BrokenOff:
    """A ring's buffer whose n-th store is broken off, as by Ctrl-C."""

    def __init__(self, buffer: memoryview, stores: int) -> None:
        self.content = buffer
        self._left = stores

    def __setitem__(self, at: slice, data: bytes) -> None:
        """Store, or raise."""
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt
        self.content[at] = data


@pytest.mark.parametrize("stores", [1, 2])
def test_an_append_that_is_broken_off_as_a_lap_ends_breaks_no_other(stores: int) -> None:
    """Whether or not the new lap has begun already, the next event finds its place."""
    ring = new_ring(512)
    region = append(ring, packed(event(1, b"x" * 300)))
    assert region is not None
    ring.done(*region)
    ring.buffer = BrokenOff(ring.buffer, stores)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        append(ring, packed(event(2, b"y" * 300)))
    ring.buffer = ring.buffer.content  # type: ignore[attr-defined]
    assert append(ring, packed(event(3, b"z" * 100))) is not None
    assert ids(ring) == ["p-3"]
