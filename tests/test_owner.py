"""Who is alive: locks that real processes hold, and that end with them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eventlog_handler import _owner
from eventlog_handler._owner import come_alive, exclusive, lives, owners, remove

HUNG_SECONDS = 30.0
"""How long a test waits for what should take milliseconds."""


class Child:
    """A forked process that runs a function and exchanges messages with the one that forked it.

    Args:
        body: Called in the child, with the child's end of the exchange.
    """

    def __init__(self, body: Callable[[Child], object]) -> None:
        hears, they_say = os.pipe()
        they_hear, says = os.pipe()
        with warnings.catch_warnings():
            # From 3.12 on forking beside threads is warned of: it is what some tests are about.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        theirs = (they_hear, they_say)
        ours = (hears, says)
        self._hears, self._says = ours if self.pid else theirs
        for fd in theirs if self.pid else ours:
            os.close(fd)
        self._rest = b""
        self._exit_code: int | None = None
        if not self.pid:
            code = 1
            try:
                body(self)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def say(self, what: Any) -> None:
        """Send the other side something that JSON can express."""
        os.write(self._says, json.dumps(what).encode() + b"\n")

    def hear(self) -> Any:
        """Return what the other side says next, or None if it has ended; waits 30 seconds."""
        while b"\n" not in self._rest:
            assert select.select([self._hears], [], [], HUNG_SECONDS)[0], "waited for 30 seconds"
            data = os.read(self._hears, 65536)
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def wait(self) -> int:
        """Wait for the child's end; return its exit code, of one that hangs that of SIGKILL."""
        deadline = time.monotonic() + HUNG_SECONDS
        while self._exit_code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._exit_code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.001)
        return self._exit_code

    def kill(self) -> None:
        """Have the child end without any further step, unless it has ended.

        Children of its own may still be heard.
        """
        if self._exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def end(self) -> None:
        """Leave nothing of it."""
        self.kill()
        os.close(self._hears)
        os.close(self._says)


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[Child], object]], Child]]:
    """Make children, of which none is left when the test ends."""
    made: list[Child] = []

    def make(body: Callable[[Child], object]) -> Child:
        made.append(Child(body))
        return made[-1]

    yield make
    for child in made:
        child.end()


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def alive(directory: Path, owner: str) -> Iterator[None]:
    """Be an owner for a while; its file stays."""
    fd = come_alive(directory, owner)
    try:
        yield
    finally:
        os.close(fd)


# Owners


def test_an_owner_is_a_private_file(tmp_path: Path) -> None:
    """Who comes alive has a file of mode 0600 and leaves nothing else."""
    before = os.umask(0)
    try:
        with alive(tmp_path, "a-1"):
            assert [path.name for path in tmp_path.iterdir()] == ["a-1.owner"]
            assert (tmp_path / "a-1.owner").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_an_owner_lives_while_its_descriptor_is_open(tmp_path: Path) -> None:
    """Closing the descriptor is the end of it, though its file stays."""
    with alive(tmp_path, "a-1"):
        assert lives(tmp_path, "a-1")
    assert not lives(tmp_path, "a-1")
    assert (tmp_path / "a-1.owner").exists()


def test_asking_costs_no_descriptor(tmp_path: Path) -> None:
    """Whatever the answer is, nothing stays open."""
    with alive(tmp_path, "a-1"):
        before = descriptors()
        lives(tmp_path, "a-1")
        assert descriptors() == before
    lives(tmp_path, "a-1")
    lives(tmp_path, "nobody")
    assert descriptors() == before - 1


def test_an_owner_without_a_file_is_dead(tmp_path: Path) -> None:
    """So is one whose directory is gone, or has become a file."""
    (tmp_path / "file").touch()
    assert not lives(tmp_path, "a-1")
    assert not lives(tmp_path / "missing", "a-1")
    assert not lives(tmp_path / "file", "a-1")


def test_those_who_ask_are_not_taken_for_the_owner(tmp_path: Path) -> None:
    """A dead owner stays dead while somebody else is asking the same."""
    with alive(tmp_path, "a-1"):
        pass
    with open(tmp_path / "a-1.owner") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert not lives(tmp_path, "a-1")


def test_a_killed_process_is_dead(
    tmp_path: Path, fork: Callable[[Callable[[Child], object]], Child]
) -> None:
    """An owner in another process is alive, and dead as soon as that one is killed."""

    def live(test: Child) -> None:
        come_alive(tmp_path, "theirs")
        test.say("alive")
        test.hear()

    child = fork(live)
    assert child.hear() == "alive"
    assert lives(tmp_path, "theirs")
    child.kill()
    assert not lives(tmp_path, "theirs")


def test_a_child_that_lets_go_does_not_end_its_parent(
    tmp_path: Path, fork: Callable[[Callable[[Child], object]], Child]
) -> None:
    """Closing the descriptor that came along with a fork leaves the owner alive."""
    fd = come_alive(tmp_path, "a-1")
    assert fork(lambda test: os.close(fd)).wait() == 0
    assert lives(tmp_path, "a-1")
    os.close(fd)


def test_a_program_that_is_started_does_not_keep_an_owner_alive(tmp_path: Path) -> None:
    """The descriptor is closed where another program takes over."""
    with alive(tmp_path, "a-1"):
        fd = next(
            int(each)
            for each in os.listdir("/proc/self/fd")
            if os.path.realpath(f"/proc/self/fd/{each}").endswith("a-1.owner")
        )
        assert not os.get_inheritable(fd)


def test_a_name_is_given_once(tmp_path: Path) -> None:
    """Who finds its own name in the making leaves that alone and says so."""
    (tmp_path / "a-1.making").write_text("another's")
    with pytest.raises(FileExistsError):
        come_alive(tmp_path, "a-1")
    assert (tmp_path / "a-1.making").read_text() == "another's"


@pytest.mark.parametrize("fails", ["fcntl.flock", "pathlib.Path.rename"])
def test_who_cannot_come_alive_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """Without a lock, or a name, there is an error and neither a file nor a descriptor."""

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(fails, refuse)
        with pytest.raises(OSError, match="No locks"):
            come_alive(tmp_path, "a-1")
    assert list(tmp_path.iterdir()) == []
    assert descriptors() == before


@pytest.mark.parametrize("suffix", ["making", "owner"])
def test_a_planted_link_is_not_followed(tmp_path: Path, suffix: str) -> None:
    """Where a link lies in the way it is refused or replaced; what it points to stays as it is."""
    target, own = tmp_path / "target", tmp_path / "own"
    target.write_text("precious")
    own.mkdir()
    (own / f"a-1.{suffix}").symlink_to(target)
    with contextlib.suppress(FileExistsError), alive(own, "a-1"):
        assert not (own / "a-1.owner").is_symlink()
        assert lives(own, "a-1")
    assert target.read_text() == "precious"


def test_a_link_is_no_owner(tmp_path: Path) -> None:
    """A link in an owner's place is a dead one's, even if what it points to is locked."""
    target = tmp_path / "target"
    (tmp_path / "a-1.owner").symlink_to(target)
    with open(target, "w") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        assert not lives(tmp_path, "a-1")


def test_all_owners_are_listed(tmp_path: Path) -> None:
    """Dead ones too, and nothing else that lies there."""
    for name in ("0-1-2.ring", "delivery.sqlite3", "b-1.making"):
        (tmp_path / name).touch()
    with alive(tmp_path, "b-2"), alive(tmp_path, "a-1"):
        pass
    with alive(tmp_path, "c-3"):
        assert sorted(owners(tmp_path)) == ["a-1", "b-2", "c-3"]
    assert owners(tmp_path / "missing") == []


def test_the_file_of_an_owner_goes(tmp_path: Path) -> None:
    """It can be removed once; what is not there or cannot be removed is no error."""
    with alive(tmp_path, "a-1"):
        pass
    (tmp_path / "b-2.owner").mkdir()
    for owner in ("a-1", "a-1", "b-2"):
        remove(tmp_path, owner)
    assert [path.name for path in tmp_path.iterdir()] == ["b-2.owner"]


# Exclusive


def test_exclusive_makes_a_private_file(tmp_path: Path) -> None:
    """The file is made with mode 0600, and its descriptor is for reading and writing."""
    before = os.umask(0)
    try:
        with exclusive(tmp_path / "mark", 0.0) as fd:
            os.write(fd, b"1")
            assert os.pread(fd, 10, 0) == b"1"
        assert (tmp_path / "mark").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_exclusive_lets_go_after_an_error(tmp_path: Path) -> None:
    """What happens inside comes through, and the next one finds it free."""
    with pytest.raises(ZeroDivisionError), exclusive(tmp_path / "mark", 0.0):
        raise ZeroDivisionError
    before = descriptors()
    with exclusive(tmp_path / "mark", 0.0):
        assert descriptors() == before + 1
    assert descriptors() == before


def test_exclusive_waits_for_another_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are never inside at once: the second one enters when the first has left."""
    waiting, order = threading.Event(), []

    def sleep(seconds: float) -> None:
        waiting.set()
        time.sleep(seconds)

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(_owner, "time", clock)

    def enter() -> None:
        with exclusive(tmp_path / "mark", HUNG_SECONDS):
            order.append("second")

    with exclusive(tmp_path / "mark", 0.0):
        thread = threading.Thread(target=enter)
        thread.start()
        assert waiting.wait(HUNG_SECONDS)
        order.append("first")
    thread.join(HUNG_SECONDS)
    assert order == ["first", "second"]


def test_exclusive_gives_up_after_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who cannot get in within the time given gets an error, and keeps no descriptor."""
    clock = SimpleNamespace(now=100.0)

    def sleep(seconds: float) -> None:
        clock.now += seconds

    clock.monotonic, clock.sleep = (lambda: clock.now), sleep
    monkeypatch.setattr(_owner, "time", clock)
    with exclusive(tmp_path / "mark", 0.0):
        before = descriptors()
        with pytest.raises(BlockingIOError), exclusive(tmp_path / "mark", 5.0):
            pytest.fail("two are inside")
        assert descriptors() == before
    assert 105.0 < clock.now < 105.1


def test_exclusive_is_free_when_its_holder_is_killed(
    tmp_path: Path, fork: Callable[[Callable[[Child], object]], Child]
) -> None:
    """Another process keeps it as long as it lives, however it ends."""

    def hold(test: Child) -> None:
        with exclusive(tmp_path / "mark", 0.0):
            test.say("held")
            test.hear()

    child = fork(hold)
    assert child.hear() == "held"
    with pytest.raises(BlockingIOError), exclusive(tmp_path / "mark", 0.0):
        pytest.fail("two are inside")
    child.kill()
    with exclusive(tmp_path / "mark", 0.0):
        pass


def test_exclusive_without_locks_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that has no locks is an error each time, and nothing else."""

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", refuse)
        with pytest.raises(OSError, match="No locks"), exclusive(tmp_path / "mark", 0.0):
            pytest.fail("it cannot be locked")
    assert descriptors() == before


def test_exclusive_is_free_though_a_child_has_a_copy(
    tmp_path: Path, fork: Callable[[Callable[[Child], object]], Child]
) -> None:
    """Who leaves leaves for good, though another process was forked while it was inside."""
    with exclusive(tmp_path / "mark", 0.0):
        fork(lambda test: test.hear())
    with exclusive(tmp_path / "mark", 0.0):
        pass


def test_an_owner_that_cannot_be_asked_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a descriptor to ask with, what is somebody's stays that one's."""

    def refuse(*args: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert lives(tmp_path, "a-1")


def test_exclusive_follows_no_link(tmp_path: Path) -> None:
    """A link in the file's place is an error, and nothing is made where it points to."""
    (tmp_path / "mark").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"), exclusive(tmp_path / "mark", 0.0):
        pytest.fail("it was followed")
    assert not (tmp_path / "target").exists()
    with pytest.raises(FileNotFoundError), exclusive(tmp_path / "missing" / "mark", 0.0):
        pytest.fail("there is no such directory")
