"""How far transports are, in SQLite: whose rows these are, and what is done when it is lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import resource
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventlog_handler import EventSessionLogger, NullTransport, _lifecycle, _outbox
from eventlog_handler._files import SessionFiles
from eventlog_handler._outbox import DATABASE, MADE, Outbox, Owed
from eventlog_handler._owner import exclusive, owners
from eventlog_handler._report import Report
from eventlog_handler._stamp import process_id
from tests.test_owner import HUNG_SECONDS, Child, fork

__all__ = ["fork"]

Make = Callable[..., Outbox]
Fork = Callable[[Callable[[Child], object]], Child]
Scan = Callable[[], Iterable[tuple[str, str, str]]]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a slow machine cost no test; keep what other tests have left out of the forks."""
    monkeypatch.setattr(_outbox, "BUSY_SECONDS", HUNG_SECONDS)
    monkeypatch.setattr(_outbox, "FORK_SECONDS", HUNG_SECONDS)
    monkeypatch.setattr(_lifecycle, "_connected", dict[int, object]())
    monkeypatch.setattr(_outbox, "_untouchable", set[Path]())


@pytest.fixture
def heard() -> list[Exception]:
    """What the error handlers of all outboxes have been told."""
    return []


@pytest.fixture
def make(base: Path, heard: list[Exception]) -> Iterator[Make]:
    """Make outboxes of one base directory, closed when the test ends."""
    made: list[Outbox] = []

    def make(scan: Scan = tuple, directory_mode: int = 0o700) -> Outbox:
        report = Report(lambda error, context: heard.append(error))
        made.append(Outbox(base, directory_mode, report, scan))
        return made[-1]

    yield make
    for outbox in made:
        outbox.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time by which failed databases are tried again: it stands still."""
    clock = SimpleNamespace(now=1000.0, time_ns=time.time_ns)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(_outbox, "time", clock)
    return clock


@pytest.fixture
def impatient(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up on a database that is locked after a moment."""
    monkeypatch.setattr(_outbox, "BUSY_SECONDS", 0.01)


def owed(path: str, position: int = 0, session: str = "s") -> Owed:
    """Return a file and how far it is sent."""
    return Owed(path, session, position)


def paths(found: Iterable[Owed]) -> list[str]:
    """Return the paths of files alone."""
    return [each.path for each in found]


def query(base: Path, sql: str) -> list[Any]:
    """Ask the database over another connection, which cannot make it."""
    uri = f"file:{base / '.eventlog' / DATABASE}?mode=rw"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
        return database.execute(sql).fetchall()


def stored(base: Path, transport: str = "t") -> dict[str, int]:
    """Return the positions that another process would find, by path."""
    wanted = f"transport = '{transport}' ORDER BY number"
    return dict(query(base, f"SELECT path, position FROM acked WHERE {wanted}"))


def owner_of(base: Path, path: str) -> str:
    """Return the owner of a file's row."""
    [[owner]] = query(base, f"SELECT owner FROM acked WHERE path = '{path}'")
    return str(owner)


def owner_files(base: Path) -> list[str]:
    """Return the names of the files of all owners."""
    return [f"{owner}.owner" for owner in owners(base / ".eventlog")]


def leave_behind(base: Path, *files: Owed, transport: str = "t") -> None:
    """Save files as a process does that then dies."""
    outbox = Outbox(base, 0o700, Report(None), tuple)
    assert outbox.save(transport, files)


def lose(base: Path, suffixes: Iterable[str] = ("", "-wal", "-shm")) -> None:
    """Take the database away."""
    for suffix in suffixes:
        (base / ".eventlog" / f"{DATABASE}{suffix}").unlink(missing_ok=True)


def scanned(*found: tuple[str, str, str]) -> tuple[Scan, list[int]]:
    """Return a function that finds these files, and a list that gets an entry at each call."""
    calls: list[int] = []

    def scan() -> Iterable[tuple[str, str, str]]:
        calls.append(len(calls))
        return found

    return scan, calls


@contextlib.contextmanager
def locked(base: Path) -> Iterator[None]:
    """Hold the database's write lock for a while, as another process would."""
    path = base / ".eventlog" / DATABASE
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@contextlib.contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """Let no file grow beyond some bytes for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def thread(function: Callable[[], object], go_on: threading.Event) -> Iterator[threading.Thread]:
    """Run a function that waits for an event on another thread; all is over at the end."""
    runs = threading.Thread(target=function, daemon=True)
    runs.start()
    try:
        yield runs
    finally:
        go_on.set()
        runs.join(HUNG_SECONDS)
        assert not runs.is_alive()


@contextlib.contextmanager
def stuck(outbox: Outbox, path: str = "stuck") -> Iterator[threading.Event]:
    """Have another thread stand inside a transaction; yields what lets it go on."""
    inside, go_on = threading.Event(), threading.Event()

    def finished() -> Iterator[str]:
        inside.set()
        assert go_on.wait(HUNG_SECONDS)
        yield from ()

    with thread(lambda: outbox.save("t", [owed(path)], finished()), go_on):
        assert inside.wait(HUNG_SECONDS)
        yield go_on


def open_files(base: Path) -> list[str]:
    """Return the names of the files below a base that this process has open."""
    targets = []
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            targets.append(Path(os.readlink(f"/proc/self/fd/{each}")))
    return sorted(target.name for target in targets if base in target.parents)


# Register


def test_a_new_file_is_known_when_register_returns(make: Make, base: Path) -> None:
    """Its row is there for other connections, for each transport, with nothing earlier left."""
    outbox = make()
    assert outbox.register("s/1", "s", {"t": 7, "u": 0}) == {"t": [], "u": []}
    assert stored(base, "t") == {"s/1": 7}
    assert stored(base, "u") == {"s/1": 0}


def test_a_registered_file_survives_a_kill(make: Make, base: Path, fork: Fork) -> None:
    """A process that is killed right after register has told the next one of its file."""

    def register(test: Child) -> None:
        make().register("s/1", "s", {"t": 7})
        test.say("registered")
        test.hear()

    child = fork(register)
    assert child.hear() == "registered"
    child.kill()
    assert stored(base) == {"s/1": 7}
    assert make().adopt("t", ["t"]) == [owed("s/1", 7)]


def test_what_the_dead_left_of_a_session_comes_first(make: Make, base: Path) -> None:
    """Register returns the session's files of dead processes, oldest first, and no others."""
    leave_behind(base, owed("s/2", 20), owed("other/1", 5, "other"))
    leave_behind(base, owed("s/1", 10))
    leave_behind(base, owed("s/2", 0), transport="u")
    found = make().register("s/3", "s", {"t": 0, "u": 0, "v": 0})
    assert found == {
        "t": [owed("s/2", 20), owed("s/1", 10)],
        "u": [owed("s/2", 0)],
        "v": [],
    }


def test_what_the_dead_left_is_given_once(make: Make, base: Path) -> None:
    """What register has returned is ours: neither it nor anybody else returns it again."""
    leave_behind(base, owed("s/1"))
    outbox, other = make(), make()
    assert outbox.register("s/2", "s", {"t": 0}) == {"t": [owed("s/1")]}
    assert outbox.register("s/3", "s", {"t": 0}) == {"t": []}
    assert other.register("s/4", "s", {"t": 0}) == {"t": []}
    assert other.adopt("t", ["t"]) == []


def test_files_of_the_living_are_not_given(make: Make, fork: Fork) -> None:
    """A session's files that this or another living process sends stay theirs."""

    def live(test: Child) -> None:
        make().save("t", [owed("s/theirs")])
        test.say("saved")
        test.hear()

    outbox, other = make(), make()
    child = fork(live)
    assert child.hear() == "saved"
    other.save("t", [owed("s/other")])
    outbox.save("t", [owed("s/own")])
    assert outbox.register("s/new", "s", {"t": 0}) == {"t": []}
    child.kill()
    assert outbox.register("s/newer", "s", {"t": 0}) == {"t": [owed("s/theirs")]}


def test_our_own_files_are_ours_without_the_lock(make: Make, base: Path) -> None:
    """Who has lost the file that says it lives does not take itself for dead."""
    outbox = make()
    outbox.save("t", [owed("s/1")])
    (base / ".eventlog" / f"{owner_of(base, 's/1')}.owner").unlink()
    assert outbox.register("s/2", "s", {"t": 0}) == {"t": []}


def test_a_file_can_be_made_known_again(make: Make, base: Path) -> None:
    """Registering the same file moves its position and keeps its place in the order."""
    outbox = make()
    for path, position in (("s/1", 0), ("s/2", 0), ("s/1", 9)):
        assert outbox.register(path, "s", {"t": position}) == {"t": []}
    assert list(stored(base).items()) == [("s/1", 9), ("s/2", 0)]


@pytest.mark.parametrize("session", ["", "ü", "\ud800", "a\udcff\x00b", "😀"])
def test_any_session_comes_back_as_it_was(make: Make, base: Path, session: str) -> None:
    """A session's id may hold what UTF-8 has no bytes for, and is compared exactly."""
    leave_behind(base, owed("1", 1, session), owed("2", 2, session + "x"))
    outbox = make()
    assert outbox.register("3", session, {"t": 0}) == {"t": [owed("1", 1, session)]}
    assert outbox.adopt("t", ["t"]) == [owed("2", 2, session + "x")]


def test_a_path_that_has_no_utf_8_raises_nothing(make: Make, heard: list[Exception]) -> None:
    """What cannot be saved is said so, and the error handler hears why."""
    assert make().register("\udcff/1", "s", {"t": 0}) is None
    assert [type(error) for error in heard] == [UnicodeEncodeError]


# Save


def test_positions_are_saved_and_what_is_finished_goes(make: Make, base: Path) -> None:
    """Save replaces positions, adds new files and removes finished ones, in one transaction."""
    outbox = make()
    assert outbox.save("t", [owed("1", 1), owed("2", 2), owed("3", 3)])
    assert outbox.save("u", [owed("1", 100)])
    assert outbox.save("t", [owed("2", 20), owed("4", 4)], ["1", "3", "unknown"])
    assert stored(base) == {"2": 20, "4": 4}
    assert stored(base, "u") == {"1": 100}


def test_an_interrupted_transaction_is_taken_back(make: Make, base: Path) -> None:
    """Ctrl-C inside of one leaves all as it was, and the next one works at once."""

    def interrupt() -> Iterator[str]:
        raise KeyboardInterrupt
        yield

    outbox = make()
    outbox.save("t", [owed("1", 1)])
    with pytest.raises(KeyboardInterrupt):
        outbox.save("t", [owed("1", 2)], interrupt())
    assert stored(base) == {"1": 1}
    assert outbox.save("t", [owed("1", 3)])
    assert stored(base) == {"1": 3}


# Adopt


def test_a_killed_process_leaves_its_files(make: Make, fork: Fork) -> None:
    """Rows of a process that lives stay its own; once it is killed they can be adopted."""

    def live(test: Child) -> None:
        make().save("t", [owed("1", 1)])
        test.say("saved")
        test.hear()

    child, outbox = fork(live), make()
    assert child.hear() == "saved"
    assert outbox.adopt("t", ["t"]) == []
    child.kill()
    assert outbox.adopt("t", ["t"]) == [owed("1", 1)]


def test_another_outbox_of_the_same_process_keeps_its_files(make: Make) -> None:
    """Two gateways of one process are two owners, as long as both are there."""
    outbox, other = make(), make()
    other.save("t", [owed("1")])
    outbox.save("t", [owed("2")])
    assert outbox.adopt("t", ["t"]) == []
    other.close()
    assert outbox.adopt("t", ["t"]) == [owed("1")]


def test_each_transport_adopts_its_own_files(make: Make, base: Path) -> None:
    """What is left for one transport is not given to another."""
    leave_behind(base, owed("1", 1), transport="t")
    leave_behind(base, owed("1", 2), transport="u")
    outbox = make()
    assert outbox.adopt("t", ["t", "u"]) == [owed("1", 1)]
    assert outbox.adopt("u", ["t", "u"]) == [owed("1", 2)]


def test_whole_sessions_are_adopted_in_chunks(
    make: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked repeatedly it gives all, oldest first, and never a part of a session."""
    for number, name in enumerate(("a1", "b1", "a2", "c1", "a3", "c2", "a4")):
        leave_behind(base, owed(name, number, name[0]))
    monkeypatch.setattr(_outbox, "CHUNK_ROWS", 3)
    outbox = make()
    chunks = []
    while found := outbox.adopt("t", ["t"]):
        chunks.append(paths(found))
    sessions = [{name[0] for name in chunk} for chunk in chunks]
    assert sorted(itertools.chain(*chunks)) == ["a1", "a2", "a3", "a4", "b1", "c1", "c2"]
    assert all(chunk == sorted(chunk, key=lambda name: name[1]) for chunk in chunks)
    assert len(sessions) > 1
    assert not set.intersection(*sessions)


def test_few_files_are_adopted_at_once(make: Make, base: Path) -> None:
    """Below `CHUNK_ROWS` rows everything comes with the first call."""
    leave_behind(base, *(owed(str(number), number) for number in range(_outbox.CHUNK_ROWS - 1)))
    outbox = make()
    assert len(outbox.adopt("t", ["t"])) == _outbox.CHUNK_ROWS - 1
    assert outbox.adopt("t", ["t"]) == []


def test_sessions_are_whole_however_many_have_died(
    make: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session's later file is not given before the earlier one of another dead process."""
    monkeypatch.setattr(_outbox, "CHUNK_ROWS", 2)
    leave_behind(base, owed("z/1", session="z"))
    leave_behind(base, owed("z/2", session="z"), owed("a/1", session="a"))
    leave_behind(base, owed("b/1", session="b"))
    outbox, order = make(), []
    while found := outbox.adopt("t", ["t"]):
        order += paths(found)
    assert order.index("z/1") < order.index("z/2")


def test_of_many_who_adopt_at_once_one_gets_each_file(make: Make, base: Path, fork: Fork) -> None:
    """Six processes that adopt at the same moment share 300 files; none is left, none is shared."""
    files = [owed(f"{number}", number, f"s{number}") for number in range(300)]
    leave_behind(base, *files)

    def adopt(test: Child) -> None:
        outbox, mine = make(), []
        test.say("ready")
        test.hear()
        while found := outbox.adopt("t", ["t"]):
            mine += paths(found)
        test.say(mine)
        # Whoever ended now would leave its files to the others.
        test.hear()

    children = [fork(adopt) for _ in range(6)]
    assert [child.hear() for child in children] == ["ready"] * 6
    for child in children:
        child.say("go")
    shares = [child.hear() for child in children]
    assert sorted(itertools.chain(*shares)) == sorted(paths(files))


def test_locks_of_the_dead_that_own_nothing_go(make: Make, base: Path) -> None:
    """Adopting removes the files of owners whose last row is gone, and of no others."""
    leave_behind(base, owed("1"))
    [first] = owners(base / ".eventlog")
    leave_behind(base, owed("1"), transport="u")
    outbox, busy, idle = make(), make(), make()
    busy.save("v", [owed("1")])
    idle.save("v", ())
    assert first in owners(base / ".eventlog")
    outbox.adopt("t", ["t", "u"])
    assert first not in owners(base / ".eventlog")
    assert len(owners(base / ".eventlog")) == 4
    outbox.adopt("u", ["t", "u"])
    assert len(owners(base / ".eventlog")) == 3


def test_a_planted_link_among_the_owners_stops_nobody(make: Make, base: Path) -> None:
    """A link that looks like an owner's file holds no adoption up."""
    leave_behind(base, owed("1"))
    (base / ".eventlog" / "x.owner").symlink_to("/nowhere")
    assert make().adopt("t", ["t"]) == [owed("1")]


def test_sessions_that_go_on_here_are_adopted_first_and_whole(
    make: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a session that we send comes with the first call, however much waits."""
    monkeypatch.setattr(_outbox, "CHUNK_ROWS", 1)
    leave_behind(base, *(owed(f"{name}{n}", n, name) for n in (1, 2) for name in "abc"))
    outbox = make()
    outbox.save("t", [owed("c3", 3, "c")])
    assert paths(outbox.adopt("t", ["t"])) == ["a1", "c1", "a2", "c2"]
    assert paths(outbox.adopt("t", ["t"])) == ["b1", "b2"]


def test_who_has_sent_a_file_does_not_forget_it_for_another(make: Make, base: Path) -> None:
    """A file that its writer has made known again meanwhile stays known."""
    outbox, writer = make(), make()
    leave_behind(base, owed("s/1"))
    assert outbox.adopt("t", ["t"]) == [owed("s/1")]
    writer.register("s/1", "s", {"t": 5})
    outbox.save("t", (), ["s/1"])
    assert stored(base) == {"s/1": 5}


# Release and close


def test_release_forgets_what_is_finished(make: Make, base: Path) -> None:
    """What is unfinished waits for adoption while we live on; the rest of ours is gone."""
    outbox, other = make(), make()
    outbox.save("t", [owed("1", 1), owed("2", 2)])
    outbox.save("u", [owed("1", 3)])
    other.save("t", [owed("theirs", 4)])
    outbox.release("t", ["2"], keep=False)
    assert stored(base) == {"2": 2, "theirs": 4}
    assert stored(base, "u") == {"1": 3}
    assert other.adopt("t", ["t", "u"]) == [owed("2", 2)]


def test_what_release_keeps_is_not_adopted(make: Make, base: Path) -> None:
    """Kept for a transport of that name that may come back, files stay ours until we end."""
    outbox, other = make(), make()
    outbox.save("t", [owed("1", 1), owed("2", 2)])
    outbox.release("t", ["2"], keep=True)
    assert stored(base) == {"2": 2}
    assert other.adopt("t", ["t"]) == []
    outbox.close()
    assert other.adopt("t", ["t"]) == [owed("2", 2)]


def test_close_leaves_everything_in_the_database(make: Make, base: Path) -> None:
    """No log, no lock and no descriptor stays; closing twice is no error."""
    outbox = make()
    outbox.save("t", [owed("1", 1)])
    outbox.close()
    outbox.close()
    assert open_files(base) == []
    names = sorted(path.name for path in (base / ".eventlog").iterdir())
    assert names == sorted([DATABASE, MADE])
    assert stored(base) == {"1": 1}


def test_a_failing_close_is_no_error(make: Make, base: Path) -> None:
    """With the database gone, close ends all the same."""
    outbox = make()
    outbox.save("t", [owed("1", 1)])
    with locked(base):
        lose(base)
        outbox.close()
    assert open_files(base) == []


def test_what_comes_after_close_is_nobodys(make: Make, base: Path) -> None:
    """A late file is known to the next process, which need not wait for the end of this one."""
    outbox = make()
    outbox.save("t", [owed("1", 1)])
    outbox.close()
    assert outbox.register("s/2", "s", {"t": 5}) == {"t": [owed("1", 1)]}
    assert outbox.save("t", [owed("1", 2)])
    assert open_files(base) == []
    assert owners(base / ".eventlog") == []
    assert make().adopt("t", ["t"]) == [owed("1", 2), owed("s/2", 5)]


def test_a_late_file_that_is_known_again_is_not_an_earlier_one(make: Make) -> None:
    """After close too, register returns the session's other files, and never the file itself."""
    outbox = make()
    outbox.close()
    for _ in range(2):
        assert outbox.register("s/1", "s", {"t": 0}) == {"t": []}
    assert outbox.register("s/2", "s", {"t": 0}) == {"t": [owed("s/1")]}


def test_a_release_after_close_takes_nothing_away(make: Make, base: Path) -> None:
    """Files that wait for adoption are not forgotten by who had them."""
    outbox = make()
    outbox.save("t", [owed("1", 1)])
    outbox.release("t", ["1"], keep=False)
    outbox.close()
    outbox.release("t", [], keep=False)
    assert stored(base) == {"1": 1}


def test_what_is_closed_adopts_nothing(make: Make) -> None:
    """Files wait for somebody who sends them."""
    outbox = make()
    outbox.save("t", [owed("1")])
    outbox.close()
    assert outbox.adopt("t", ["t"]) == []


def log(gateway: EventSessionLogger, number: int) -> None:
    """Log an event and wait until it is in its file."""
    assert asyncio.run(_log(gateway, number))


async def _log(gateway: EventSessionLogger, number: int) -> bool:
    return await gateway({"session_id": "s", "n": number})


def test_late_events_are_known_however_late(make: Make, base: Path) -> None:
    """Events after the end of a gateway wait for adoption, also after others have been adopted."""
    gateway = EventSessionLogger(base, downstream_transport=NullTransport())
    [name] = gateway.stats().transports
    log(gateway, 1)
    gateway.at_exit(time.monotonic() + HUNG_SECONDS)
    log(gateway, 2)
    outbox = make()
    [file] = outbox.adopt(name, [name])
    outbox.save(name, (), [file.path])
    log(gateway, 3)
    assert list(stored(base, name)) == [file.path]


def test_events_during_the_end_are_known(
    make: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event whose call returns while a gateway ends waits for adoption."""
    closing, go_on, close = threading.Event(), threading.Event(), Outbox.close

    def slow(outbox: Outbox) -> None:
        closing.set()
        assert go_on.wait(HUNG_SECONDS)
        close(outbox)

    gateway = EventSessionLogger(base, downstream_transport=NullTransport())
    [name] = gateway.stats().transports
    log(gateway, 1)
    assert gateway._delivery.flush(None, time.monotonic() + HUNG_SECONDS) == ()
    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "close", slow)
        with thread(lambda: gateway.at_exit(time.monotonic() + HUNG_SECONDS), go_on):
            assert closing.wait(HUNG_SECONDS)
            log(gateway, 2)
    assert len(stored(base, name)) == 1


def test_an_event_that_is_being_written_during_the_end_is_known(
    make: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose file was known before, and whose line comes after, waits for adoption too."""
    writing, go_on, write = threading.Event(), threading.Event(), SessionFiles._write

    def slow(files: SessionFiles, *args: Any) -> None:
        writing.set()
        assert go_on.wait(HUNG_SECONDS)
        write(files, *args)

    gateway = EventSessionLogger(base, downstream_transport=NullTransport())
    [name] = gateway.stats().transports
    log(gateway, 1)
    assert gateway._delivery.flush(None, time.monotonic() + HUNG_SECONDS) == ()
    with monkeypatch.context() as patch:
        patch.setattr(SessionFiles, "_write", slow)
        with thread(lambda: log(gateway, 2), go_on):
            assert writing.wait(HUNG_SECONDS)
            gateway._delivery.close(time.monotonic() + HUNG_SECONDS)
    assert len(stored(base, name)) == 1


def test_where_nothing_was_saved_nothing_is_made(make: Make, base: Path) -> None:
    """Adopting, letting go and closing leave a base as it was: not there."""
    outbox = make()
    assert outbox.adopt("t", ["t"]) == []
    outbox.release("t", [], keep=False)
    outbox.close()
    assert not base.exists()


def test_a_forgotten_outbox_leaves_nothing_open(base: Path) -> None:
    """Garbage that was never closed keeps no descriptor and no lock; its files can be adopted."""
    leave_behind(base, owed("1", 1))
    gc.collect()
    assert open_files(base) == []
    assert stored(base) == {"1": 1}


def test_what_was_never_made_can_be_garbage() -> None:
    """An outbox whose construction was broken off has nothing to let go of."""
    Outbox.__new__(Outbox).__del__()


# A database that is lost


def test_a_new_base_is_not_scanned(make: Make, base: Path) -> None:
    """Where there never was a database its first one is empty, whatever files there are."""
    scan, calls = scanned(("s/1", "s", "x"))
    outbox = make(scan)
    outbox.save("t", [owed("2")])
    assert outbox.adopt("t", ["t"]) == []
    assert calls == []


def test_a_database_that_is_whole_is_not_scanned_for(make: Make, base: Path) -> None:
    """Another process that finds it as it was left takes what is in it for all there is."""
    leave_behind(base, owed("1", 1))
    scan, calls = scanned(("2", "s", "x"))
    assert make(scan).adopt("t", ["t"]) == [owed("1", 1)]
    assert calls == []


@pytest.mark.parametrize("suffixes", [("", "-wal", "-shm"), ("",)])
def test_a_database_deleted_in_use_is_made_anew(
    make: Make, base: Path, suffixes: tuple[str, ...]
) -> None:
    """The next transaction goes to a new one, and says that what was saved has to be again."""
    outbox = make()
    outbox.save("t", [owed("1", 1)])
    lose(base, suffixes)
    assert outbox.losses == 0
    assert outbox.save("t", [owed("2", 2)])
    assert outbox.losses == 1
    assert not outbox.failing
    assert stored(base) == {"2": 2}


def test_after_a_loss_all_files_are_found_again(
    make: Make, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file there is is entered for every transport, once, and given from its beginning."""
    scan, calls = scanned(("s/1", "s", "x"), ("s/2", "s", "x"), ("%/1", "\ud800", ""))
    outbox = make(scan)
    outbox.save("t", [owed("s/2", 20)])
    lose(base)
    outbox.save("t", [owed("s/2", 20)])
    assert outbox.adopt("t", ["t", "u"]) == [owed("s/1"), owed("%/1", 0, "\ud800")]
    assert outbox.adopt("u", ["t", "u"]) == [owed("s/1"), owed("s/2"), owed("%/1", 0, "\ud800")]
    assert stored(base)["s/2"] == 20
    assert calls == [0]
    assert capsys.readouterr().err.count("the delivery database was lost") == 1


def test_a_database_deleted_between_two_processes_is_noticed(make: Make, base: Path) -> None:
    """The next process, which has never seen the old one, looks for files too."""
    leave_behind(base, owed("1", 1))
    lose(base)
    scan, calls = scanned(("1", "s", "x"))
    assert make(scan).adopt("t", ["t"]) == [owed("1")]
    assert calls == [0]


def test_files_of_the_living_are_found_as_theirs(make: Make, base: Path, fork: Fork) -> None:
    """After a loss a living process's file waits for it; once it is killed it is sent again."""

    def live(test: Child) -> None:
        make().save("t", [owed("theirs", 1)])
        test.say(process_id())
        test.hear()

    child = fork(live)
    theirs = child.hear()
    lose(base)
    outbox = make(lambda: [("theirs", "s", theirs), ("dead", "s", "x")])
    assert outbox.adopt("t", ["t"]) == [owed("dead")]
    assert owner_of(base, "theirs").startswith(f"{theirs}-")
    child.kill()
    assert outbox.adopt("t", ["t"]) == [owed("theirs")]


def test_a_living_process_corrects_what_was_found(make: Make, base: Path) -> None:
    """A file that a search has left to anybody is its sender's again as soon as that one saves."""
    sender = make()
    sender.save("t", [owed("1", 1)])
    lose(base)
    outbox = make(lambda: [("1", "s", "x")])
    assert outbox.adopt("u", ["t", "u"]) == [owed("1")]
    sender.save("t", [owed("1", 1)])
    assert outbox.adopt("t", ["t", "u"]) == []
    assert stored(base) == {"1": 1}


def test_a_loss_that_another_process_has_noticed_is_noticed_too(make: Make, base: Path) -> None:
    """Who comes to find another database than its own saves again what it has."""
    outbox, other = make(), make()
    outbox.save("t", [owed("1", 1)])
    lose(base)
    other.save("t", [owed("2", 2)])
    assert (outbox.losses, other.losses) == (0, 0)
    outbox.save("t", [owed("1", 1)])
    assert (outbox.losses, other.losses) == (1, 0)
    assert stored(base) == {"2": 2, "1": 1}


@pytest.mark.parametrize("how", ["interrupted", "not saved"])
def test_a_scan_that_fails_is_done_by_the_next(
    make: Make, base: Path, clock: SimpleNamespace, impatient: None, how: str
) -> None:
    """Whether the search was broken off or its result could not be saved, it is made again."""
    leave_behind(base, owed("1"))
    lose(base)

    def scan() -> Iterator[tuple[str, str, str]]:
        yield "1", "s", "x"
        if how == "interrupted":
            raise KeyboardInterrupt
        lock.enter_context(locked(base))

    outbox = make(scan)
    with contextlib.ExitStack() as lock, contextlib.suppress(KeyboardInterrupt):
        assert outbox.adopt("t", ["t"]) == []
    clock.now += _outbox.RETRY_SECONDS
    assert make(lambda: [("1", "s", "x")]).adopt("t", ["t"]) == [owed("1")]


def test_rubbish_is_kept_aside(
    make: Make, base: Path, heard: list[Exception], clock: SimpleNamespace
) -> None:
    """A file that is no database is moved away, and files are looked for: there was one once."""
    leave_behind(base, owed("1", 1))
    (base / ".eventlog" / DATABASE).write_bytes(b"rubbish" * 1000)
    scan, calls = scanned(("1", "s", "x"))
    outbox = make(scan)
    assert outbox.register("2", "s", {"t": 0}) is None
    assert [type(error) for error in heard] == [sqlite3.DatabaseError]
    [aside] = (base / ".eventlog" / "damaged").iterdir()
    assert aside.name.startswith(f"{DATABASE}-")
    assert aside.read_bytes() == b"rubbish" * 1000
    clock.now += _outbox.RETRY_SECONDS
    assert outbox.register("2", "s", {"t": 0}) == {"t": []}
    assert outbox.adopt("t", ["t"]) == [owed("1")]
    assert calls == [0]


def test_a_database_that_becomes_rubbish_in_use_is_replaced(
    make: Make,
    base: Path,
    heard: list[Exception],
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who finds the damage moves all that belongs to it away; the others follow to the new one."""
    outbox, other = make(), make()
    with monkeypatch.context() as patch:
        patch.setattr(_outbox, "CHECKPOINT_TRANSACTIONS", 1)
        assert outbox.save("t", [owed("1", 1)])
        assert other.save("t", [owed("2", 2)])
    with open(base / ".eventlog" / DATABASE, "r+b") as file:
        file.write(b"rubbish" * 5000)
    # From its memory; what it changes makes the other one read.
    assert other.save("t", [owed("2", 3)])
    assert not outbox.save("t", [owed("1", 2)])
    assert [type(error) for error in heard] == [sqlite3.DatabaseError]
    aside = base / ".eventlog" / "damaged"
    assert aside.stat().st_mode & 0o777 == 0o700
    names = sorted(path.name.rpartition("-")[0] for path in aside.iterdir())
    assert names == [DATABASE, f"{DATABASE}-shm", f"{DATABASE}-wal"]
    clock.now += _outbox.RETRY_SECONDS
    assert outbox.save("t", [owed("1", 2)])
    assert other.save("t", [owed("2", 3)])
    assert (outbox.losses, other.losses) == (1, 1)
    assert stored(base) == {"1": 2, "2": 3}


def test_what_cannot_be_kept_aside_stays(
    make: Make, base: Path, heard: list[Exception], clock: SimpleNamespace
) -> None:
    """Without a place for damaged files there is no database, and delivery goes on without."""
    (base / ".eventlog").mkdir(parents=True)
    (base / ".eventlog" / "damaged").touch()
    (base / ".eventlog" / DATABASE).write_bytes(b"rubbish" * 1000)
    outbox = make()
    for _ in range(2):
        assert not outbox.save("t", [owed("1")])
        clock.now += _outbox.RETRY_SECONDS
    assert len(heard) == 2
    assert (base / ".eventlog" / DATABASE).read_bytes() == b"rubbish" * 1000


def test_a_database_that_was_emptied_is_lost(make: Make, base: Path) -> None:
    """A power cut may leave a file without bytes: its rows are looked for like a deleted one's."""
    leave_behind(base, owed("1"))
    (base / ".eventlog" / DATABASE).write_bytes(b"")
    assert make(lambda: [("1", "s", "x")]).adopt("t", ["t"]) == [owed("1")]


@pytest.mark.parametrize(
    "room",
    [
        0,
        4096,
    ],
)
def test_a_new_database_that_fails_at_first_is_new_still(
    make: Make, base: Path, clock: SimpleNamespace, room: int
) -> None:
    """Where the disk fills while a lost database is made anew, files are looked for later."""
    leave_behind(base, owed("1"))
    lose(base)
    outbox = make(lambda: [("1", "s", "x")])
    with full_disk(room):
        assert outbox.adopt("t", ["t"]) == []
    clock.now += _outbox.RETRY_SECONDS
    assert outbox.adopt("t", ["t"]) == [owed("1")]


def test_who_lives_is_alive_without_our_directory_too(make: Make, base: Path) -> None:
    """Where somebody removes `.eventlog` from a living process its files stay its own."""
    outbox, other = make(), make()
    outbox.save("t", [owed("1", 1)])
    for path in (base / ".eventlog").iterdir():
        path.unlink()
    (base / ".eventlog").rmdir()
    assert outbox.save("t", [owed("1", 1)])
    assert [name for name in open_files(base) if "owner" in name] == owner_files(base)
    assert other.adopt("t", ["t"]) == []


def test_who_lives_says_so_again(make: Make, base: Path) -> None:
    """Where somebody tidies away old files, the next look for the dead makes ours again."""
    outbox, other = make(), make()
    outbox.save("t", [owed("1", 1)])
    (base / ".eventlog" / f"{owner_of(base, '1')}.owner").unlink()
    outbox.adopt("t", ["t"])
    assert other.adopt("t", ["t"]) == []


def test_after_a_loss_files_of_an_earlier_gateway_are_found(make: Make, base: Path) -> None:
    """What a gateway of this process that has ended left is sent by the next one."""
    earlier = make()
    earlier.save("t", [owed("1", 1)])
    earlier.release("t", ["1"], keep=False)
    earlier.close()
    lose(base)
    outbox = make(lambda: [("1", "s", process_id())])
    assert outbox.adopt("t", ["t"]) == [owed("1")]


def test_a_scan_that_cannot_read_raises_nothing(
    make: Make, base: Path, heard: list[Exception]
) -> None:
    """The error handler hears of it, and there is nothing to adopt yet."""

    def scan() -> Iterable[tuple[str, str, str]]:
        raise OSError("the disk is gone")

    leave_behind(base, owed("1"))
    lose(base)
    assert make(scan).adopt("t", ["t"]) == []
    assert len(heard) == 1


# Failures


def fails_until(
    outbox: Outbox, heard: list[Exception], clock: SimpleNamespace
) -> Callable[[], None]:
    """Have an outbox fail; return what asserts that it works again, and not too early."""
    assert outbox.save("t", [owed("1", 1)]) is False
    assert outbox.failing
    assert outbox.register("2", "s", {"t": 0}) is None
    assert outbox.adopt("t", ["t"]) == []
    outbox.release("t", ["1"], keep=True)
    assert len(heard) == 1

    def works_again() -> None:
        clock.now += _outbox.RETRY_SECONDS - 0.01
        assert outbox.save("t", [owed("1", 2)]) is False
        assert len(heard) == 1
        clock.now += 0.01
        assert outbox.save("t", [owed("1", 3)]) is True
        assert not outbox.failing
        assert len(heard) == 1

    return works_again


def test_a_locked_database(
    make: Make,
    base: Path,
    heard: list[Exception],
    clock: SimpleNamespace,
    impatient: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While another process hangs in a transaction nothing raises; it is tried again later."""
    outbox = make()
    outbox.save("t", [owed("1", 0)])
    losses = outbox.losses
    with locked(base):
        works_again = fails_until(outbox, heard, clock)
        assert stored(base) == {"1": 0}
    works_again()
    assert stored(base) == {"1": 3}
    assert outbox.losses == losses + 1
    assert str(heard[0]) == "database is locked"
    assert capsys.readouterr().err.count("offsets cannot be saved now (OperationalError)") == 1


def test_a_full_disk(
    make: Make, base: Path, heard: list[Exception], clock: SimpleNamespace
) -> None:
    """Where no file can grow nothing raises, and what was saved before stays."""
    outbox = make()
    outbox.save("t", [owed("1", 0)])
    with full_disk():
        works_again = fails_until(outbox, heard, clock)
    assert open_files(base) == [f"{owner_of(base, '1')}.owner"]
    assert stored(base) == {"1": 0}
    works_again()
    assert stored(base) == {"1": 3}


def test_a_full_disk_at_the_beginning(
    make: Make, base: Path, heard: list[Exception], clock: SimpleNamespace
) -> None:
    """A database that could not be made at first is made later."""
    outbox = make()
    with full_disk():
        works_again = fails_until(outbox, heard, clock)
    works_again()
    assert stored(base) == {"1": 3}


@pytest.mark.parametrize("blocked", [".", ".eventlog", f".eventlog/{DATABASE}/x"])
def test_something_else_in_the_way(
    make: Make, base: Path, heard: list[Exception], clock: SimpleNamespace, blocked: str
) -> None:
    """Where a file stands for a directory, or the reverse, nothing raises until it is gone."""
    path = base / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    outbox = make()
    works_again = fails_until(outbox, heard, clock)
    path.unlink()
    if path.parent.name == DATABASE:
        path.parent.rmdir()
    works_again()
    assert stored(base) == {"1": 3}


def test_a_directory_that_cannot_be_written(base: Path, fork: Fork) -> None:
    """Without permission nothing raises, and the error handler hears why."""

    def save(test: Child) -> None:
        _give_up_privileges()
        heard: list[Exception] = []
        outbox = Outbox(base, 0o700, Report(lambda error, _: heard.append(error)), tuple)
        saved = outbox.save("t", [owed("1")])
        test.say([saved, outbox.failing, [type(error).__name__ for error in heard]])

    base.mkdir(mode=0o500)
    child = fork(save)
    assert child.hear() == [False, True, ["PermissionError"]]
    assert child.wait() == 0


def test_a_directory_that_cannot_be_entered(base: Path, fork: Fork) -> None:
    """Without permission to look for a database there is nothing to adopt, and nothing raises."""

    def adopt(test: Child) -> None:
        _give_up_privileges()
        outbox = Outbox(base, 0o700, Report(None), tuple)
        test.say(outbox.adopt("t", ["t"]))
        outbox.release("t", [], keep=False)
        test.say("released")

    (base / ".eventlog").mkdir(parents=True)
    os.chmod(base / ".eventlog", 0o000)
    child = fork(adopt)
    said = [child.hear(), child.hear()]
    os.chmod(base / ".eventlog", 0o700)
    assert said == [[], "released"]


def _give_up_privileges() -> None:
    """Become somebody for whom permissions count, in a child."""
    if os.getuid() == 0:
        os.setuid(65534)


def test_another_process_that_hangs_while_it_connects(
    make: Make, base: Path, heard: list[Exception], clock: SimpleNamespace, impatient: None
) -> None:
    """Who finds the mark of the database locked for long gives up for now."""
    leave_behind(base)
    outbox = make()
    with exclusive(base / ".eventlog" / MADE, 0.0):
        works_again = fails_until(outbox, heard, clock)
    works_again()
    assert isinstance(heard[0], BlockingIOError)


def test_what_fails_on_the_way_leaves_no_descriptor(
    make: Make, base: Path, clock: SimpleNamespace
) -> None:
    """A process that cannot connect for days does not run out of descriptors."""
    (base / ".eventlog").mkdir(parents=True)
    (base / ".eventlog" / "damaged").touch()
    (base / ".eventlog" / DATABASE).write_bytes(b"rubbish" * 1000)
    outbox = make()
    outbox.save("t", [owed("1")])
    before = open_files(base)
    for _ in range(5):
        clock.now += _outbox.RETRY_SECONDS
        outbox.save("t", [owed("1")])
    assert open_files(base) == before


# Permissions


def test_all_files_are_private(make: Make, base: Path) -> None:
    """Database, logs, mark and lock have mode 0600, our directory 0700, the base what is asked."""
    before = os.umask(0)
    try:
        make(directory_mode=0o750).save("t", [owed("1")])
    finally:
        os.umask(before)
    assert base.stat().st_mode & 0o777 == 0o750
    assert (base / ".eventlog").stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in (base / ".eventlog").iterdir()}
    assert set(modes.values()) == {0o600}
    assert modes.keys() > {DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", MADE}
    assert len(modes) == 5


@pytest.mark.parametrize("target", ["file", "database", "nothing"])
@pytest.mark.parametrize("name", [DATABASE, MADE])
def test_a_planted_link_is_not_followed(
    make: Make, base: Path, tmp_path: Path, heard: list[Exception], name: str, target: str
) -> None:
    """A link in place of a file of ours is a failure, and what it points to stays as it is."""
    precious = tmp_path / "precious"
    if target == "file":
        precious.write_bytes(b"precious")
    elif target == "database":
        with contextlib.closing(sqlite3.connect(precious)) as database:
            database.execute("CREATE TABLE theirs (x)")
    before = precious.read_bytes() if precious.exists() else None
    (base / ".eventlog").mkdir(parents=True)
    (base / ".eventlog" / name).symlink_to(precious)
    outbox = make()
    assert outbox.register("1", "s", {"t": 0}) is None
    assert outbox.adopt("t", ["t"]) == []
    assert len(heard) == 1
    assert "symbolic links" in str(heard[0])
    assert (precious.read_bytes() if precious.exists() else None) == before


# Checkpoints


def written_back(base: Path, tmp_path: Path) -> dict[str, int]:
    """Return the positions in the database file alone, without its log."""
    copy = tmp_path / "copy" / ".eventlog" / DATABASE
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes((base / ".eventlog" / DATABASE).read_bytes())
    try:
        return stored(tmp_path / "copy")
    except sqlite3.OperationalError:
        return {}


def test_the_log_is_written_back_now_and_then(
    make: Make, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `CHECKPOINT_TRANSACTIONS` of them the database file itself has all; not before."""
    monkeypatch.setattr(_outbox, "CHECKPOINT_TRANSACTIONS", 3)
    outbox = make()
    found = []
    for position in range(1, 7):
        outbox.save("t", [owed("1", position)])
        found.append(written_back(base, tmp_path).get("1"))
    assert found == [None, None, 3, 3, 3, 6]


def test_adopting_writes_the_log_back_too(
    make: Make, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During an outage, when only new files are registered, the log does not grow for ever."""
    monkeypatch.setattr(_outbox, "CHECKPOINT_TRANSACTIONS", 5)
    outbox = make()
    outbox.register("1", "s", {"t": 1})
    outbox.adopt("t", ["t"])
    outbox.register("2", "s", {"t": 2})
    assert written_back(base, tmp_path) == {}
    outbox.adopt("t", ["t"])
    assert written_back(base, tmp_path) == {"1": 1, "2": 2}


def test_nobody_who_saves_waits_for_the_disk(make: Make, base: Path, tmp_path: Path) -> None:
    """A commit syncs nothing, and a log of some megabytes is not written back by who made it so."""
    outbox = make()
    outbox.save("t", [owed("1", 1, "x" * 5_000_000)])
    assert written_back(base, tmp_path) == {}
    assert outbox._connected().execute("PRAGMA synchronous").fetchall() == [(0,)]


def test_a_checkpoint_that_fails_costs_nothing(
    make: Make,
    base: Path,
    tmp_path: Path,
    heard: list[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the disk is full the log stays as it is, nobody hears of it, and a later one works."""
    monkeypatch.setattr(_outbox, "CHECKPOINT_TRANSACTIONS", 1)
    outbox = make()
    outbox.register("1", "s", {"t": 1})
    with full_disk():
        assert outbox.adopt("t", ["t"]) == []
    assert heard == []
    assert written_back(base, tmp_path) == {}
    outbox.adopt("t", ["t"])
    assert written_back(base, tmp_path) == {"1": 1}


def test_a_checkpoint_waits_for_nobody(
    make: Make, base: Path, heard: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a reader that stays nor a writer that hangs costs a save anything."""
    monkeypatch.setattr(_outbox, "CHECKPOINT_TRANSACTIONS", 1)
    outbox = make()
    outbox.save("t", [owed("1", 1)])
    path = base / ".eventlog" / DATABASE
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM acked").fetchall()
        assert outbox.save("t", [owed("1", 2)])
        with locked(base):
            outbox._transactions = 1
            outbox._checkpoint()
    assert outbox.save("t", [owed("1", 3)])
    assert heard == []
    assert stored(base) == {"1": 3}


@contextlib.contextmanager
def slow_connections(
    monkeypatch: pytest.MonkeyPatch, of_checkpoints: bool
) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Have the next connection wait as soon as it is open.

    Args:
        monkeypatch: Undoes it.
        of_checkpoints: Whether that is one for a checkpoint, or one for transactions.
    """
    entered, go_on = threading.Event(), threading.Event()
    connect = sqlite3.connect

    def slow(path: Any, **options: Any) -> sqlite3.Connection:
        database = connect(path, **options)
        is_checkpoint = options.get("timeout") == 0
        if is_checkpoint == of_checkpoints and not entered.is_set():
            entered.set()
            assert go_on.wait(HUNG_SECONDS)
        return database

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", slow)
        yield entered, go_on


def test_others_save_during_a_checkpoint(
    make: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one thread writes the log back the others of its process go on saving."""
    monkeypatch.setattr(_outbox, "CHECKPOINT_TRANSACTIONS", 2)
    outbox = make()
    outbox.save("t", [owed("1", 1)])
    with (
        slow_connections(monkeypatch, of_checkpoints=True) as (entered, go_on),
        thread(lambda: outbox.save("t", [owed("1", 2)]), go_on),
    ):
        assert entered.wait(HUNG_SECONDS)
        assert outbox.save("t", [owed("1", 3)])
        assert not go_on.is_set()
    assert stored(base) == {"1": 3}


def test_a_checkpoint_makes_no_database(
    make: Make,
    base: Path,
    clock: SimpleNamespace,
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the database is lost when its log is due, the loss is noticed all the same."""
    outbox = make(lambda: [("dead", "s", "x")])
    monkeypatch.setattr(_outbox, "CHECKPOINT_TRANSACTIONS", 1)
    outbox.register("1", "s", {"t": 0})
    with locked(base):
        assert outbox.register("2", "s", {"t": 0}) is None
    lose(base)
    assert not outbox.save("t", [owed("1")])
    assert not (base / ".eventlog" / DATABASE).exists()
    clock.now += _outbox.RETRY_SECONDS
    assert outbox.adopt("t", ["t"]) == [owed("dead")]


# Forks


def test_parent_and_child_both_go_on(make: Make, base: Path, fork: Fork) -> None:
    """After a fork with an open connection each saves as an owner of its own; nothing is torn."""
    outbox = make()
    outbox.save("t", [owed("parent", 1)])

    def go_on(test: Child) -> None:
        test.say(outbox.save("t", [owed("child", 1)]))
        test.hear()
        test.say([outbox.save("t", [owed("child", 2)]), outbox.failing])
        test.hear()

    child = fork(go_on)
    assert outbox.save("t", [owed("parent", 2)])
    assert child.hear() is True
    assert outbox.save("t", [owed("parent", 3)])
    child.say("again")
    assert child.hear() == [True, False]
    assert stored(base) == {"parent": 3, "child": 2}
    assert owner_of(base, "parent") != owner_of(base, "child")
    assert query(base, "PRAGMA integrity_check") == [("ok",)]
    other = make()
    assert other.adopt("t", ["t"]) == []
    child.kill()
    assert other.adopt("t", ["t"]) == [owed("child", 2)]
    assert outbox.losses == 0


def test_what_a_parent_has_dies_with_it(make: Make, fork: Fork) -> None:
    """Its files can be adopted when it is killed, though its child lives on with its own."""

    def parent(test: Child) -> None:
        outbox = make()
        outbox.save("t", [owed("parent", 1)])

        def live_on(_: Child) -> None:
            outbox.save("t", [owed("child", 2)])
            test.say("child")
            test.hear()

        Child(live_on).wait()

    child, outbox = fork(parent), make()
    assert child.hear() == "child"
    assert outbox.adopt("t", ["t"]) == []
    child.kill()
    assert outbox.adopt("t", ["t"]) == [owed("parent", 1)]
    child.say("end")
    found, deadline = [], time.monotonic() + HUNG_SECONDS
    while not found and time.monotonic() < deadline:
        found = outbox.adopt("t", ["t"])
    assert found == [owed("child", 2)]


def test_a_fork_without_a_connection_costs_nothing(make: Make, base: Path, fork: Fork) -> None:
    """Where nothing was saved yet there is nothing to let go of, on either side."""
    outbox = make()

    def save(test: Child) -> None:
        test.say(outbox.save("t", [owed("child")]))

    assert fork(save).hear() is True
    assert outbox.save("t", [owed("parent")])
    assert stored(base) == {"child": 0, "parent": 0}


def test_a_fork_waits_for_a_transaction(
    make: Make, base: Path, fork: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ends soon is waited for, and the child can save."""
    outbox = make()
    gates: list[threading.Event] = []

    def before_fork() -> None:
        gates[0].set()
        Outbox.before_fork(outbox)

    monkeypatch.setattr(outbox, "before_fork", before_fork)

    def save(test: Child) -> None:
        test.say([outbox.failing, outbox.save("t", [owed("child")])])

    with stuck(outbox) as go_on:
        gates.append(go_on)
        child = fork(save)
    assert child.hear() == [False, True]
    assert stored(base) == {"stuck": 0, "child": 0}


def test_a_child_of_a_stuck_transaction_does_without(
    make: Make,
    base: Path,
    fork: Fork,
    heard: list[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It neither hangs nor touches the database but says that it fails; the parent goes on."""
    monkeypatch.setattr(_outbox, "FORK_SECONDS", 0.01)
    outbox = make()
    fork(lambda test: None).wait()
    outbox.save("t", [owed("1", 1)])

    def do_without(test: Child) -> None:
        test.say(outbox.failing)
        test.say(outbox.save("t", [owed("child")]))
        test.say([outbox.register("2", "s", {"t": 0}), outbox.adopt("t", ["t"])])
        outbox.release("t", [], keep=False)
        outbox.close()
        test.say([outbox.failing, len(heard)])

    with stuck(outbox):
        child = fork(do_without)
        assert [child.hear() for _ in range(4)] == [True, False, [None, []], [True, 0]]
        assert child.wait() == 0
    assert outbox.save("t", [owed("1", 2)])
    assert not outbox.failing
    assert stored(base) == {"1": 2, "stuck": 0}


def test_a_reset_outbox_is_another_owner(make: Make, base: Path) -> None:
    """What runs in a forked child lets go of the parent's lock and begins anew."""
    outbox, other = make(), make()
    outbox.save("t", [owed("1", 1)])
    first = owner_of(base, "1")
    outbox.before_fork()
    assert open_files(base) == [f"{first}.owner"]
    outbox._process = -1
    outbox.after_fork_in_child()
    assert open_files(base) == []
    assert outbox.save("t", [owed("2", 2)])
    assert other.adopt("t", ["t"]) == [owed("1", 1)]


def test_a_reset_outbox_leaves_a_stuck_connection_alone(
    make: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is neither used nor closed by the child, where its thread is not any more."""
    left: list[sqlite3.Connection] = []
    monkeypatch.setattr(_outbox, "_left_to_their_parents", left)
    monkeypatch.setattr(_outbox, "FORK_SECONDS", 0.01)
    outbox = make()
    outbox.save("t", [owed("1", 1)])
    with stuck(outbox):
        outbox.before_fork()
        outbox._process = -1
        outbox.after_fork_in_child()
        assert outbox.failing
        assert not outbox.save("t", [owed("2", 2)])
        assert left[0].in_transaction
    left[0].close()
    assert stored(base) == {"1": 1, "stuck": 0}


def test_a_fork_inside_a_transaction_takes_it_back(
    make: Make, base: Path, fork: Fork, heard: list[Exception], clock: SimpleNamespace
) -> None:
    """A signal handler or finalizer that forks costs that transaction and nothing else."""
    outbox = make()
    outbox.save("t", [owed("1", 1)])
    children = []

    def save(test: Child) -> None:
        test.say(outbox.save("t", [owed("child")]))

    def finished() -> Iterator[str]:
        children.append(fork(save))
        yield from ()

    assert not outbox.save("t", [owed("1", 2)], finished())
    assert len(heard) == 1
    assert children[0].hear() is True
    clock.now += _outbox.RETRY_SECONDS
    assert outbox.save("t", [owed("1", 3)])
    assert stored(base) == {"1": 3, "child": 0}


def test_a_reset_outbox_leaves_a_connection_that_is_being_made_alone(
    make: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that nobody has yet is as little the child's as one inside a transaction."""
    monkeypatch.setattr(_outbox, "FORK_SECONDS", 0.01)
    outbox = make()
    with (
        slow_connections(monkeypatch, of_checkpoints=False) as (entered, go_on),
        thread(lambda: outbox.save("t", [owed("1")]), go_on),
    ):
        assert entered.wait(HUNG_SECONDS)
        outbox.before_fork()
        outbox._process = -1
        outbox.after_fork_in_child()
        assert outbox.failing
        assert not outbox.save("t", [owed("2")])


def test_a_reset_without_a_fork_changes_nothing(make: Make, base: Path) -> None:
    """Whoever asks for it in the same process leaves connection, lock and name as they are."""
    outbox = make()
    outbox.save("t", [owed("1", 1)])
    owner, before = owner_of(base, "1"), open_files(base)
    outbox.after_fork_in_child()
    assert open_files(base) == before
    assert outbox.save("t", [owed("2", 2)])
    assert owner_of(base, "2") == owner


def test_a_fork_that_nobody_announces_costs_nothing_without_a_connection(
    make: Make, fork: Fork
) -> None:
    """Servers that fork in C call the child's hook only; where nothing is open that is enough."""
    outbox = make()
    _lifecycle._connected.clear()

    def save(test: Child) -> None:
        outbox.after_fork_in_child()
        test.say([outbox.failing, outbox.save("t", [owed("child")])])

    assert fork(save).hear() == [False, True]


def test_a_fork_that_nobody_announces_leaves_an_open_connection_alone(
    make: Make, base: Path, fork: Fork, heard: list[Exception]
) -> None:
    """Where the hook before was not called, the child does without; the parent goes on."""
    outbox = make()
    outbox.save("t", [owed("1", 1)])
    _lifecycle._connected.clear()

    def do_without(test: Child) -> None:
        outbox.after_fork_in_child()
        test.say([outbox.failing, outbox.save("t", [owed("child")]), len(heard)])

    assert fork(do_without).hear() == [True, False, 0]
    assert outbox.save("t", [owed("1", 2)])
    assert stored(base) == {"1": 2}


def saves_soon(outbox: Outbox) -> bool:
    """Return whether another thread can save."""
    saved: list[bool] = []
    other = threading.Thread(target=lambda: saved.append(outbox.save("t", ())), daemon=True)
    other.start()
    other.join(HUNG_SECONDS)
    return saved == [True]


def test_a_parent_goes_on_after_each_fork(
    make: Make, fork: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its other threads save and write the log back, and it can fork again."""
    monkeypatch.setattr(_outbox, "CHECKPOINT_TRANSACTIONS", 1)
    outbox = make()
    for _ in range(2):
        assert saves_soon(outbox)
        assert fork(lambda test: None).wait() == 0
    assert saves_soon(outbox)


def test_a_fork_during_a_slow_checkpoint_leaves_the_parent_working(
    make: Make, fork: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the log is written back for longer than a fork waits, nobody hangs afterwards."""
    monkeypatch.setattr(_outbox, "FORK_SECONDS", 0.01)
    monkeypatch.setattr(_outbox, "CHECKPOINT_TRANSACTIONS", 2)
    outbox = make()
    outbox.save("t", ())
    with (
        slow_connections(monkeypatch, of_checkpoints=True) as (entered, go_on),
        thread(lambda: outbox.save("t", ()), go_on),
    ):
        assert entered.wait(HUNG_SECONDS)
        fork(lambda test: None).wait()
    assert saves_soon(outbox)


def test_two_forks_at_once_leave_the_parent_working(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork that gives up waiting for another thread's does not keep that one from going on."""
    monkeypatch.setattr(_outbox, "FORK_SECONDS", 0.01)
    outbox = make()
    outbox.save("t", ())

    def fork_too() -> None:
        outbox.before_fork()
        outbox.after_fork_in_parent()

    outbox.before_fork()
    other = threading.Thread(target=fork_too)
    other.start()
    other.join(HUNG_SECONDS)
    outbox.after_fork_in_parent()
    assert saves_soon(outbox)


def test_a_child_of_a_stuck_connection_does_without(
    make: Make, base: Path, fork: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that was connecting leaves the child as one inside a transaction does: failing."""
    monkeypatch.setattr(_outbox, "FORK_SECONDS", 0.01)
    outbox = make()

    def do_without(test: Child) -> None:
        test.say(outbox.failing)

    with (
        slow_connections(monkeypatch, of_checkpoints=False) as (entered, go_on),
        thread(lambda: outbox.save("t", [owed("1")]), go_on),
    ):
        assert entered.wait(HUNG_SECONDS)
        assert fork(do_without).hear() is True


def test_a_child_of_a_slow_checkpoint_does_without(
    make: Make, base: Path, fork: Fork, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection that writes the log back counts too, where no other is open at that time."""
    monkeypatch.setattr(_outbox, "FORK_SECONDS", 0.01)
    monkeypatch.setattr(_outbox, "CHECKPOINT_TRANSACTIONS", 2)
    outbox = make()
    outbox.save("t", ())
    with (
        slow_connections(monkeypatch, of_checkpoints=True) as (entered, go_on),
        thread(lambda: outbox.save("t", ()), go_on),
    ):
        assert entered.wait(HUNG_SECONDS)
        with locked(base):
            assert not outbox.save("t", ())
        assert fork(lambda test: test.say(outbox.failing)).hear() is True


def test_a_child_of_a_stuck_connection_holds_nobody_up(
    make: Make, base: Path, fork: Fork, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the thread that was connecting is done, others connect, though the child lives on."""
    monkeypatch.setattr(_outbox, "FORK_SECONDS", 0.01)
    outbox, other = make(), make()

    def live_on(test: Child) -> None:
        test.say("ready")
        test.hear()

    with (
        slow_connections(monkeypatch, of_checkpoints=False) as (entered, go_on),
        thread(lambda: outbox.save("t", [owed("1")]), go_on),
    ):
        assert entered.wait(HUNG_SECONDS)
        assert fork(live_on).hear() == "ready"
    assert other.save("t", [owed("2")])


def test_a_grandchild_of_a_stuck_transaction_does_without_too(
    make: Make, fork: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy that must not be touched is in the child's children too."""
    monkeypatch.setattr(_outbox, "FORK_SECONDS", 0.01)
    outbox = make()
    outbox.save("t", ())

    def grandchild(test: Child) -> None:
        test.say(outbox.failing)

    def child(test: Child) -> None:
        test.say(Child(grandchild).hear())

    with stuck(outbox):
        assert fork(child).hear() is True


def test_no_outbox_of_a_child_touches_what_another_was_stuck_in(
    make: Make, fork: Fork, heard: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that the child makes of the same base shares the copied state, so it must not."""
    monkeypatch.setattr(_outbox, "FORK_SECONDS", 0.01)
    monkeypatch.setattr(_outbox, "BUSY_SECONDS", 0.01)
    outbox = make()
    outbox.save("t", ())

    def make_another(test: Child) -> None:
        test.say([make().save("t", [owed("child")]), len(heard)])

    with stuck(outbox):
        assert fork(make_another).hear() == [False, 0]


class Hung(NullTransport):
    """Takes nothing until the process ends."""

    name = "t"
    entered = threading.Event()

    async def send(self, event: Any, metadata: Any = None) -> bool:
        """Hang."""
        Hung.entered.set()
        threading.Event().wait(HUNG_SECONDS)
        return False


def test_what_a_forgotten_gateway_has_dies_with_its_process(
    make: Make, base: Path, fork: Fork
) -> None:
    """A child does not keep files from adoption that a gateway had which was garbage already."""

    async def log() -> None:
        gateway = EventSessionLogger(
            base,
            downstream_transport=Hung(),
            downstream_wait_seconds=0,
            file_naming_pattern="1",
            shutdown_timeout_seconds=2 * HUNG_SECONDS,
        )
        await gateway({"session_id": "s", "n": 1})

    def parent(test: Child) -> None:
        asyncio.run(log())
        gc.collect()
        assert Hung.entered.wait(HUNG_SECONDS)
        Child(lambda _: (test.say("child"), test.hear())).wait()

    child = fork(parent)
    assert child.hear() == "child"
    child.kill()
    found = make().adopt("t", ["t"])
    child.say("end")
    assert child.hear() is None
    assert paths(found) == ["s/1.jsonl"]


# Any order of things


class Gateways:
    """Three outboxes of one base, and what each of them has to have.

    Args:
        base: Theirs.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.outboxes = [self.begin() for _ in range(3)]
        self.numbers = itertools.count()
        self.files: dict[str, Owed] = {}
        self.sender: dict[str, int] = {}

    def begin(self) -> Outbox:
        """Return a new outbox."""
        return Outbox(self.base, 0o700, Report(None), tuple)

    def of(self, which: int) -> list[Owed]:
        """Return an outbox's files."""
        return [self.files[path] for path, sender in self.sender.items() if sender == which]

    def orphans(self, session: str | None = None) -> list[Owed]:
        """Return the files that nobody sends, oldest first."""
        found = [each for path, each in self.files.items() if path not in self.sender]
        return [each for each in found if session in (None, each.session)]

    def let_go(self, files: Iterable[Owed], finished: bool) -> None:
        """Leave files to nobody, or without need of anybody."""
        for each in files:
            del self.sender[each.path]
            if finished:
                del self.files[each.path]

    def register(self, which: int, session: str) -> None:
        """Have a file that is new."""
        path, expected = str(next(self.numbers)), self.orphans(session)
        assert self.outboxes[which].register(path, session, {"t": 0}) == {"t": expected}
        self.files[path] = Owed(path, session, 0)
        self.sender |= {each.path: which for each in (*expected, self.files[path])}

    def save(self, which: int, _: str) -> None:
        """Send a little of each file."""
        moved = [each._replace(position=each.position + 1) for each in self.of(which)]
        assert self.outboxes[which].save("t", moved)
        self.files |= {each.path: each for each in moved}

    def finish(self, which: int, _: str) -> None:
        """Send all of the oldest file."""
        gone = self.of(which)[:1]
        assert self.outboxes[which].save("t", (), paths(gone))
        self.let_go(gone, finished=True)

    def adopt(self, which: int, _: str) -> None:
        """Take what nobody sends."""
        expected = self.orphans()
        assert self.outboxes[which].adopt("t", ["t"]) == expected
        self.sender |= {each.path: which for each in expected}

    def release(self, which: int, _: str) -> None:
        """End a transport that has sent all of the oldest file and a part of the others."""
        first, rest = self.of(which)[:1], self.of(which)[1:]
        self.outboxes[which].release("t", paths(rest), keep=False)
        self.let_go(first, finished=True)
        self.let_go(rest, finished=False)

    def close(self, which: int, _: str) -> None:
        """End in order."""
        self.outboxes[which].close()
        self.die(which, _)

    def die(self, which: int, _: str) -> None:
        """End without a word."""
        self.outboxes[which] = self.begin()
        self.let_go(self.of(which), finished=False)


STEPS = ["register", "register", "save", "finish", "adopt", "release", "close", "die"]
THINGS = st.tuples(st.sampled_from(STEPS), st.integers(0, 2), st.sampled_from(["a", "\ud800"]))


@settings(max_examples=40, deadline=None)
@given(things=st.lists(THINGS, max_size=30))
def test_every_file_has_one_sender_or_waits_for_one(
    tmp_path_factory: pytest.TempPathFactory, things: list[tuple[str, int, str]]
) -> None:
    """Whatever three gateways do, in whichever order, and however they end."""
    gateways = Gateways(tmp_path_factory.mktemp("base"))
    for step, which, session in things:
        getattr(gateways, step)(which, session)
        if (gateways.base / ".eventlog").exists():
            expected = {path: each.position for path, each in gateways.files.items()}
            assert list(stored(gateways.base).items()) == list(expected.items())
    for which in range(3):
        gateways.close(which, "")
    gateways.adopt(0, "")
    gateways.close(0, "")
