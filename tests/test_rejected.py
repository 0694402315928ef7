"""Where refused events lie: nothing of them is lost, and each transport's are apart."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventlog_handler._encode import encode
from eventlog_handler._lines import parse_line
from eventlog_handler._rejected import park, set_aside, unwrap
from eventlog_handler.typing import EncodedEvent, OutgoingEvent

SECONDS = 1767225600.0
NOW = "2026-01-01T00:00:00.000000+00:00"
NASTY = st.sampled_from(['"', '","line":', ',"line":', '\\","line":{}}', '{"rejected":', "\n", "}"])
TEXTS = st.lists(st.text(max_size=8) | NASTY, max_size=4).map("".join)
ODD_NAMES = [
    "~",
    "a~0123456789abcdef",
    "/",
    "a/b",
    "..",
    "",
    "con",
    "ä",
    "a%2Fb",
    "*",
    "[a]",
    "redis://host:6379/0?x=1",
    "n" * 128,
    "n" * 129,
    "n" * 200,
    "ü" * 60,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory for many examples."""
    return tmp_path_factory.mktemp("rejected")


def event(number: int = 1, session: str = "s", **fields: Any) -> OutgoingEvent:
    """Return an event that is told by its number."""
    body = encode({"n": number, **fields})
    encoded = EncodedEvent(session, "note", f"id-{number}", SECONDS, body)
    return OutgoingEvent(encoded.line(number), encoded.id, session, "note", NOW)


def unreadable(line: bytes) -> OutgoingEvent:
    """Return what a line that cannot be read becomes."""
    return OutgoingEvent(line, "", "s", "unreadable", "")


def directory_of(base: Path) -> Path:
    """Return where files of refused events are."""
    return base / ".eventlog" / "rejected"


def parked(base: Path, transport: str = "peer") -> list[bytes]:
    """Return what is parked for a transport whose name is a file's, too; line by line."""
    return (directory_of(base) / f"{transport}.jsonl").read_bytes().splitlines()


def numbers_in(base: Path, paths: list[str]) -> list[int]:
    """Return the numbers of the events in files that were set aside."""
    lines = [line for path in paths for line in (base / path).read_bytes().splitlines()]
    return [orjson.loads(unwrap(line)[0])["event"]["n"] for line in lines]


def test_a_refused_event_is_kept_with_the_reason(base: Path) -> None:
    """A line says when, by whom and why an event was refused, and holds its line as it was."""
    park(base, "peer", event(), "TooLarge: 3 MB")
    [line] = parked(base)
    found = orjson.loads(line)
    assert found["rejected"].pop("time")[:2] == "20"
    assert found["rejected"] == {
        "transport": "peer",
        "reason": "TooLarge: 3 MB",
        "id": "id-1",
        "session_id": "s",
        "type": "note",
    }
    assert event().line in line


def test_events_are_kept_in_order(base: Path) -> None:
    """Each is appended to those before it."""
    for number in (1, 2, 3):
        park(base, "peer", event(number), "no")
    assert numbers_in(base, set_aside(base, "peer")) == [1, 2, 3]


def test_only_the_owner_may_read_it(base: Path) -> None:
    """The file is 0600 and its directories 0700, whatever the umask would allow."""
    before = os.umask(0)
    try:
        park(base, "peer", event(), "no")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in base.rglob("*")}
    directory = directory_of(base)
    assert modes == {directory.parent: 0o700, directory: 0o700, directory / "peer.jsonl": 0o600}


@given(transport=TEXTS, reason=TEXTS, session=TEXTS, kind=TEXTS, message=TEXTS)
@settings(deadline=None)
def test_a_parked_line_is_taken_out_as_it_was_put_in(
    folder: Path, transport: str, reason: str, session: str, kind: str, message: str
) -> None:
    """Whatever texts stand around and in it, the line comes back byte by byte, and its session."""
    refused = event(1, session, message=message)._replace(type=kind)
    park(folder, transport, refused, reason)
    *_, path = set_aside(folder, transport)
    [line] = (folder / path).read_bytes().split(b"\n")[:-1]
    (folder / path).unlink()
    assert orjson.loads(line)["rejected"]["reason"] == reason
    assert unwrap(line) == (refused.line, session)


@pytest.mark.parametrize("reason", ["\ud800", "a\0b", "a\r\nb", "\u2028"])
def test_any_reason_can_be_written(base: Path, reason: str) -> None:
    """What JSON or UTF-8 has no place for makes neither an error nor a second line."""
    park(base, "peer", event(), reason)
    [line] = (directory_of(base) / "peer.jsonl").read_bytes().split(b"\n")[:-1]
    assert unwrap(line) == (event().line, "s")


@pytest.mark.parametrize("line", [b"", b"torn", b'{"torn":"', b"\xff\xfe", b"\0", b"[1]"])
def test_an_unreadable_line_is_kept_as_text(base: Path, line: bytes) -> None:
    """What is no event's line is parked too, inside valid JSON, and is still no event's line."""
    park(base, "peer", unreadable(line), "this line of the file cannot be read")
    [kept] = parked(base)
    assert orjson.loads(kept)["line"] == line.decode("utf-8", "backslashreplace")
    assert parse_line(kept, "elsewhere")[1:] == ("", "s", "unreadable", "")


def test_an_unreadable_line_is_taken_out_as_it_was_put_in(base: Path) -> None:
    """Sent again and refused again, a line does not grow: each time its quotes are escaped once."""
    park(base, "peer", unreadable(b'{"torn":"'), "no")
    [kept] = parked(base)
    assert unwrap(kept) == (b'{"torn":"', "s")


@pytest.mark.parametrize(
    "line",
    [
        b"",
        event().line,
        b'{"rejected":',
        b'{"rejected":{"reason":"cut o',
        b'{"rejected":{"reason":"no"},"line":{}}',
        b'{"rejected":[],"line":{}}',
        b'{"rejected":5,"line":{}}',
    ],
)
def test_any_other_line_is_left_as_it_is(line: bytes) -> None:
    """What is not parked, or not wholly, is taken for what it is."""
    assert unwrap(line) == (line, None)


def test_a_line_that_was_cut_off_does_not_swallow_the_next(base: Path) -> None:
    """Where whoever wrote last was killed, the next line begins anew."""
    park(base, "peer", event(1), "no")
    path = directory_of(base) / "peer.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    park(base, "peer", event(2), "no")
    park(base, "peer", event(3), "no")
    cut, *whole = parked(base)
    assert parse_line(cut, "s").id == ""
    assert [unwrap(line)[0] for line in whole] == [event(2).line, event(3).line]


def test_a_short_write_raises(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that is not wholly kept is not kept, and its transport must not go past it."""
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:30]))
        with pytest.raises(OSError, match=r"only 30 of \d+ bytes could be written"):
            park(base, "peer", event(1), "no")
    park(base, "peer", event(1), "no")
    assert unwrap(parked(base)[-1])[0] == event(1).line


def test_a_link_in_its_place_is_not_followed(base: Path, tmp_path: Path) -> None:
    """A planted link is an error, and what it leads to stays as it is."""
    directory_of(base).mkdir(parents=True)
    target = tmp_path / "target"
    target.write_bytes(b"theirs\n")
    (directory_of(base) / "peer.jsonl").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        park(base, "peer", event(), "no")
    assert target.read_bytes() == b"theirs\n"


def test_a_link_in_its_directorys_place_is_not_followed(base: Path, tmp_path: Path) -> None:
    """What may not lead out of the base as a file may not as a directory either."""
    directory_of(base).parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    directory_of(base).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        park(base, "peer", event(), "no")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("where", [".eventlog", ".eventlog/rejected", ".eventlog/rejected/peer"])
def test_what_cannot_be_kept_is_told(base: Path, where: str) -> None:
    """Something else in the place of a directory or the file is an OSError."""
    path = base / (f"{where}.jsonl" if where.endswith("peer") else where)
    path.parent.mkdir(parents=True)
    if where.endswith("peer"):
        path.mkdir()
    else:
        path.write_bytes(b"")
    with pytest.raises(OSError, match=r"File exists|Is a directory|Not a directory"):
        park(base, "peer", event(), "no")


def test_a_pipe_in_its_place_keeps_nothing(base: Path) -> None:
    """What is no regular file is an error: what goes into it would be gone."""
    directory_of(base).mkdir(parents=True)
    os.mkfifo(directory_of(base) / "peer.jsonl")
    with pytest.raises(OSError, match=r"."):
        park(base, "peer", event(), "no")


def test_parking_leaves_no_descriptor_open(base: Path) -> None:
    """Neither success nor failure costs one."""
    park(base, "peer", event(), "no")
    (directory_of(base) / "other.jsonl").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        park(base, "peer", event(), "no")
        with pytest.raises(IsADirectoryError):
            park(base, "other", event(), "no")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("prepare", [lambda base: None, lambda base: directory_of(base).mkdir()])
def test_nothing_is_set_aside_where_nothing_was_refused(
    base: Path, prepare: Callable[[Path], object]
) -> None:
    """Without a file, or even its directory, there is nothing to send again."""
    directory_of(base).parent.mkdir(parents=True)
    prepare(base)
    assert set_aside(base, "peer") == []


def test_what_is_refused_after_that_goes_to_another_file(base: Path) -> None:
    """What is set aside does not change any more."""
    park(base, "peer", event(1), "no")
    first = set_aside(base, "peer")
    park(base, "peer", event(2), "no")
    assert numbers_in(base, first) == [1]
    assert len(parked(base)) == 1


def test_what_an_earlier_call_has_set_aside_is_found_again(base: Path) -> None:
    """Whoever was interrupted before it was sent again has lost nothing."""
    park(base, "peer", event(1), "no")
    first = set_aside(base, "peer")
    assert set_aside(base, "peer") == first
    park(base, "peer", event(2), "no")
    both = set_aside(base, "peer")
    assert set(first) < set(both)
    assert sorted(numbers_in(base, both)) == [1, 2]


def test_paths_are_below_the_base(base: Path) -> None:
    """They are as everything else that is read back knows its files."""
    park(base, "peer", event(), "no")
    [path] = set_aside(base, "peer")
    assert path.startswith(".eventlog/rejected/peer~")
    assert (base / path).is_file()


def test_odd_names_of_transports_are_kept_apart(base: Path) -> None:
    """Each transport gets what it refused and nothing of another's, whatever their names are."""
    for number, name in enumerate(ODD_NAMES):
        park(base, name, event(number), "no")
    found = [numbers_in(base, set_aside(base, name)) for name in ODD_NAMES]
    assert found == [[number] for number in range(len(ODD_NAMES))]


def test_names_that_begin_with_one_another_are_kept_apart(base: Path) -> None:
    """What one transport has set aside is not taken for the other's."""
    names = ["redis", "redis-2", "redis~", "redis.jsonl", "redi"]
    for number, name in enumerate(names):
        park(base, name, event(number), "no")
        set_aside(base, name)
    found = [numbers_in(base, set_aside(base, name)) for name in names]
    assert found == [[number] for number in range(len(names))]


def test_a_parked_event_says_its_own_transport(base: Path) -> None:
    """Where a file's name is a hash, its lines tell whose it is."""
    name = "n" * 200
    park(base, name, event(), "no")
    [path] = set_aside(base, name)
    assert orjson.loads((base / path).read_bytes())["rejected"]["transport"] == name


def test_what_is_set_aside_meanwhile_is_parked_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sends a file again may have read it before a line came: the line goes to the next."""
    real, aside = os.write, list[str]()

    def late(fd: int, data: bytes) -> int:
        written = real(fd, data)
        if not aside:
            aside.extend(set_aside(base, "t"))
        return written

    monkeypatch.setattr(os, "write", late)
    park(base, "t", OutgoingEvent(b'{"id":"1"}', "1", "s", "note", "now"), "no")
    assert len(aside) == 1
    assert (base / ".eventlog" / "rejected" / "t.jsonl").exists()


def test_what_is_parked_beside_a_new_file_is_parked_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where another event has begun the next file already."""
    real, aside = os.write, list[str]()

    def late(fd: int, data: bytes) -> int:
        written = real(fd, data)
        if not aside:
            aside.extend(set_aside(base, "t"))
            (base / ".eventlog" / "rejected" / "t.jsonl").touch()
        return written

    monkeypatch.setattr(os, "write", late)
    park(base, "t", OutgoingEvent(b'{"id":"1"}', "1", "s", "note", "now"), "no")
    assert (base / ".eventlog" / "rejected" / "t.jsonl").stat().st_size > 0


@pytest.mark.parametrize("written", [0, 5])
def test_a_short_write_is_no_parking(
    base: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """A full disk shows as a short write first: the event is not kept, and that is said."""
    monkeypatch.setattr(os, "write", lambda fd, data: written)
    with pytest.raises(OSError, match=f"only {written} of"):
        park(base, "t", OutgoingEvent(b'{"id":"1"}', "1", "s", "note", "now"), "no")
