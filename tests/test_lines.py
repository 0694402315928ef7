"""Session files read back: whole lines, their events, how much there is, which files there are."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventlog_handler import _lines
from eventlog_handler._encode import encode
from eventlog_handler._lines import Extent, find_files, measure, parse_line, read_lines
from eventlog_handler._paths import SessionPaths
from eventlog_handler._rejected import park, set_aside
from eventlog_handler.typing import EncodedEvent, OutgoingEvent

SECONDS = 1767225600.0
NOW = "2026-01-01T00:00:00.000000+00:00"
LINES = st.lists(st.binary(max_size=40).filter(lambda line: b"\n" not in line), max_size=12)
TAILS = st.binary(max_size=30).filter(lambda tail: b"\n" not in tail)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory for many examples."""
    return tmp_path_factory.mktemp("lines")


def put(base: Path, path: str, *lines: bytes, tail: bytes = b"") -> int:
    """Make a file of lines, and of the beginning of one; return where the last whole one ends."""
    (base / path).parent.mkdir(parents=True, exist_ok=True)
    whole = b"".join(line + b"\n" for line in lines)
    (base / path).write_bytes(whole + tail)
    return len(whole)


def line_of(seq: int, session: str = "s", padding: int = 0, process: str = "a" * 20) -> bytes:
    """Return a line as session files have it."""
    body = encode({"type": "note", "session_id": session, "pad": "x" * padding})
    return EncodedEvent(session, "note", f"{process}-{seq:x}", SECONDS, body).line(seq)


def read_all(base: Path, path: str, begin: int, end: int) -> list[list[bytes]]:
    """Return what each reading brings, until the end."""
    found = []
    while begin < end:
        found.append(read_lines(base, path, begin, end))
        begin += sum(len(line) + 1 for line in found[-1])
    return found


def paths_of(base: Path, pattern: str = "{session_id}") -> SessionPaths:
    """Return how directories below a base are named."""
    return SessionPaths(base, pattern, "unknown_{uuid}", "log", ".jsonl", "u1")


def test_lines_come_without_their_line_feeds(base: Path) -> None:
    """All lines from a byte on are returned, as they were written."""
    end = put(base, "s/log.jsonl", b"one", b"two", b"three")
    assert read_lines(base, "s/log.jsonl", 4, end) == [b"two", b"three"]


def test_nothing_is_read_past_the_end(base: Path) -> None:
    """What lies behind the end is not returned, even if it is whole lines."""
    put(base, "s/log.jsonl", b"one", b"two", b"left by a failed write")
    assert read_lines(base, "s/log.jsonl", 0, 8) == [b"one", b"two"]


def test_one_reading_brings_about_a_chunk(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many whole lines are returned as a chunk has, for the next reading to go on behind."""
    monkeypatch.setattr(_lines, "CHUNK_BYTES", 10)
    end = put(base, "s/log.jsonl", b"1234", b"5678", b"9012", b"3456")
    assert read_all(base, "s/log.jsonl", 0, end) == [[b"1234", b"5678"], [b"9012", b"3456"]]


def test_a_line_longer_than_a_chunk_is_returned_whole(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a line is, a reading brings it."""
    monkeypatch.setattr(_lines, "CHUNK_BYTES", 10)
    put(base, "s/log.jsonl", b"x" * 95, b"y")
    assert read_lines(base, "s/log.jsonl", 0, 96) == [b"x" * 95]


@pytest.mark.parametrize("kept", [0, 4, 6, 8])
def test_a_file_that_was_cut_is_told(base: Path, kept: int) -> None:
    """Where a file ends before the first line does, that is an EOFError."""
    end = put(base, "s/log.jsonl", b"one", b"two", b"three")
    os.truncate(base / "s" / "log.jsonl", kept)
    begin = 8 if kept == 8 else 4
    with pytest.raises(EOFError, match=rf"s/log\.jsonl ends before byte {end}"):
        read_lines(base, "s/log.jsonl", begin, end)


def test_what_is_whole_of_a_cut_file_is_returned(base: Path) -> None:
    """The lines before the cut are not lost."""
    end = put(base, "s/log.jsonl", b"one", b"two", b"three")
    os.truncate(base / "s" / "log.jsonl", 10)
    assert read_lines(base, "s/log.jsonl", 0, end) == [b"one", b"two"]


@pytest.mark.parametrize("link", ["s", "s/log.jsonl"])
@pytest.mark.parametrize("read", [lambda base: read_lines(base, "s/log.jsonl", 0, 4), None])
def test_no_link_below_the_base_is_followed(
    base: Path, tmp_path: Path, link: str, read: Callable[[Path], object] | None
) -> None:
    """A link in the place of a directory or a file is an error, whatever it leads to."""
    put(tmp_path, "elsewhere/log.jsonl", b"one")
    (base / link).parent.mkdir(parents=True)
    target = "elsewhere" if link == "s" else "elsewhere/log.jsonl"
    (base / link).symlink_to(tmp_path / target)
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        (read or (lambda base: measure(base, "s/log.jsonl", 0)))(base)


@pytest.mark.parametrize("path", ["s/gone.jsonl", "gone/log.jsonl"])
def test_a_missing_file_is_told(base: Path, path: str) -> None:
    """Whether it is the file or its directory that is gone."""
    put(base, "s/log.jsonl", b"one")
    with pytest.raises(FileNotFoundError):
        read_lines(base, path, 0, 4)
    with pytest.raises(FileNotFoundError):
        measure(base, path, 0)


def test_no_descriptor_is_left_open(base: Path) -> None:
    """Neither reading nor measuring costs a descriptor, even where they fail."""
    end = put(base, "s/log.jsonl", b"one")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read_lines(base, "s/log.jsonl", 0, end)
        measure(base, "s/log.jsonl", 0)
        with pytest.raises(EOFError):
            read_lines(base, "s/log.jsonl", end, end + 1)
        with pytest.raises(FileNotFoundError):
            measure(base, "s/gone.jsonl", 0)
    assert len(os.listdir("/proc/self/fd")) == before


@given(lines=LINES, tail=TAILS, chunk=st.integers(1, 64), data=st.data())
@settings(deadline=None)
def test_reading_on_brings_every_line_once(
    folder: Path, lines: list[bytes], tail: bytes, chunk: int, data: st.DataObject
) -> None:
    """From any line on, in any chunks, all whole lines come, in order, and not too many at once."""
    end = put(folder, "s/log.jsonl", *lines, tail=tail)
    first = data.draw(st.integers(0, len(lines)))
    begin = sum(len(line) + 1 for line in lines[:first])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_lines, "CHUNK_BYTES", chunk)
        found = read_all(folder, "s/log.jsonl", begin, end)
    assert list(itertools.chain(*found)) == lines[first:]
    for each in found:
        assert sum(len(line) + 1 for line in each) <= max(chunk, 2 * (len(each[0]) + 1))


@given(
    body=st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers(0, 9), max_size=4),
    kind=st.text(max_size=8),
    seq=st.integers(1, 2**40),
)
@settings(deadline=None)
def test_an_event_is_read_as_it_was_written(body: dict[str, Any], kind: str, seq: int) -> None:
    """What a transport gets out of a file is exactly what it would have got live."""
    event = EncodedEvent(
        "s/1", kind, f"{'a' * 20}-{seq:x}", SECONDS, encode({**body, "type": kind})
    )
    line = event.line(seq)
    assert parse_line(line, "s/1") == OutgoingEvent(line, event.id, "s/1", kind, NOW)


def test_an_event_without_a_type_is_an_event() -> None:
    """The type is the one that it would have got live."""
    line = EncodedEvent("s", "event", "id-1", SECONDS, b"{}").line(1)
    assert parse_line(line, "s").type == "event"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.floats(0, 1) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["id", "event", "timestamp", "type", "seq"]) | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(st.binary(max_size=60) | JSON.map(orjson.dumps))
@settings(deadline=None)
def test_no_line_is_too_odd_to_be_read(line: bytes) -> None:
    """Whatever a line is, it becomes an event with exactly that line."""
    found = parse_line(line, "s")
    assert (found.line, found.session_id) == (line, "s")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"\xff",
        b"\0\0",
        b"5",
        b"null",
        b"[]",
        b'"text"',
        b"{}",
        b'{"timestamp":"t","event":{}}',
        b'{"id":"i","event":{}}',
        b'{"id":"i","timestamp":"t"}',
        b'{"id":"i","timestamp":"t","event":[]}',
        b'{"id":"i","timestamp":"t","event":null}',
    ],
)
def test_an_unreadable_line_has_no_id(line: bytes) -> None:
    """A line that is no event's is kept as it is, told by its lack of an id."""
    assert parse_line(line, "s") == OutgoingEvent(line, "", "s", "unreadable", "")


@pytest.mark.parametrize("key", ["id", "timestamp"])
def test_an_id_or_timestamp_that_is_no_text_is_unreadable(key: str) -> None:
    """Whoever compares timestamps or splits ids gets text."""
    line = orjson.dumps({"id": "i", "timestamp": NOW, "event": {}} | {key: 5})
    assert parse_line(line, "s") == OutgoingEvent(line, "", "s", "unreadable", "")


def test_a_parked_line_is_the_session_files_line(base: Path) -> None:
    """What was refused is sent again as it was sent first: its line, its session."""
    event = parse_line(line_of(1), "s")
    park(base, "peer", event, "no")
    [path] = set_aside(base, "peer")
    [parked] = read_lines(base, path, 0, (base / path).stat().st_size)
    assert parse_line(parked, path) == event


def test_measure_says_what_is_left(base: Path) -> None:
    """From a byte on: where the last whole line ends, how many there are, and since when."""
    lines = [line_of(seq) for seq in (1, 2, 3)]
    end = put(base, "s/log.jsonl", *lines)
    assert measure(base, "s/log.jsonl", 0) == Extent(end, 3, NOW)
    assert measure(base, "s/log.jsonl", len(lines[0]) + 1) == Extent(end, 2, NOW)


@pytest.mark.parametrize("tail", [b"", b"torn"])
def test_nothing_is_left_of_a_file_that_is_sent(base: Path, tail: bytes) -> None:
    """At the last whole line there is nothing more, whatever a dead writer left behind it."""
    end = put(base, "s/log.jsonl", line_of(1), tail=tail)
    assert measure(base, "s/log.jsonl", end) == Extent(end, 0, "")


def test_nothing_is_left_of_an_empty_file(base: Path) -> None:
    """A file that was made and never written holds nothing."""
    put(base, "s/log.jsonl")
    assert measure(base, "s/log.jsonl", 0) == Extent(0, 0, "")


def test_nothing_is_left_past_the_end_of_a_cut_file(base: Path) -> None:
    """A file that is shorter than what was sent of it was cut: that is an error to tell."""
    put(base, "s/log.jsonl", line_of(1))
    with pytest.raises(EOFError, match=r"s/log\.jsonl ends before byte 10000"):
        measure(base, "s/log.jsonl", 10_000)


def test_a_torn_tail_is_not_counted(base: Path) -> None:
    """What a killed writer left of a line is not to be sent."""
    end = put(base, "s/log.jsonl", line_of(1), line_of(2), tail=line_of(3)[:-1])
    assert measure(base, "s/log.jsonl", 0) == Extent(end, 2, NOW)


def test_long_lines_and_tails_are_measured(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line feed may be many chunks before the end, and the first one behind the begin."""
    monkeypatch.setattr(_lines, "CHUNK_BYTES", 100)
    long = line_of(1, padding=9000)
    end = put(base, "s/log.jsonl", long, line_of(2, padding=9000), tail=b"x" * 1000)
    assert measure(base, "s/log.jsonl", 0) == Extent(end, 2, NOW)
    assert measure(base, "s/log.jsonl", len(long) + 1) == Extent(end, 1, NOW)


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (b"unreadable", line_of(3)),
        (line_of(1), b"unreadable"),
        (b"{}", line_of(3)),
        (line_of(1), b'{"seq":"3"}'),
        (line_of(1), b"[]"),
    ],
)
def test_lines_without_numbers_are_counted(
    base: Path, monkeypatch: pytest.MonkeyPatch, first: bytes, last: bytes
) -> None:
    """Where the first or last line does not say its number, line feeds are counted."""
    monkeypatch.setattr(_lines, "CHUNK_BYTES", 16)
    end = put(base, "s/log.jsonl", first, line_of(2), last)
    found = measure(base, "s/log.jsonl", 0)
    assert (found.end, found.events) == (end, 3)


def test_parked_lines_are_counted(base: Path) -> None:
    """A file of refused events is measured like any other."""
    for seq in (1, 5, 9):
        park(base, "peer", parse_line(line_of(seq), "s"), "no")
    [path] = set_aside(base, "peer")
    assert measure(base, path, 0) == Extent((base / path).stat().st_size, 3, NOW)


@given(
    paddings=st.lists(st.integers(0, 60), max_size=10),
    numbered=st.booleans(),
    tail=TAILS,
    chunk=st.integers(1, 200),
    data=st.data(),
)
@settings(deadline=None)
def test_measure_agrees_with_reading(
    folder: Path,
    paddings: list[int],
    numbered: bool,
    tail: bytes,
    chunk: int,
    data: st.DataObject,
) -> None:
    """From any line on, in any chunks, what is measured is what reading brings."""
    lines = [line_of(seq, padding=padding) for seq, padding in enumerate(paddings, 1)]
    if not numbered:
        lines = [line.replace(b'"seq"', b'"no"') for line in lines]
    end = put(folder, "s/log.jsonl", *lines, tail=tail)
    first = data.draw(st.integers(0, len(lines)))
    begin = sum(len(line) + 1 for line in lines[:first])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_lines, "CHUNK_BYTES", chunk)
        found = measure(folder, "s/log.jsonl", begin)
        assert found[:2] == (end, len(lines) - first)
        assert sum(map(len, read_all(folder, "s/log.jsonl", begin, found.end))) == found.events


def test_all_session_files_are_found(base: Path) -> None:
    """Each with its path, its session, and which process its first event is of."""
    put(base, "b/log.jsonl", line_of(1, "b", process="b" * 20))
    put(base, "a/log.jsonl", line_of(1, "a"))
    put(base, "a/log-1.jsonl", line_of(1, "a", process="c" * 20))
    assert list(find_files(base, paths_of(base))) == [
        ("a/log-1.jsonl", "a", "c" * 20),
        ("a/log.jsonl", "a", "a" * 20),
        ("b/log.jsonl", "b", "b" * 20),
    ]


def test_what_is_no_session_file_is_not_found(base: Path) -> None:
    """Our own directory, other suffixes, and files that lie in the base itself are left out."""
    put(base, ".eventlog/rejected/peer.jsonl", line_of(1))
    put(base, "s/log.json", line_of(1))
    put(base, "log.jsonl", line_of(1))
    (base / "empty").mkdir()
    assert list(find_files(base, paths_of(base))) == []


def test_there_is_nothing_to_find_where_there_is_no_base(base: Path) -> None:
    """A base that is not there yet is no error."""
    assert list(find_files(base, paths_of(base))) == []


@pytest.mark.parametrize("session", ["tenant/7 ä", "", "..", "con", "x" * 200, "ü" * 100])
def test_a_session_is_known_by_its_name_or_its_events(base: Path, session: str) -> None:
    """Names are decoded; where a name is a hash, the event says whose it is."""
    paths = paths_of(base)
    path = "/".join((*paths.directory(session), "log.jsonl"))
    put(base, path, line_of(1, session))
    assert [found[:2] for found in find_files(base, paths)] == [(path, session)]


@pytest.mark.parametrize("session", ["s", "tenant/7", "x" * 200])
def test_sessions_of_a_pattern_with_levels_are_known(base: Path, session: str) -> None:
    """Levels above, and text around the id, do not become part of it."""
    paths = paths_of(base, "agents/v2/chat-{session_id}")
    path = "/".join((*paths.directory(session), "log.jsonl"))
    put(base, path, line_of(1, session))
    assert [found[:2] for found in find_files(base, paths)] == [(path, session)]


def test_the_unknown_session_has_its_directorys_name(base: Path) -> None:
    """Events without a session are found under the name that transports know."""
    paths = paths_of(base)
    path = "/".join((*paths.directory(None), "log.jsonl"))
    put(base, path, EncodedEvent(None, "note", f"{'a' * 20}-1", SECONDS, b"{}").line(1))
    assert list(find_files(base, paths)) == [(path, "unknown_u1", "a" * 20)]


def test_an_event_cannot_claim_another_directory(base: Path) -> None:
    """What an event says counts only where its directory is that session's."""
    put(base, "s/log.jsonl", line_of(1, "another"))
    assert [found[:2] for found in find_files(base, paths_of(base))] == [("s/log.jsonl", "s")]


@pytest.mark.parametrize("content", [b"", b"torn", b"rubbish\n", b"\xff\n", b"{}\n"])
def test_a_file_without_a_readable_first_line_is_found(base: Path, content: bytes) -> None:
    """It may hold events further on: its session is what its directory says."""
    (base / "a%2Fb").mkdir(parents=True)
    (base / "a%2Fb" / "log.jsonl").write_bytes(content)
    assert list(find_files(base, paths_of(base))) == [("a%2Fb/log.jsonl", "a/b", "")]


@pytest.mark.parametrize("content", [b"[]\n", b"5\n", b"null\n", b'"text"\n'])
def test_a_first_line_of_other_json_is_found(base: Path, content: bytes) -> None:
    """A file of somebody else's among ours does not hide the others."""
    (base / "s").mkdir(parents=True)
    (base / "s" / "log.jsonl").write_bytes(content)
    put(base, "t/log.jsonl", line_of(1, "t"))
    assert list(find_files(base, paths_of(base))) == [
        ("s/log.jsonl", "s", ""),
        ("t/log.jsonl", "t", "a" * 20),
    ]


def test_an_id_that_is_no_text_does_not_end_the_search(base: Path) -> None:
    """A file of somebody else's may have ids of its own."""
    put(base, "s/log.jsonl", b'{"id":5,"timestamp":"t","event":{}}')
    assert list(find_files(base, paths_of(base))) == [("s/log.jsonl", "s", "")]


def test_a_first_line_longer_than_a_chunk_is_read(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large first event says whose its file is, like any other."""
    monkeypatch.setattr(_lines, "CHUNK_BYTES", 256)
    paths, session = paths_of(base), "x" * 200
    path = "/".join((*paths.directory(session), "log.jsonl"))
    put(base, path, line_of(1, session, padding=1000), line_of(2, session))
    assert list(find_files(base, paths)) == [(path, session, "a" * 20)]


def test_every_path_that_is_found_can_be_saved(base: Path) -> None:
    """A directory whose name is no UTF-8 is not one of ours."""
    directory = Path(os.fsdecode(os.fsencode(base / "s") + b"\xff"))
    directory.mkdir(parents=True)
    (directory / "log.jsonl").write_bytes(line_of(1) + b"\n")
    for path, _, _ in find_files(base, paths_of(base)):
        assert path.encode()


@pytest.mark.parametrize("link", ["s", "s/log.jsonl"])
def test_a_link_is_not_looked_into(base: Path, tmp_path: Path, link: str) -> None:
    """A link to a directory is passed over; one to a file is found, and its target not read."""
    put(tmp_path, "elsewhere/log.jsonl", line_of(1, "secret"))
    (base / link).parent.mkdir(parents=True)
    target = "elsewhere" if link == "s" else "elsewhere/log.jsonl"
    (base / link).symlink_to(tmp_path / target)
    expected = [] if link == "s" else [("s/log.jsonl", "s", "")]
    assert list(find_files(base, paths_of(base))) == expected
