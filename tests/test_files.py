"""Session files on a real disk: lines, formats, descriptors, and what goes wrong with disks."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import shutil
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from eventlog_handler._files import LARGEST_WRITE, Layout, SessionFiles
from eventlog_handler._paths import SessionPaths
from eventlog_handler.typing import EncodedEvent, LineFormatter, OutgoingEvent, Written
from tests.conftest import lines_of

SUFFIXES = {"jsonl": ".jsonl", "json": ".json", "custom": ".log"}
SECONDS = 1767225600.0
NOW = "2026-01-01T00:00:00.000000+00:00"


@pytest.fixture
def make_files(base: Path) -> Iterator[Callable[..., SessionFiles]]:
    """Make session files whose first name is always `log`, closed when the test ends."""
    made: list[SessionFiles] = []

    def make(
        log_format: str = "jsonl",
        formatter: Any = None,
        failed: Callable[[Exception], None] | None = None,
        directory: str = "{session_id}",
        max_open_files: int = 8,
        file_mode: int = 0o600,
        directory_mode: int = 0o700,
        **options: Any,
    ) -> SessionFiles:
        paths = SessionPaths(base, directory, "unknown_{uuid}", "log", SUFFIXES[log_format], "u1")
        made.append(
            SessionFiles(
                paths,
                Layout(log_format, formatter, failed),
                max_open_files=max_open_files,
                file_mode=file_mode,
                directory_mode=directory_mode,
                **options,
            )
        )
        return made[-1]

    yield make
    for files in made:
        files.close()


def event(number: int, padding: int = 0, session_id: str | None = "s") -> EncodedEvent:
    """Return an event that is told by its number."""
    body = orjson.dumps({"n": number} | ({"pad": "x" * padding} if padding else {}))
    return EncodedEvent(session_id, "note", f"id-{number}", SECONDS, body)


class Outgoing(list[OutgoingEvent]):
    """Collects what was handed on, as transports get it."""

    def add(self, written: Written) -> None:
        """Take what was written."""
        self.extend(written.outgoing(index) for index in range(len(written.events)))


def write(files: SessionFiles, session_id: str | None, *numbers: int) -> list[OutgoingEvent]:
    """Append events one by one; return what was handed on."""
    outgoing = Outgoing()
    for number in numbers:
        assert files.append(session_id, [event(number)], outgoing.add) == 1
    return outgoing


def ignore(written: Written) -> None:
    """Hand nothing on."""


def numbers_in(path: Path) -> list[int]:
    """Return the numbers of the events in a jsonl file."""
    return [line["event"]["n"] for line in lines_of(path)]


def _target(fd: int) -> Path | None:
    try:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))
    except FileNotFoundError:
        return None


def held(base: Path) -> list[str]:
    """Return the sessions whose files this process has open."""
    targets = [_target(int(entry)) for entry in os.listdir("/proc/self/fd")]
    return sorted(t.parent.name for t in targets if t is not None and t.parent.parent == base)


@contextlib.contextmanager
def soft_limit(which: int, value: int) -> Iterator[None]:
    """Lower a limit of this process for a while."""
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(which, (soft, hard))


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Let every further open fail with EMFILE, until one of the present descriptors is closed."""
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(3)]
    limit = taken[-1] + 1
    # Fill all holes below the limit: only a descriptor that is given back can be taken again.
    with soft_limit(resource.RLIMIT_NOFILE, limit):
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        try:
            yield
        finally:
            for fd in taken:
                os.close(fd)


@contextlib.contextmanager
def patched(name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Replace a function of `os` for as short a time as possible."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, replacement)
        yield


def full_disk(room: int) -> Callable[[int, memoryview], int]:
    """Return an `os.write` that has room for some bytes, and then none."""
    real, left = os.write, [room]

    def full(fd: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(fd, data[: left[0]])
        left[0] -= count
        return count

    return full


def refuse(number: int) -> Callable[..., Any]:
    """Return a function that fails with an `OSError` of this number."""

    def refused(*args: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refused


def test_nothing_is_created_before_the_first_event(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """Asking for paths creates neither file nor directory."""
    files = make_files()
    files.path("s")
    files.directory("s")
    assert not base.exists()


def test_jsonl_is_one_line_an_event(make_files: Callable[..., SessionFiles]) -> None:
    """Each event is one line of timestamp, id, seq and event."""
    files = make_files()
    write(files, "s", 1, 2)
    assert files.path("s").read_bytes() == (
        b'{"timestamp":"%b","id":"id-1","seq":1,"event":{"n":1}}\n'
        b'{"timestamp":"%b","id":"id-2","seq":2,"event":{"n":2}}\n' % ((NOW.encode(),) * 2)
    )


def test_seq_counts_within_each_file(make_files: Callable[..., SessionFiles]) -> None:
    """Sessions count apart from each other, from 1."""
    files = make_files()
    for session_id in ("a", "b", "a", "b", "a"):
        write(files, session_id, 0)
    assert [line["seq"] for line in lines_of(files.path("a"))] == [1, 2, 3]
    assert [line["seq"] for line in lines_of(files.path("b"))] == [1, 2]


def test_json_is_a_valid_array_after_each_write(make_files: Callable[..., SessionFiles]) -> None:
    """A json file can be loaded as a whole at any time."""
    files = make_files("json")
    for count in (1, 2, 3):
        write(files, "s", count)
        lines = orjson.loads(files.path("s").read_bytes())
        assert [line["event"]["n"] for line in lines] == list(range(1, count + 1))
        assert [line["seq"] for line in lines] == list(range(1, count + 1))


def test_json_takes_batches(make_files: Callable[..., SessionFiles]) -> None:
    """The events of one batch are separated in an array, too."""
    files = make_files("json")
    files.append("s", [event(1), event(2)], ignore)
    files.append("s", [event(3), event(4)], ignore)
    lines = orjson.loads(files.path("s").read_bytes())
    assert [line["event"]["n"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("formatter", "expected"),
    [
        (lambda line: f"{line['seq']} {line['event']['n']}", b"1 7\n2 8\n"),
        (lambda line: b"%d\n" % line["event"]["n"], b"7\n8\n"),
        (lambda line: "\ud800", b"\\ud800\n\\ud800\n"),
    ],
    ids=["text", "bytes-with-line-feed", "lone-surrogate"],
)
def test_custom_lines_are_the_formatters(
    make_files: Callable[..., SessionFiles], formatter: LineFormatter, expected: bytes
) -> None:
    """A custom line is what the formatter returns, with exactly one line feed."""
    files = make_files("custom", formatter)
    write(files, "s", 7, 8)
    assert files.path("s").read_bytes() == expected
    assert files.path("s").suffix == ".log"


def test_a_logging_formatter_formats_lines(make_files: Callable[..., SessionFiles]) -> None:
    """A `logging.Formatter` gets a record of the event."""
    files = make_files("custom", logging.Formatter("%(levelname)s:%(message)s"))
    body = orjson.dumps({"level": "warning", "message": "hot"})
    files.append("s", [EncodedEvent("s", "log", "id", SECONDS, body)], ignore)
    assert files.path("s").read_bytes() == b"WARNING:hot\n"


@pytest.mark.parametrize("heard", [True, False])
def test_a_failing_formatter_costs_the_format_only(
    make_files: Callable[..., SessionFiles], heard: bool
) -> None:
    """Where a formatter raises, the JSON line is written, and the failure is told."""
    errors: list[Exception] = []
    files = make_files("custom", lambda line: 1 // 0, errors.append if heard else None)
    write(files, "s", 5)
    assert numbers_in(files.path("s")) == [5]
    assert [type(error) for error in errors] == [ZeroDivisionError] * heard


def test_a_formatter_that_returns_no_text_has_failed(
    make_files: Callable[..., SessionFiles],
) -> None:
    """None from a formatter is told as a failure, and the JSON line is written."""
    errors: list[Exception] = []
    files = make_files("custom", lambda line: None, errors.append)
    write(files, "s", 5)
    assert numbers_in(files.path("s")) == [5]
    assert [type(error) for error in errors] == [AttributeError]


def test_outgoing_lines_are_those_of_the_file(make_files: Callable[..., SessionFiles]) -> None:
    """What is handed on holds the file's line without its line feed, and how to route it."""
    files = make_files()
    outgoing = write(files, "s", 1, 2)
    assert [o.line for o in outgoing] == files.path("s").read_bytes().splitlines()
    assert outgoing[1].metadata == {
        "id": "id-2",
        "session_id": "s",
        "type": "note",
        "timestamp": NOW,
    }


def test_events_without_a_session_go_to_one_directory(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """None is one session of the gateway, named by the pattern of unknown sessions."""
    files = make_files()
    outgoing = write(files, None, 1, 2)
    assert files.path(None) == base / "unknown_u1" / "log.jsonl"
    assert numbers_in(files.path(None)) == [1, 2]
    assert {o.session_id for o in outgoing} == {"unknown_u1"}


def test_figures_count_events_and_bytes(make_files: Callable[..., SessionFiles]) -> None:
    """`written` and `bytes` are what stands on the disk."""
    files = make_files()
    write(files, "a", 1, 2)
    write(files, "b", 3)
    assert files.written == 3
    assert files.bytes == sum(files.path(s).stat().st_size for s in ("a", "b"))


def test_a_batch_is_cut_at_the_largest_write(make_files: Callable[..., SessionFiles]) -> None:
    """One call writes no more than `LARGEST_WRITE`; the caller calls again for the rest."""
    files = make_files()
    batch = [event(n, padding=100_000) for n in range(5)]
    counts = []
    while batch:
        before = files.bytes
        counts.append(files.append("s", batch, ignore))
        assert files.bytes - before <= LARGEST_WRITE
        del batch[: counts[-1]]
    assert counts == [2, 2, 1]
    assert numbers_in(files.path("s")) == [0, 1, 2, 3, 4]


def test_an_event_larger_than_the_largest_write_goes_alone(
    make_files: Callable[..., SessionFiles],
) -> None:
    """The largest write bounds batches, not events."""
    files = make_files()
    batch = [event(1, padding=LARGEST_WRITE), event(2)]
    assert files.append("s", batch, ignore) == 1
    assert files.append("s", batch[1:], ignore) == 1
    assert numbers_in(files.path("s")) == [1, 2]


def test_hand_on_keeps_the_order_of_the_file(make_files: Callable[..., SessionFiles]) -> None:
    """Whichever threads write, what is handed on comes in the order of the lines."""
    files = make_files()
    outgoing = Outgoing()
    start = threading.Barrier(4)

    def writer(first: int) -> None:
        start.wait()
        for number in range(first, first + 50):
            files.append("s", [event(number)], outgoing.add)

    threads = [threading.Thread(target=writer, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    lines = files.path("s").read_bytes().splitlines()
    assert [o.line for o in outgoing] == lines
    assert [orjson.loads(line)["seq"] for line in lines] == list(range(1, 201))


def test_only_the_most_recent_files_stay_open(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """No more than `max_open_files` descriptors are held; the least recently used is closed."""
    files = make_files(max_open_files=2)
    write(files, "a", 1)
    write(files, "b", 1)
    write(files, "a", 2)
    write(files, "c", 1)
    assert held(base) == ["a", "c"]


@pytest.mark.parametrize("log_format", ["jsonl", "json"])
def test_a_closed_file_is_continued(
    make_files: Callable[..., SessionFiles], base: Path, log_format: str
) -> None:
    """A session whose descriptor was given up goes on in the same file, with the next seq."""
    files = make_files(log_format, max_open_files=1)
    for number in range(3):
        write(files, "a", number)
        write(files, "b", number)
    assert len(list((base / "a").iterdir())) == 1
    data = files.path("a").read_bytes()
    found = orjson.loads(data) if log_format == "json" else lines_of(files.path("a"))
    assert [(line["seq"], line["event"]["n"]) for line in found] == [(1, 0), (2, 1), (3, 2)]


def test_close_gives_every_descriptor_back(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """After `close` nothing is open, and a later event still finds its file."""
    files = make_files()
    write(files, "a", 1)
    write(files, "b", 1)
    files.close()
    assert held(base) == []
    write(files, "a", 2)
    assert numbers_in(base / "a" / "log.jsonl") == [1, 2]


def test_a_close_that_fails_is_contained(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """A close that says EIO neither raises nor is tried again on the freed descriptor."""
    files = make_files()
    write(files, "s", 1)
    real, closed = os.close, []

    def failing(fd: int) -> None:
        real(fd)
        closed.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    with patched("close", failing):
        files.close()
        files.close()
    assert len(closed) == 1
    assert held(base) == []


def test_a_taken_name_gets_a_number(make_files: Callable[..., SessionFiles], base: Path) -> None:
    """One writer a file: what exists is never written to."""
    (base / "s").mkdir(parents=True)
    (base / "s" / "log.jsonl").write_bytes(b"another's\n")
    (base / "s" / "log-1.jsonl").write_bytes(b"another's too\n")
    files = make_files()
    write(files, "s", 1)
    assert numbers_in(base / "s" / "log-2.jsonl") == [1]
    assert (base / "s" / "log.jsonl").read_bytes() == b"another's\n"
    assert (base / "s" / "log-1.jsonl").read_bytes() == b"another's too\n"


def test_two_writers_of_one_session_have_a_file_each(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """Two gateways on one base never share a file."""
    first, second = make_files(), make_files()
    write(first, "s", 1)
    write(second, "s", 2)
    write(first, "s", 3)
    assert numbers_in(base / "s" / "log.jsonl") == [1, 3]
    assert numbers_in(base / "s" / "log-1.jsonl") == [2]
    assert (first.path("s").name, second.path("s").name) == ("log.jsonl", "log-1.jsonl")


def test_the_path_is_the_file_that_will_be_written(
    make_files: Callable[..., SessionFiles],
) -> None:
    """What `path` says before the first event is where that event is found."""
    files = make_files()
    said = files.path("s")
    write(files, "s", 1)
    assert said == files.path("s")
    assert numbers_in(said) == [1]


def test_the_path_of_a_new_session_is_no_file_of_another(
    make_files: Callable[..., SessionFiles],
) -> None:
    """`path` foresees that a name is taken: it never names another writer's file."""
    write(make_files(), "s", 1)
    files = make_files()
    said = files.path("s")
    write(files, "s", 2)
    assert said == files.path("s")


def test_directories_have_the_patterns_levels(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """The levels of the directory pattern stand above the session's own."""
    files = make_files(directory="agents/live/s-{session_id}")
    write(files, "x", 1)
    assert files.directory("x") == base / "agents" / "live" / "s-x"
    assert numbers_in(base / "agents" / "live" / "s-x" / "log.jsonl") == [1]


@pytest.mark.parametrize("what", ["file", "directory", "base"])
def test_what_is_deleted_under_an_open_descriptor_is_made_again(
    make_files: Callable[..., SessionFiles], base: Path, what: str
) -> None:
    """An event whose file was deleted a moment ago is written to a new one."""
    files = make_files()
    write(files, "s", 1)
    if what == "file":
        files.path("s").unlink()
    else:
        shutil.rmtree(base / "s" if what == "directory" else base)
    outgoing = write(files, "s", 2)
    assert [(line["seq"], line["event"]["n"]) for line in lines_of(files.path("s"))] == [(1, 2)]
    assert [orjson.loads(o.line)["seq"] for o in outgoing] == [1]
    assert files.written == 2


@pytest.mark.parametrize("log_format", ["jsonl", "json"])
def test_what_is_deleted_while_its_descriptor_is_closed_is_made_again(
    make_files: Callable[..., SessionFiles], base: Path, log_format: str
) -> None:
    """A file that is missing when it is opened again begins anew, with seq 1."""
    files = make_files(log_format)
    write(files, "s", 1)
    files.close()
    shutil.rmtree(base)
    write(files, "s", 2)
    data = files.path("s").read_bytes()
    found = orjson.loads(data) if log_format == "json" else lines_of(files.path("s"))
    assert [(line["seq"], line["event"]["n"]) for line in found] == [(1, 2)]


def test_a_link_under_the_first_name_is_not_followed(
    make_files: Callable[..., SessionFiles], base: Path, tmp_path: Path
) -> None:
    """A link planted where the file would be made is left alone."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (base / "s").mkdir(parents=True)
    (base / "s" / "log.jsonl").symlink_to(victim)
    write(make_files(), "s", 1)
    assert victim.read_bytes() == b"precious"
    assert numbers_in(base / "s" / "log-1.jsonl") == [1]


def test_a_dangling_link_is_not_followed(
    make_files: Callable[..., SessionFiles], base: Path, tmp_path: Path
) -> None:
    """A link to nothing does not get its target made."""
    (base / "s").mkdir(parents=True)
    (base / "s" / "log.jsonl").symlink_to(tmp_path / "victim")
    write(make_files(), "s", 1)
    assert not (tmp_path / "victim").exists()


def test_a_link_in_place_of_a_closed_file_is_passed_by(
    make_files: Callable[..., SessionFiles], base: Path, tmp_path: Path
) -> None:
    """A file that was swapped for a link while it was closed is not written through it."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    files = make_files()
    write(files, "s", 1)
    files.close()
    files.path("s").unlink()
    files.path("s").symlink_to(victim)
    write(files, "s", 2)
    assert victim.read_bytes() == b"precious"
    assert numbers_in(base / "s" / "log-1.jsonl") == [2]


def test_a_link_in_the_middle_of_a_closed_files_way_is_refused(
    make_files: Callable[..., SessionFiles], base: Path, tmp_path: Path
) -> None:
    """A directory that was swapped for a link while its file was closed leads nowhere."""
    files = make_files()
    write(files, "s", 1)
    files.close()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "log.jsonl").write_bytes(b"precious")
    (base / "s").rename(tmp_path / "moved")
    (base / "s").symlink_to(outside)
    with pytest.raises(NotADirectoryError):
        files.append("s", [event(2)], ignore)
    assert (outside / "log.jsonl").read_bytes() == b"precious"
    assert len(list(outside.iterdir())) == 1


def test_another_file_in_place_of_a_closed_one_is_left_alone(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """A file that was swapped for another while it was closed is followed by a new one."""
    files = make_files()
    write(files, "s", 1)
    files.close()
    path = files.path("s")
    path.rename(path.with_suffix(".old"))
    path.write_bytes(b"somebody else's\n")
    write(files, "s", 2)
    assert path.read_bytes() == b"somebody else's\n"
    assert numbers_in(base / "s" / "log-1.jsonl") == [2]


@pytest.mark.parametrize("level", ["agents", "agents/s"])
def test_a_link_in_the_middle_of_the_way_is_refused(
    make_files: Callable[..., SessionFiles], base: Path, tmp_path: Path, level: str
) -> None:
    """No level below the base may be a link."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (base / level).parent.mkdir(parents=True)
    (base / level).symlink_to(outside)
    files = make_files(directory="agents/{session_id}")
    with pytest.raises(NotADirectoryError):
        files.append("s", [event(1)], ignore)
    assert list(outside.iterdir()) == []


def test_the_base_may_be_a_link(
    make_files: Callable[..., SessionFiles], base: Path, tmp_path: Path
) -> None:
    """The base is the operator's own: it may point to another disk."""
    (tmp_path / "disk").mkdir()
    base.symlink_to(tmp_path / "disk")
    write(make_files(), "s", 1)
    assert numbers_in(tmp_path / "disk" / "s" / "log.jsonl") == [1]


def test_a_fifo_under_the_first_name_does_not_block(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """A FIFO planted where the file would be made is passed by."""
    (base / "s").mkdir(parents=True)
    os.mkfifo(base / "s" / "log.jsonl")
    write(make_files(), "s", 1)
    assert numbers_in(base / "s" / "log-1.jsonl") == [1]


def test_a_fifo_in_place_of_a_closed_file_does_not_block(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """A file swapped for a FIFO that nobody reads is passed by, without a wait for a reader."""
    files = make_files()
    write(files, "s", 1)
    files.close()
    files.path("s").unlink()
    os.mkfifo(files.path("s"))
    write(files, "s", 2)
    assert numbers_in(base / "s" / "log-1.jsonl") == [2]


def test_a_fifo_with_a_reader_gets_no_event(make_files: Callable[..., SessionFiles]) -> None:
    """Only a regular file counts as written to, even where a FIFO would take the bytes."""
    files = make_files()
    write(files, "s", 1)
    path = files.path("s")
    files.close()
    path.unlink()
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.append("s", [event(2)], ignore)
        assert os.read(reader, 1024) == b""
    finally:
        os.close(reader)


def test_what_is_made_is_private(make_files: Callable[..., SessionFiles], base: Path) -> None:
    """Directories are 0700 and files 0600, whatever the umask would allow."""
    before = os.umask(0)
    try:
        files = make_files(directory="agents/{session_id}")
        write(files, "s", 1)
    finally:
        os.umask(before)
    for directory in (base, base / "agents", base / "agents" / "s"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(files.path("s").stat().st_mode) == 0o600


def test_modes_are_options(make_files: Callable[..., SessionFiles], base: Path) -> None:
    """Other permission bits are taken as they are given."""
    before = os.umask(0)
    try:
        files = make_files(file_mode=0o640, directory_mode=0o750)
        write(files, "s", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((base / "s").stat().st_mode) == 0o750
    assert stat.S_IMODE(files.path("s").stat().st_mode) == 0o640


def test_descriptors_are_not_inherited(make_files: Callable[..., SessionFiles]) -> None:
    """A program that is started gets none of our descriptors."""
    files = make_files()
    write(files, "s", 1)
    ours = [fd for fd in range(1024) if _target(fd) == files.path("s")]
    assert [os.get_inheritable(fd) for fd in ours] == [False]


def test_a_short_write_is_completed(make_files: Callable[..., SessionFiles]) -> None:
    """A write that takes some of the bytes is followed by one for the rest."""
    files, real = make_files(), os.write
    with patched("write", lambda fd, data: real(fd, data[:7])):
        write(files, "s", 1, 2)
    assert numbers_in(files.path("s")) == [1, 2]


@pytest.mark.parametrize("log_format", ["jsonl", "json"])
@pytest.mark.parametrize("taken", [0, 7, 100, 50_000, 50_010])
def test_a_short_write_of_something_large_is_completed(
    make_files: Callable[..., SessionFiles], log_format: str, taken: int
) -> None:
    """What is written in pieces goes on where the kernel stopped, within any of them."""
    files, real, calls = make_files(log_format), os.writev, []

    def short(fd: int, pieces: list[bytes]) -> int:
        calls.append(len(pieces))
        return real(fd, [b"".join(pieces)[:taken]]) if taken else 0

    with patched("writev", short):
        files.append("s", [event(n, padding=50_000) for n in (1, 2)], ignore)
    write(files, "s", 3)
    data = files.path("s").read_bytes()
    found = orjson.loads(data) if log_format == "json" else lines_of(files.path("s"))
    assert calls == [9]
    assert [line["event"]["n"] for line in found] == [1, 2, 3]


def test_what_is_large_is_not_joined(make_files: Callable[..., SessionFiles]) -> None:
    """The body of a large event is written from where it lies."""
    files, written = make_files(), list[bytes]()
    large, real = event(1, padding=100_000), os.writev

    def noted(fd: int, pieces: list[bytes]) -> int:
        written.extend(pieces)
        return real(fd, pieces)

    with patched("writev", noted):
        files.append("s", [large], ignore)
        files.append("s", [event(2)], ignore)
    assert [piece is large.body for piece in written].count(True) == 1
    assert numbers_in(files.path("s")) == [1, 2]


@pytest.mark.parametrize("room", [0, 10, 50_000])
def test_a_full_disk_tears_no_large_line(
    make_files: Callable[..., SessionFiles], room: int
) -> None:
    """Where the rest of a large event does not fit, the part that was written goes again."""
    files, real = make_files(), os.writev
    write(files, "s", 1)
    with (
        patched("writev", lambda fd, pieces: real(fd, [b"".join(pieces)[:room]]) if room else 0),
        patched("write", full_disk(0)),
        pytest.raises(OSError, match="No space left"),
    ):
        files.append("s", [event(2, padding=100_000)], ignore)
    assert numbers_in(files.path("s")) == [1]
    files.append("s", [event(3, padding=100_000)], ignore)
    assert numbers_in(files.path("s")) == [1, 3]


@pytest.mark.parametrize("room", [0, 10, 60])
def test_a_full_disk_tears_no_line(make_files: Callable[..., SessionFiles], room: int) -> None:
    """A failed write raises, leaves whole lines only, and the next event follows seamlessly."""
    files = make_files()
    write(files, "s", 1)
    handed_on: list[Written] = []
    with patched("write", full_disk(room)), pytest.raises(OSError, match="No space left"):
        files.append("s", [event(2), event(3)], handed_on.append)
    assert handed_on == []
    assert numbers_in(files.path("s")) == [1]
    write(files, "s", 4)
    assert [(line["seq"], line["event"]["n"]) for line in lines_of(files.path("s"))] == [
        (1, 1),
        (2, 4),
    ]
    assert files.written == 2


@pytest.mark.parametrize("room", [0, 10, 60])
def test_a_full_disk_leaves_a_valid_array(
    make_files: Callable[..., SessionFiles], room: int
) -> None:
    """A json file is closed again after a failed write, and goes on afterwards."""
    files = make_files("json")
    write(files, "s", 1)
    with patched("write", full_disk(room)), pytest.raises(OSError, match="No space left"):
        files.append("s", [event(2)], ignore)
    assert [x["event"]["n"] for x in orjson.loads(files.path("s").read_bytes())] == [1]
    write(files, "s", 3)
    assert [x["event"]["n"] for x in orjson.loads(files.path("s").read_bytes())] == [1, 3]


@pytest.mark.parametrize("log_format", ["jsonl", "json"])
def test_a_full_disk_at_the_first_event_leaves_an_empty_file(
    make_files: Callable[..., SessionFiles], log_format: str
) -> None:
    """Where the first write fails, the file is empty, and the next event begins it."""
    files = make_files(log_format)
    with patched("write", full_disk(10)), pytest.raises(OSError, match="No space left"):
        files.append("s", [event(1)], ignore)
    assert files.path("s").read_bytes() == b""
    write(files, "s", 2)
    data = files.path("s").read_bytes()
    found = orjson.loads(data) if log_format == "json" else lines_of(files.path("s"))
    assert [(line["seq"], line["event"]["n"]) for line in found] == [(1, 2)]


def test_a_limit_on_file_sizes_tears_no_line(make_files: Callable[..., SessionFiles]) -> None:
    """The kernel's own short write and error are undone like any other."""
    files = make_files()
    write(files, "s", 1)
    size = files.path("s").stat().st_size
    with soft_limit(resource.RLIMIT_FSIZE, size + 20), pytest.raises(OSError, match="too large"):
        files.append("s", [event(2)], ignore)
    assert files.path("s").stat().st_size == size
    write(files, "s", 3)
    assert numbers_in(files.path("s")) == [1, 3]


def test_an_interrupted_write_is_undone(make_files: Callable[..., SessionFiles]) -> None:
    """Control-C in the middle of a write leaves whole lines only."""
    files, real = make_files(), os.write
    write(files, "s", 1)

    def interrupted(fd: int, data: memoryview) -> int:
        real(fd, data[:5])
        raise KeyboardInterrupt

    with patched("write", interrupted), pytest.raises(KeyboardInterrupt):
        files.append("s", [event(2)], ignore)
    write(files, "s", 3)
    assert numbers_in(files.path("s")) == [1, 3]


def test_a_line_that_cannot_be_taken_back_stays_behind(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """Where even the repair fails, the session goes on in a new file."""
    files = make_files()
    write(files, "s", 1)
    with (
        patched("write", full_disk(10)),
        patched("ftruncate", refuse(errno.EIO)),
        pytest.raises(OSError, match="No space left"),
    ):
        files.append("s", [event(2)], ignore)
    write(files, "s", 3)
    assert files.path("s").name == "log-1.jsonl"
    assert [(line["seq"], line["event"]["n"]) for line in lines_of(files.path("s"))] == [(1, 3)]
    assert held(base) == ["s"]


def test_an_array_that_cannot_be_closed_again_stays_behind(
    make_files: Callable[..., SessionFiles],
) -> None:
    """Where the end of an array cannot be put back, the session goes on in a new file."""
    files = make_files("json")
    write(files, "s", 1)
    with (
        patched("write", full_disk(10)),
        patched("pwrite", refuse(errno.ENOSPC)),
        pytest.raises(OSError, match="No space left"),
    ):
        files.append("s", [event(2)], ignore)
    write(files, "s", 3)
    assert files.path("s").name == "log-1.json"
    assert [x["event"]["n"] for x in orjson.loads(files.path("s").read_bytes())] == [3]


def test_where_descriptors_run_out_ours_are_given_back(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """EMFILE costs the least recently used descriptors, no event."""
    files = make_files()
    sessions = ["a", "b", "c", "d", "e", "f"]
    for session_id in sessions:
        write(files, session_id, 1)
    with no_descriptors_left():
        write(files, "new", 1)
    assert held(base) == ["d", "e", "f", "new"]
    assert numbers_in(files.path("new")) == [1]


def test_where_no_descriptor_is_ours_the_error_is_raised(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """EMFILE with nothing to give back is the caller's to hear; afterwards it works."""
    files = make_files()
    with no_descriptors_left(), pytest.raises(OSError, match="Too many open files"):
        files.append("s", [event(1)], ignore)
    write(files, "s", 2)
    assert numbers_in(base / "s" / "log.jsonl") == [2]


def test_other_errors_give_no_descriptor_back(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """A session that cannot be opened does not cost the others their descriptors."""
    files = make_files()
    write(files, "a", 1)
    (base / "b").write_bytes(b"in the way")
    with pytest.raises(NotADirectoryError):
        files.append("b", [event(1)], ignore)
    assert held(base) == ["a"]


def test_failed_opens_leak_no_descriptor(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """An open that fails half way gives back what it had opened."""
    files = make_files(directory="agents/{session_id}")
    (base / "agents").mkdir(parents=True)
    (base / "agents" / "s").write_bytes(b"in the way")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(NotADirectoryError):
            files.append("s", [event(1)], ignore)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("known", [False, True])
def test_a_file_that_cannot_be_asked_is_closed(
    make_files: Callable[..., SessionFiles], base: Path, known: bool
) -> None:
    """Where an opened file does not say what it is, it is closed, and the next try works."""
    files = make_files(max_open_files=1)
    if known:
        write(files, "s", 1)
        write(files, "other", 1)

    def failing(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = held(base)
    with patched("fstat", failing), pytest.raises(OSError, match="Input/output"):
        files.append("s", [event(2)], ignore)
    assert held(base) == before
    write(files, "s", 3)
    write(files, "s", 4)
    assert numbers_in(files.path("s")) == ([1, 3, 4] if known else [3, 4])


def test_forked_begins_new_files(make_files: Callable[..., SessionFiles], base: Path) -> None:
    """After a fork the parent's files are closed in the child and not written."""
    files = make_files()
    write(files, "s", 1)
    files.forked()
    assert held(base) == []
    write(files, "s", 2)
    assert numbers_in(base / "s" / "log.jsonl") == [1]
    assert [(x["seq"], x["event"]["n"]) for x in lines_of(base / "s" / "log-1.jsonl")] == [(1, 2)]


def test_forked_does_not_wait_for_a_lock_of_the_parent(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """A real child writes, though another thread of the parent was writing during the fork."""
    files = make_files()
    inside, go_on = threading.Event(), threading.Event()

    def hold(written: Written) -> None:
        inside.set()
        go_on.wait(30)

    thread = threading.Thread(target=files.append, args=("s", [event(1)], hold))
    thread.start()
    inside.wait(30)
    with warnings.catch_warnings():
        # From 3.12 on forking beside threads is warned of: it is what this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            files.forked()
            os._exit(1 - files.append("s", [event(2)], ignore))
        finally:
            os._exit(2)
    deadline, ended = time.monotonic() + 30, (0, 0)
    while ended[0] == 0 and time.monotonic() < deadline:
        ended = os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)
    go_on.set()
    thread.join(30)
    assert ended == (child, 0)
    assert numbers_in(base / "s" / "log.jsonl") == [1]
    assert numbers_in(base / "s" / "log-1.jsonl") == [2]


class Known:
    """A registrar that remembers what it heard, and when."""

    outbox = "the outbox"

    def __init__(self) -> None:
        self.generation = 0
        self.heard: list[tuple[str, str, int]] = []
        self.answer: int | None = None

    def register(self, path: str, session: str, size: int) -> int:
        """Remember a file."""
        self.heard.append((path, session, size))
        return self.generation if self.answer is None else self.answer


def test_a_registrar_hears_of_a_file_before_its_first_line(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """A file is made known once, when there is nothing in it yet."""
    sizes: list[int] = []

    class Looking(Known):
        def register(self, path: str, session: str, size: int) -> int:
            sizes.append((base / path).stat().st_size)
            return super().register(path, session, size)

    known = Looking()
    files = make_files(registrar=known)
    assert write(files, "s", 1, 2)[0].session_id == "s"
    assert known.heard == [("s/log.jsonl", "s", 0)]
    assert sizes == [0]


def test_a_file_without_a_session_is_known_by_its_directorys_name(
    make_files: Callable[..., SessionFiles],
) -> None:
    """The unknown session goes by a name too."""
    known = Known()
    write(make_files(registrar=known), None, 1)
    ((path, session, _),) = known.heard
    assert path == f"{session}/log.jsonl"


def test_a_new_generation_is_made_known_again(make_files: Callable[..., SessionFiles]) -> None:
    """A file that is written on is made known with the bytes that it has."""
    known = Known()
    files = make_files(registrar=known)
    write(files, "s", 1)
    known.generation = 1
    write(files, "s", 2, 3)
    size = len(files.path("s").read_bytes().splitlines(keepends=True)[0])
    assert known.heard == [("s/log.jsonl", "s", 0), ("s/log.jsonl", "s", size)]


def test_a_registrar_that_could_not_is_asked_again(make_files: Callable[..., SessionFiles]) -> None:
    """Until a file is known, each write asks; no line waits for that."""
    known = Known()
    known.answer = -1
    write(make_files(registrar=known), "s", 1, 2)
    assert len(known.heard) == 2


def test_what_was_written_names_its_bytes(make_files: Callable[..., SessionFiles]) -> None:
    """Whoever reads a file back knows where each event begins and ends."""
    files, found = make_files(registrar=Known()), list[Written]()
    write(files, "s", 1)
    files.append("s", [event(2), event(3)], found.append)
    content = files.path("s").read_bytes()
    (written,) = found
    assert (written.outbox, written.path, written.session) == ("the outbox", "s/log.jsonl", "s")
    spans = [written.span(index) for index in range(2)]
    assert [content[a:b] for a, b in spans] == content.splitlines(keepends=True)[1:]


def test_a_full_file_is_followed_by_another(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """Past `max_file_bytes` the next event begins a new file, whose numbers begin anew."""
    files = make_files(max_file_bytes=300)
    write(files, "s", *range(6))
    sizes = {path.name: path.stat().st_size for path in (base / "s").iterdir()}
    assert len(sizes) > 1
    assert all(size < 600 for size in sizes.values())
    assert [line["seq"] for line in lines_of(base / "s" / "log.jsonl")][:2] == [1, 2]
    assert lines_of(base / "s" / "log-1.jsonl")[0]["seq"] == 1


def test_committed_is_what_is_written_for_good(make_files: Callable[..., SessionFiles]) -> None:
    """Only a file that we write, open or not, has a size that counts."""
    files = make_files(max_open_files=1)
    write(files, "s", 1)
    size = files.path("s").stat().st_size
    assert files.committed("s", "s/log.jsonl") == size
    write(files, "t", 1)
    assert files.committed("s", "s/log.jsonl") == size
    assert files.committed("s", "s/other.jsonl") is None
    assert files.committed("nobody", "nobody/log.jsonl") is None


def test_another_writers_file_is_not_ours_by_its_name(
    make_files: Callable[..., SessionFiles], base: Path
) -> None:
    """The name that we would take first may be a dead writer's, whose lines are still owed."""
    write(make_files(), "s", 1)
    files, answers = make_files(), list[int | None]()
    real = os.open

    def asking(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            answers.append(files.committed("s", "s/log.jsonl"))
        return real(path, flags, *args, **options)

    with patched("open", asking):
        write(files, "s", 2)
    assert set(answers) == {None}
    assert numbers_in(base / "s" / "log-1.jsonl") == [2]
