"""Damage, exhaustively: every cut and every flipped bit of a ring, every cut of a session file."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from eventlog_handler import _ring
from eventlog_handler._journal import JournalHandoff, journal_directory
from eventlog_handler._payload import head_of, pack_body, unpack
from eventlog_handler._recovery import recover
from eventlog_handler._report import Report
from eventlog_handler._ring import HEADER_BYTES, Damage, Ring, read_ring, space
from eventlog_handler._stamp import process_id
from eventlog_handler.typing import EncodedEvent

NOW = 1763793116.123456
NONCE = 0x0123_4567_89AB_CDEF
COUNT = 20


def event(number: int, process: str = "p") -> EncodedEvent:
    """Return a small event of a process."""
    return EncodedEvent("s", "log", f"{process}-{number}", NOW, b'{"n":%d}' % number)


def packed(event: EncodedEvent) -> bytes:
    """Return an event as a ring's payload."""
    return pack_body(head_of(event), event.body)


def read(content: bytes) -> tuple[list[EncodedEvent], list[Damage]]:
    """Return a ring's events, all of one process that is called `p`, and what is damaged."""
    payloads, damage = read_ring(content)
    return [unpack(payload, "p") for payload in payloads], damage


def filled(laps: int) -> Ring:
    """Return a ring with 20 events and no room for another, after some laps of others."""
    payload = packed(event(1000))
    ring = Ring(memoryview(bytearray(HEADER_BYTES + COUNT * space(payload))), NONCE)
    for number in range(laps * COUNT + 7 * bool(laps)):
        region = ring.append(packed(event(2000 + number)))
        assert region is not None
        ring.done(*region[:2])
    for number in range(COUNT):
        assert ring.append(packed(event(1000 + number))) is not None
    return ring


def changes(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Return each single flipped bit's position, and the content with it."""
    for at in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            yield at, bytes(changed)


def check_flips(laps: int) -> Counter[str]:
    """Flip every bit; return how many cases there were, and what they cost."""
    content = bytes(filled(laps).buffer)
    whole, damage = read(content)
    assert len(whole) == COUNT
    assert damage == []
    size = (len(content) - HEADER_BYTES) // COUNT
    first = 7 if laps else 0
    told: Counter[str] = Counter()
    for at, changed in changes(content):
        events, damage = read(changed)
        lost = [each for each in whole if each not in events]
        told["cases"] += 1
        told["events lost"] += len(lost)
        told["stretches kept aside"] += len(damage)
        # In order, and each true: what an older tail brings back was let go of, and is not false.
        kept = [each for each in events if each in whole]
        assert kept == [each for each in whole if each not in lost], at
        released = [each for each in events if each not in whole]
        assert all(each == event(int(each.id[2:])) for each in released), at
        if at < HEADER_BYTES:
            assert lost == [], at
        else:
            hit = whole[((at - HEADER_BYTES) // size - first) % COUNT]
            assert lost in ([], [hit]), at
            assert len(damage) == len(lost), at
    return told


@pytest.mark.parametrize("laps", [0, 1])
def test_a_flipped_bit_costs_one_event_at_most(laps: int) -> None:
    """Whichever bit of a ring flips, only its own record is lost, and then counted."""
    told = check_flips(laps)
    print(f"bits of a ring of {COUNT} records, {laps} laps: {dict(told)}")
    assert told["cases"] == 8 * (HEADER_BYTES + COUNT * space(packed(event(1000))))
    assert told["events lost"] > 0


def check_ring_cuts() -> Counter[str]:
    """Cut the ring's file at every byte; return how many cases there were, and what they cost."""
    content = bytes(filled(0).buffer)
    whole, _ = read(content)
    size = (len(content) - HEADER_BYTES) // COUNT
    told: Counter[str] = Counter()
    for length in range(len(content)):
        events, damage = read(content[:length])
        told["cases"] += 1
        told["events lost"] += COUNT - len(events)
        left = max(0, length - HEADER_BYTES)
        # A record's last bytes may be its padding, and with them nothing is lost.
        assert events in (whole[: left // size], whole[: left // size + 1]), length
        assert damage or len(events) == COUNT or not content[:length].strip(b"\0"), length
    return told


def test_a_cut_ring_costs_what_was_cut_off() -> None:
    """Wherever a ring's file ends, the records in front of the cut are read; the rest is told."""
    told = check_ring_cuts()
    print(f"cuts of a ring of {COUNT} records: {dict(told)}")
    assert told["cases"] == HEADER_BYTES + COUNT * space(packed(event(1000)))


def write_session(path: Path, events: list[EncodedEvent]) -> None:
    """Write a file as `SessionFiles` leaves it."""
    lines = [each.line(seq) for seq, each in enumerate(events, 1)]
    if path.suffix == ".jsonl":
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    else:
        path.write_bytes(b"[\n" + b",\n".join(lines) + b"\n]\n")


def ids_in(path: Path) -> list[str]:
    """Return the ids of a file's events; fails where the file is not what its name says."""
    content = path.read_bytes()
    if path.suffix == ".json":
        return [line["id"] for line in orjson.loads(content)] if content else []
    assert content.endswith(b"\n") or not content
    return [orjson.loads(line)["id"] for line in content.splitlines()]


def check_file_cut(base: Path, whole: Path, length: int) -> int:
    """Recover from a file that is cut at `length`, its events in a ring; return what was added."""
    session = base / "s"
    torn = session / whole.name
    session.mkdir(parents=True)
    content = whole.read_bytes()
    torn.write_bytes(content[:length])
    ring = Ring(memoryview(bytearray(HEADER_BYTES + 4096)), NONCE)
    for number in range(4):
        ring.append(packed(event(number, "dead")))
    own = journal_directory(base, 0o700)
    (own / "dead-1-0.ring").write_bytes(bytes(ring.buffer))
    added: list[str] = []

    def write(session_id: str | None, events: list[EncodedEvent]) -> None:
        write_session(session / f"new{whole.suffix}", events)
        added.extend(each.id for each in events)

    recover(base, lambda _: session, write, Report(None))
    there = ids_in(torn)
    assert sorted(there + added) == [f"dead-{n:x}" for n in range(4)], length
    repaired = torn.read_bytes()
    aside = sorted((own / "torn").glob("*")) if (own / "torn").exists() else []
    kept = b"".join(path.read_bytes() for path in aside)
    before = content[:length]
    # All that was there is in one of the two places; of an array its end may be new.
    end = b"\n]\n" if torn.suffix == ".json" and repaired != before else b""
    assert repaired.removesuffix(end) + kept == before, length
    assert list(own.glob("*.ring")) == []
    return len(added)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_cut_session_file_is_repaired(tmp_path: Path, suffix: str) -> None:
    """Wherever a file ends, it is made whole, the cut is kept, and each event is there once."""
    whole = tmp_path / f"log{suffix}"
    write_session(whole, [event(number, "dead") for number in range(4)])
    length = len(whole.read_bytes())
    added, wrong = Counter[int](), []
    for cut in range(length + 1):
        try:
            added[check_file_cut(tmp_path / "base", whole, cut)] += 1
        except (AssertionError, ValueError) as error:
            wrong.append((cut, str(error)[:200]))
        shutil.rmtree(tmp_path / "base")
    print(f"cuts of a {suffix} file: {length + 1}; by events recovered: {dict(added)}")
    assert wrong == [], f"{len(wrong)} of {length + 1}, from {wrong[0]} to {wrong[-1]}"


def test_a_damaged_ring_is_counted_and_kept_aside(tmp_path: Path) -> None:
    """Recovery writes the events around a damaged record, counts it, and keeps its bytes."""
    own = journal_directory(tmp_path, 0o700)
    torn = bytearray(filled(0).buffer)
    torn[HEADER_BYTES + 40] ^= 1
    size = space(packed(event(1000)))
    (own / "dead-1-0.ring").write_bytes(torn)
    written: list[str] = []
    report = Report(None)

    def write(_: str | None, events: list[EncodedEvent]) -> None:
        written.extend(each.id for each in events)

    assert recover(tmp_path, lambda _: tmp_path / "s", write, report) == COUNT - 1
    assert written == [event(1000 + n, "dead").id for n in range(1, COUNT)]
    assert report.dropped == {"damaged": 1}
    kept = [path.read_bytes() for path in (own / "damaged").iterdir()]
    assert kept == [bytes(torn[HEADER_BYTES : HEADER_BYTES + size])]


# Each safeguard taken out in turn: the checks above have to notice.


def _without_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ring, "_checksum", lambda payload, start: 0)


def test_without_a_checksum_the_flips_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring whose records have no checksum returns false events, and the check says so."""
    _without_checksum(monkeypatch)
    with pytest.raises((AssertionError, ValueError)):
        check_flips(0)


def _no_repair(base: Path, process: str, since: float, lines: object) -> None:
    """Repair nothing."""


def test_without_repair_the_cuts_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recovery that leaves torn tails is noticed at a cut in the last line."""
    monkeypatch.setattr("eventlog_handler._recovery.repair_tails", _no_repair)
    whole = tmp_path / "log.jsonl"
    write_session(whole, [event(number, "dead") for number in range(4)])
    with pytest.raises(AssertionError):
        check_file_cut(tmp_path / "base", whole, len(whole.read_bytes()) - 5)


def test_without_a_search_for_duplicates_the_cuts_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recovery that writes what stands there already is noticed at once."""
    monkeypatch.setattr("eventlog_handler._recovery.written_ids", lambda *_: set[str]())
    whole = tmp_path / "log.jsonl"
    write_session(whole, [event(number, "dead") for number in range(4)])
    with pytest.raises(AssertionError):
        check_file_cut(tmp_path / "base", whole, len(whole.read_bytes()))


class Killed(BaseException):
    """Stands for a SIGKILL between two stores."""


class Fused:
    """A ring's buffer that dies at its n-th store."""

    def __init__(self, buffer: memoryview, stores: int) -> None:
        self.content = buffer
        self._left = stores

    def __setitem__(self, at: slice, data: bytes) -> None:
        """Store, or die."""
        if not self._left:
            raise Killed
        self._left -= 1
        self.content[at] = data


def check_kills_between_stores() -> int:
    """Kill an append before each of its stores; return how many cases there were."""
    payload = packed(event(1000))
    cases = 0
    for used in range(9):
        for stores in range(20):
            ring = Ring(memoryview(bytearray(HEADER_BYTES + 4 * space(payload) + 16)), NONCE)
            for number in range(used):
                region = ring.append(packed(event(number)))
                assert region is not None
                ring.done(*region[:2])
            fused = Fused(ring.buffer, stores)
            ring.buffer = fused  # type: ignore[assignment]
            acknowledged = []
            try:
                for number in (1000, 1001):
                    ring.append(packed(event(number)))
                    acknowledged.append(event(number))
            except Killed:
                pass
            events, damage = read(bytes(fused.content))
            assert damage == []
            assert events[: len(acknowledged)] == acknowledged
            assert events in (
                [event(1000 + n) for n in range(len(acknowledged))],
                [event(1000 + n) for n in range(len(acknowledged) + 1)],
            )
            cases += 1
    return cases


def test_a_kill_between_two_stores_tears_nothing() -> None:
    """Whichever store of an append is the last, acknowledged events are there and none is false."""
    cases = check_kills_between_stores()
    print(f"kills between two stores: {cases}")
    assert cases == 180


class _HeaderFirst(Ring):
    """The broken variant: the header is committed before the payload."""

    def append(self, payload: bytes) -> tuple[int, int] | None:
        begin, size, buffer = self.head, space(payload), self.buffer
        position = begin if begin + size <= self._free else self._make_room(size)
        assert position is not None
        at = HEADER_BYTES + position % self.capacity
        buffer[at : at + 8] = (position ^ self._nonce).to_bytes(8, "little")
        check = _ring._checksum(payload, position + 1)
        buffer[at + 8 : at + 16] = (len(payload) << 32 | check).to_bytes(8, "little")
        self._head[0] = self.head = position + size
        buffer[at + 16 : at + 16 + len(payload)] = payload
        return begin, self.head


@pytest.mark.parametrize("checksum", [True, False])
def test_a_header_before_its_payload_is_noticed(
    monkeypatch: pytest.MonkeyPatch, checksum: bool
) -> None:
    """A ring that commits first leaves damage after a kill, without a checksum a false event."""
    if not checksum:
        _without_checksum(monkeypatch)
    monkeypatch.setattr("tests.reliability.test_corruption.Ring", _HeaderFirst)
    with pytest.raises((AssertionError, ValueError, UnicodeDecodeError)):
        check_kills_between_stores()


def test_a_dead_ring_of_this_process_is_read_like_any_other(tmp_path: Path) -> None:
    """The rings of these tests are made as the journal makes them: its own file reads the same."""
    handoff = JournalHandoff(journal_directory(tmp_path, 0o700), 100, 4096, False)
    each = event(1, process_id())
    assert handoff.put(head_of(each), packed(each))
    handoff.abandon()
    found = [read(path.read_bytes())[0] for path in (tmp_path / ".eventlog").glob("*.ring")]
    assert sorted(map(len, found)) == [0, 1]
