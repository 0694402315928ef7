"""Recovery: what dead processes left in rings and files, on a real disk."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventlog_handler import _recovery, _stamp
from eventlog_handler._files import Layout, SessionFiles
from eventlog_handler._handoff import MemoryHandoff
from eventlog_handler._journal import JournalHandoff, journal_directory
from eventlog_handler._paths import SessionPaths
from eventlog_handler._payload import head_of, pack_body
from eventlog_handler._recovery import TAIL_RATIO, recover, repair_tails, written_ids
from eventlog_handler._report import Report
from eventlog_handler._ring import space
from eventlog_handler.typing import EncodedEvent

TAIL = 1_000_000
NOW = 1763793116.123456


@pytest.fixture
def dead_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Let this process be another one from the call on; the call returns what it was before."""
    monkeypatch.setattr(_stamp, "_prefix", _stamp._prefix)

    def die() -> str:
        before = _stamp.process_id()
        _stamp.renew_process_id()
        return before

    return die


@pytest.fixture
def write_to(base: Path) -> Iterator[Callable[..., SessionFiles]]:
    """Make session files as one process has them."""
    made: list[SessionFiles] = []

    def make(suffix: str = ".jsonl", unknown: str = "u1") -> SessionFiles:
        paths = SessionPaths(base, "{session_id}", "unknown_{uuid}", "log", suffix, unknown)
        layout = Layout("json" if suffix == ".json" else "jsonl")
        made.append(
            SessionFiles(paths, layout, max_open_files=9, file_mode=0o600, directory_mode=0o700)
        )
        return made[-1]

    yield make
    for files in made:
        files.close()


def event(session_id: str | None = "s1", body: bytes = b"{}") -> EncodedEvent:
    """Return an event of this process."""
    return EncodedEvent(session_id, "log", _stamp.new_id(), NOW, body)


def packed(event: EncodedEvent) -> bytes:
    """Return an event as a ring's payload."""
    return pack_body(head_of(event), event.body)


def hand_off(handoff: MemoryHandoff, event: EncodedEvent, sync: bool = False) -> bool:
    """Hand an event off."""
    return handoff.put(head_of(event), packed(event), sync)


def put(base: Path, events: list[EncodedEvent], unknown: str = "") -> None:
    """Hand events off, and die."""
    handoff = JournalHandoff(journal_directory(base, 0o700), 1000, 65536, False, unknown)
    for each in events:
        assert hand_off(handoff, each)
    handoff.abandon()


def append(files: SessionFiles, events: list[EncodedEvent]) -> None:
    """Write events to their files."""
    for each in events:
        files.append(each.session_id, [each], lambda _: None)


def recovered(base: Path, files: SessionFiles, report: Report | None = None) -> int:
    """Recover into session files."""

    def write(session_id: str | None, events: list[EncodedEvent]) -> None:
        while events:
            del events[: files.append(session_id, events, lambda _: None)]

    return recover(base, files.directory, write, report or Report(None))


def ids_below(directory: Path) -> list[str]:
    """Return the ids of all lines below a directory; fails where one is no JSON."""
    paths = sorted(p for p in directory.rglob("*.jsonl") if ".eventlog" not in p.parts)
    return [orjson.loads(line)["id"] for p in paths for line in p.read_bytes().splitlines()]


def rings(base: Path) -> list[Path]:
    """Return the ring files that are there."""
    return sorted((base / ".eventlog").glob("*.ring"))


Die = Callable[[], str]
Files = Callable[..., SessionFiles]


def test_what_a_dead_process_handed_off_is_written(
    base: Path, dead_process: Die, write_to: Files
) -> None:
    """Its events are written to their sessions in order, counted, and its rings are removed."""
    events = [event("s1"), event("s2"), event("s1")]
    put(base, events)
    dead_process()
    assert recovered(base, write_to()) == 3
    assert ids_below(base / "s1") == [events[0].id, events[2].id]
    assert ids_below(base / "s2") == [events[1].id]
    assert rings(base) == []


def test_what_was_written_already_is_not_written_again(
    base: Path, dead_process: Die, write_to: Files
) -> None:
    """An event that stands in its session's file is passed over."""
    events = [event(), event()]
    put(base, events)
    append(write_to(), events[:1])
    dead_process()
    assert recovered(base, write_to()) == 1
    assert sorted(ids_below(base)) == sorted(each.id for each in events)
    assert rings(base) == []


def test_all_that_a_ring_can_hold_is_looked_for(
    base: Path, dead_process: Die, write_to: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large a ring was made, the lines of what stands in it are found."""
    searched: list[int] = []

    def noted(directory: Path, process: str, tail_bytes: int) -> set[str]:
        searched.append(tail_bytes)
        return written_ids(directory, process, tail_bytes)

    monkeypatch.setattr(_recovery, "written_ids", noted)
    handoff = JournalHandoff(journal_directory(base, 0o700), 1000, 2**27, False)
    hand_off(handoff, event())
    handoff.abandon()
    dead_process()
    assert recovered(base, write_to()) == 1
    assert searched[0] > TAIL_RATIO * 2**27


@given(st.none() | st.text(), st.text(), st.binary(), st.integers(1, 10**9))
def test_no_line_is_longer_than_what_is_searched_for_it(
    session_id: str | None, kind: str, body: bytes, seq: int
) -> None:
    """A line and its separator take less than `TAIL_RATIO` times the event's record."""
    each = EncodedEvent(session_id, kind, _stamp.new_id(), NOW, body)
    assert len(each.line(seq)) + 2 < TAIL_RATIO * space(packed(each))


def test_nothing_is_written_twice_without_a_session(
    base: Path, dead_process: Die, write_to: Files
) -> None:
    """Events of no session are looked for in the dead process's own unknown directory."""
    events = [event(None), event(None)]
    put(base, events, "unknown_theirs")
    append(write_to(unknown="theirs"), events[:1])
    dead_process()
    recovered(base, write_to(unknown="ours"))
    assert sorted(ids_below(base)) == sorted(each.id for each in events)


def test_a_living_process_is_left_alone(base: Path, dead_process: Die, write_to: Files) -> None:
    """Rings that are locked are neither read nor removed."""
    handoff = JournalHandoff(journal_directory(base, 0o700), 1000, 65536, False)
    hand_off(handoff, event())
    dead_process()
    before = rings(base)
    assert recovered(base, write_to()) == 0
    assert rings(base) == before
    handoff.close()


def test_a_living_process_keeps_its_torn_files(
    base: Path, dead_process: Die, write_to: Files
) -> None:
    """While one of its rings is locked, a process's last line is one that it is writing."""
    events = [event(), event()]
    put(base, [])
    alive = JournalHandoff(journal_directory(base, 0o700), 1000, 65536, False)
    files = write_to()
    append(files, events)
    os.truncate(files.path("s1"), files.path("s1").stat().st_size - 3)
    before = files.path("s1").read_bytes()
    dead_process()
    recovered(base, write_to())
    assert files.path("s1").read_bytes() == before
    alive.close()


def test_this_process_recovers_a_handler_that_it_closed(base: Path, write_to: Files) -> None:
    """A ring of this very process whose owner is gone is written, and its files not repaired."""
    first, second = event(), event()
    put(base, [first])
    files = write_to()
    append(files, [second])
    with open(files.path("s1"), "ab") as file:
        file.write(b'{"torn')
    torn = files.path("s1").read_bytes()
    recovered(base, write_to())
    assert files.path("s1").read_bytes() == torn
    assert (base / "s1" / "log-1.jsonl").exists() or first.id.encode() in torn


def test_where_there_is_nothing_there_is_nothing_to_do(base: Path, write_to: Files) -> None:
    """A base without our directory, or none at all, is no error."""
    assert recovered(base, write_to()) == 0
    base.mkdir()
    assert recovered(base, write_to()) == 0


def test_an_empty_ring_is_removed(base: Path, dead_process: Die, write_to: Files) -> None:
    """A dead process that left no event leaves no file either."""
    put(base, [])
    dead_process()
    assert recovered(base, write_to()) == 0
    assert rings(base) == []


def test_a_ring_stays_until_all_of_it_is_written(
    base: Path, dead_process: Die, write_to: Files
) -> None:
    """A write that fails raises, and the next recovery writes what is missing, nothing twice."""
    events = [event("s1"), event("s2")]
    put(base, events)
    dead_process()
    files = write_to()
    (base / "s2").write_text("in the way")
    with pytest.raises(OSError, match="s2"):
        recovered(base, files)
    assert rings(base) != []
    (base / "s2").unlink()
    assert recovered(base, write_to()) == 1
    assert sorted(ids_below(base)) == sorted(each.id for each in events)


def test_events_of_nested_calls_stand_where_they_were_made(
    base: Path, dead_process: Die, write_to: Files
) -> None:
    """Of several rings of a process the events are put in the order of their numbers."""
    events = [event() for _ in range(20)]
    put(base, events[::2])
    put(base, events[1::2])
    dead_process()
    recovered(base, write_to())
    assert ids_below(base) == [each.id for each in events]


def test_recovered_events_are_synced_before_their_ring_goes(
    base: Path, dead_process: Die, write_to: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk is asked to write, the lines are there and the rings still too."""
    put(base, [event()])
    dead_process()
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "sync", lambda: seen.append((len(ids_below(base)), len(rings(base)))))
    recovered(base, write_to())
    assert seen == [(1, 2)]


def test_lines_that_were_there_already_are_synced_before_their_ring_goes(
    base: Path, dead_process: Die, write_to: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of the dead may be in memory only while its ring was synced: so it is synced too."""
    events = [event()]
    put(base, events)
    append(write_to(), events)
    dead_process()
    seen: list[int] = []
    monkeypatch.setattr(os, "sync", lambda: seen.append(len(rings(base))))
    recovered(base, write_to())
    assert seen == [2]


def test_a_file_that_is_no_ring_of_ours_stops_nothing(
    base: Path, dead_process: Die, write_to: Files
) -> None:
    """A file of another name between the rings does not keep those from being recovered."""
    put(base, [event()])
    dead_process()
    (base / ".eventlog" / "0notes.ring").write_text("something else")
    assert recovered(base, write_to()) == 1


def test_a_damaged_ring_is_kept_aside(base: Path, dead_process: Die, write_to: Files) -> None:
    """A ring that cannot be read at all is counted as damaged, and its bytes are kept."""
    put(base, [event()])
    dead_process()
    # What an event adds to a ring is far more than chance can put into a header.
    largest = max(rings(base), key=lambda path: len(path.read_bytes().replace(b"\0", b"")))
    content = b"\xff" * 4096 + largest.read_bytes()[4096:]
    largest.write_bytes(content)
    report = Report(None)
    assert recovered(base, write_to(), report) == 0
    assert report.dropped == {"damaged": 1}
    assert [p.read_bytes() for p in (base / ".eventlog" / "damaged").iterdir()] == [content]


def test_an_unfinished_ring_is_removed_when_it_is_old(base: Path, write_to: Files) -> None:
    """What a process left that died while it made a ring goes after a minute, not before."""
    own = journal_directory(base, 0o700)
    old, new = own / "old.new", own / "new.new"
    old.touch()
    new.touch()
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    recovered(base, write_to())
    assert (old.exists(), new.exists()) == (False, True)


def test_a_ring_that_vanishes_is_none_of_ours(base: Path) -> None:
    """Another process that recovers at the same time may have removed a ring that was listed."""
    with _recovery._locked(base / "gone.ring") as found:
        assert found is None


def test_a_ring_that_another_has_just_recovered_is_left(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking a ring another process may have finished with it."""
    own = journal_directory(base, 0o700)
    path = own / "p-1-0.ring"
    path.touch()
    flock = fcntl.flock

    def remove_first(fd: int, how: int) -> None:
        path.unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with _recovery._locked(path) as found:
        assert found is None


def test_a_link_in_the_place_of_a_ring_is_not_followed(base: Path, tmp_path: Path) -> None:
    """A ring is never read through a symbolic link."""
    own = journal_directory(base, 0o700)
    (tmp_path / "target").touch()
    (own / "p-1-0.ring").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="p-1-0"), _recovery._locked(own / "p-1-0.ring"):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from eventlog_handler import _stamp
from eventlog_handler._journal import JournalHandoff, journal_directory
from eventlog_handler._payload import head_of, pack_body
from eventlog_handler.typing import EncodedEvent

base = Path(sys.argv[1])
handoff = JournalHandoff(journal_directory(base, 0o700), 1000, 65536, False)
for number in range(5):
    event = EncodedEvent("s1", "log", _stamp.new_id(), 1.5, b"{}")
    assert handoff.put(head_of(event), pack_body(head_of(event), event.body))
    print(event.id, flush=True)
(base / "s1").mkdir()
(base / "s1" / "log.jsonl").write_bytes(event.line(1) + b"\\n" + event.line(2)[:-4])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_is_recovered(base: Path, write_to: Files) -> None:
    """After a SIGKILL the acknowledged events are there once, and the torn line is put aside."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(base)], stdout=subprocess.PIPE, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    ids = done.stdout.decode().split()
    assert len(ids) == 5
    assert recovered(base, write_to()) == 4
    assert sorted(ids_below(base)) == sorted(ids)
    assert len(list((base / ".eventlog" / "torn").iterdir())) == 1


# Ids in files


def test_ids_of_whole_lines_are_found(base: Path, write_to: Files) -> None:
    """The ids of one process are found in all of a session's files, others' are not."""
    events = [event(), event()]
    append(write_to(), events[:1])
    append(write_to(), [events[1], event()._replace(id="other-1")])
    found = written_ids(base / "s1", _stamp.process_id(), TAIL)
    assert found == {each.id for each in events}


def test_ids_are_found_in_an_array(base: Path, write_to: Files) -> None:
    """The lines of a JSON array count like those of a `jsonl` file."""
    events = [event(), event()]
    append(write_to(".json"), events)
    assert written_ids(base / "s1", _stamp.process_id(), TAIL) == {each.id for each in events}


def test_an_id_inside_an_event_is_no_line(base: Path, write_to: Files) -> None:
    """An event that quotes another's line does not make that one written."""
    quoted = event()
    body = orjson.dumps({"text": "\n" + quoted.line(1).decode()})
    append(write_to(), [event(body=body)])
    assert quoted.id not in written_ids(base / "s1", _stamp.process_id(), TAIL)


def test_the_id_of_a_torn_line_does_not_count(base: Path, write_to: Files) -> None:
    """A line without its end was not written."""
    files, torn = write_to(), event()
    append(files, [event(), torn])
    os.truncate(files.path("s1"), files.path("s1").stat().st_size - 1)
    assert torn.id not in written_ids(base / "s1", _stamp.process_id(), TAIL)


def test_only_the_end_of_a_long_file_is_searched(base: Path, write_to: Files) -> None:
    """Of a file longer than can matter, whole lines at its end are searched."""
    events = [event() for _ in range(10)]
    append(write_to(), events)
    length = len(events[0].line(1)) + 1
    found = written_ids(base / "s1", _stamp.process_id(), 3 * length + 5)
    assert found >= {each.id for each in events[7:]}
    assert found <= {each.id for each in events[6:]}


def test_no_ids_are_in_a_directory_that_is_not_there(base: Path) -> None:
    """A session without a directory has no lines."""
    assert written_ids(base / "s1", "p", TAIL) == set()


def test_links_and_directories_are_not_searched(base: Path, write_to: Files) -> None:
    """Only regular files of a session's directory are read."""
    append(write_to(), [event("s2")])
    (base / "s1" / "folder").mkdir(parents=True)
    (base / "s1" / "link.jsonl").symlink_to(base / "s2" / "log.jsonl")
    assert written_ids(base / "s1", _stamp.process_id(), TAIL) == set()


# Torn tails


def torn_file(base: Path, name: str, content: bytes) -> Path:
    """Write a session file that is torn."""
    journal_directory(base, 0o700)
    path = base / "s1" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def aside(base: Path) -> list[bytes]:
    """Return what was cut off files."""
    return [path.read_bytes() for path in (base / ".eventlog").glob("torn/*")]


LINE = b'{"timestamp":"2026","id":"p-1","seq":1,"event":{}}'
OTHER = b'{"timestamp":"2026","id":"p-2","seq":2,"event":{}}'
BOTH = b"[\n" + LINE + b",\n" + OTHER


@pytest.mark.parametrize(
    ("name", "content", "left", "cut"),
    [
        ("log.jsonl", LINE + b"\n" + OTHER[:-5], LINE + b"\n", OTHER[:-5]),
        ("log.jsonl", LINE + b"\n" + OTHER, LINE + b"\n", OTHER),
        ("log.jsonl", LINE[:-5], b"", LINE[:-5]),
        ("log.jsonl", LINE[:12], b"", LINE[:12]),
        ("log.json", b"[\n" + LINE + b",\n" + OTHER[:-5], b"[\n" + LINE + b"\n]\n", None),
        ("log.json", BOTH, BOTH + b"\n]\n", None),
        ("log.json", b"[\n" + LINE + b"\n]", b"[\n" + LINE + b"\n]\n", None),
        ("log.json", b"[\n" + LINE + b",", b"[\n" + LINE + b"\n]\n", None),
        ("log.json", b"[\n" + LINE[:-5], b"[\n]\n", None),
        ("log.json", b"[\n" + LINE + b"\n]\n" + OTHER[:-5], b"[\n" + LINE + b"\n]\n", None),
    ],
)  # fmt: skip
def test_a_torn_tail_is_cut_off_and_kept(
    base: Path, name: str, content: bytes, left: bytes, cut: bytes | None
) -> None:
    """What is not a whole line at the end of a dead process's file goes to a file of its own."""
    path = torn_file(base, name, content)
    repair_tails(base, "p", 0.0, {path.parent: [EncodedEvent("s", "log", "p-1", NOW, b"{}")]})
    assert path.read_bytes() == left
    if cut is not None:
        assert aside(base) == [cut]
    else:
        kept = left.removesuffix(b"\n]\n")
        assert kept + b"".join(aside(base)) == content


def test_an_array_that_is_torn_in_its_first_id_is_known_by_its_event(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is cut off before the id is the dead process's if it begins one of its events."""
    monkeypatch.setattr(_recovery.time, "sleep", None)
    path = torn_file(base, "log.json", b'[\n{"timestamp":"20')
    repair_tails(base, "p", 0.0, {path.parent: [EncodedEvent("s", "log", "p-1", NOW, b"{}")]})
    assert path.read_bytes() == b"[\n]\n"


@pytest.mark.parametrize("fragment", [b"{", b'{"timestamp":"19', b'{"timestamp":"2026","id":"00'])
def test_a_first_line_whose_ring_is_lost_is_nobodys(base: Path, fragment: bytes) -> None:
    """Where no event tells whose a torn first line is, nobody who lives still writes it."""
    files = [torn_file(base, "log.jsonl", fragment), torn_file(base, "log.json", b"[\n" + fragment)]
    repair_tails(base, "p", 0.0)
    assert [path.read_bytes() for path in files] == [b"", b"[\n]\n"]
    assert sorted(aside(base)) == sorted([fragment, b"\n" + fragment])


def test_a_first_line_that_somebody_goes_on_with_is_left_alone(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torn first line that is whole after a moment was a living process's."""
    path = torn_file(base, "log.jsonl", OTHER[:9])
    pauses = []

    def go_on(seconds: float) -> None:
        pauses.append(seconds)
        path.write_bytes(OTHER + b"\n")

    monkeypatch.setattr(_recovery.time, "sleep", go_on)
    repair_tails(base, "p", 0.0)
    assert path.read_bytes() == OTHER + b"\n"
    assert 0 < pauses[0] <= _recovery.SETTLED_SECONDS


@pytest.mark.parametrize("content", [b"", LINE + b"\n"])
def test_a_whole_file_is_left_alone(base: Path, content: bytes) -> None:
    """An empty file, and one that ends with a whole line, are not touched."""
    path = torn_file(base, "log.jsonl", content)
    before = path.stat().st_mtime_ns
    repair_tails(base, "p", 0.0)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, before)
    assert aside(base) == []


def test_a_whole_array_is_left_alone(base: Path) -> None:
    """An array that is closed is not touched."""
    content = b"[\n" + LINE + b"\n]\n"
    path = torn_file(base, "log.json", content)
    repair_tails(base, "p", 0.0)
    assert path.read_bytes() == content


def test_another_process_s_file_is_left_alone(base: Path) -> None:
    """A torn line of a process that may live is one that it is writing."""
    path = torn_file(base, "log.jsonl", LINE + b"\n" + OTHER[:-5])
    repair_tails(base, "q", 0.0)
    assert path.read_bytes() == LINE + b"\n" + OTHER[:-5]


def test_a_file_that_began_with_recovered_events_is_repaired(base: Path) -> None:
    """A process that writes behind lines which it recovered has its torn tail repaired too."""
    line = LINE.replace(b"p-1", b"older-1").replace(b"{}", b'{"text":"%b"}' % (b"x" * 300))
    path = torn_file(base, "log.jsonl", line + b"\n" + LINE + b"\n" + OTHER[:-5])
    repair_tails(base, "p", 0.0)
    assert path.read_bytes() == line + b"\n" + LINE + b"\n"


def test_an_older_file_is_left_alone(base: Path) -> None:
    """What was last written before the process began is not its own."""
    path = torn_file(base, "log.jsonl", LINE[:-5])
    repair_tails(base, "p", time.time() + 3600)
    assert path.read_bytes() == LINE[:-5]


def test_files_of_other_kinds_are_left_alone(base: Path, tmp_path: Path) -> None:
    """Custom files, links, and what lies in our own directory are not repaired."""
    custom = torn_file(base, "log.log", LINE[:-5])
    target = tmp_path / "target.jsonl"
    target.write_bytes(LINE[:-5])
    (base / "s1" / "link.jsonl").symlink_to(target)
    own = base / ".eventlog" / "own.jsonl"
    own.write_bytes(LINE[:-5])
    repair_tails(base, "p", 0.0)
    assert [path.read_bytes() for path in (custom, target, own)] == [LINE[:-5]] * 3


def test_the_same_cut_can_be_kept_twice(base: Path) -> None:
    """A repair that was killed before it cut is done again, and neither copy is in the way."""
    path = torn_file(base, "log.jsonl", LINE[:-5])
    repair_tails(base, "p", 0.0)
    path.write_bytes(LINE[:-5])
    repair_tails(base, "p", 0.0)
    assert aside(base) == [LINE[:-5]] * 2


def test_what_is_kept_aside_is_private(base: Path) -> None:
    """The cut holds conversations: nobody but its owner may read it."""
    torn_file(base, "log.jsonl", LINE[:-5])
    repair_tails(base, "p", 0.0)
    torn = base / ".eventlog" / "torn"
    assert torn.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in torn.iterdir()] == [0o600]
