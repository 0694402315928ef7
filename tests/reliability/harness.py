"""Children that log until they are killed, processes that recover what they left, and the count.

A child is this file's own text, given to `python -c`: so it imports whatever package is installed,
and nothing of the tests. It notes each number whose call has returned in a mapped file, one byte a
number, which is there after `kill -9` as the package's own ring is.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import logging
import mmap
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import orjson

ROOM = 4 * 1024 * 1024
"""Numbers that one thread may log in one run."""
OUTCOME_BYTES = 65536
NESTED_SIGNALS = 3
# Looked up once: an exception out of nowhere in `getLogger` would leave the lock of `logging` held.
APP = logging.getLogger("app")
"""How deep signals interrupt the handlers of those before them."""
TIMER_SECONDS = 0.0005
HANG_SECONDS = 60.0
"""Far beyond anything that is right: it stops what hangs, and measures nothing."""


# --- In the child ---------------------------------------------------------------------------------


class Notes:
    """Which numbers of which thread were acknowledged: their call has returned.

    Args:
        path: The mapped file; made where it is missing.
        slots: Threads, or forked children, that write it.
        room: Numbers each.
    """

    def __init__(self, path: Path, slots: int, room: int = ROOM) -> None:
        self.room = room
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, slots * room)
        self._map = mmap.mmap(fd, slots * room)
        os.close(fd)

    def add(self, slot: int, number: int) -> None:
        """Note that the call for `number` has returned."""
        self._map[slot * self.room + number] = 1

    def write(self, text: str) -> None:
        """Put a text in the place of the numbers."""
        data = text.encode()[: self.room]
        self._map[: len(data)] = data

    def text(self) -> str:
        """Return the text."""
        return self._map[:].rstrip(b"\0").decode()

    def numbers(self, slot: int) -> set[int]:
        """Return what was noted."""
        part = self._map[slot * self.room : (slot + 1) * self.room]
        return {number for number, noted in enumerate(part.rstrip(b"\0")) if noted}


def new_handler(spec: dict[str, Any]) -> Any:
    """Return a handler as a specification wants it, on the logger `app`."""
    from eventlog_handler import EventLogHandler

    options = {"shutdown_timeout_seconds": 30.0, "block_timeout_seconds": 30.0}
    handler = EventLogHandler(log_base_dir=spec["base"], **{**options, **spec.get("options", {})})
    log = logging.getLogger("app")
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.handlers[:] = [handler]
    return handler


def say(**answer: Any) -> None:
    """Answer the test that started this process."""
    os.write(1, json.dumps(answer).encode() + b"\n")


def emit(who: str, slot: int, number: int, session: str, **fields: Any) -> None:
    """Log one numbered event."""
    extra = {"session_id": session, "who": who, "slot": slot, "n": number, **fields}
    APP.info("%d", number, extra=extra)


def log_until_killed(spec: dict[str, Any]) -> None:
    """Log in `threads` threads, each to a session of its own and to one that all share."""
    notes = Notes(spec["notes"], spec["threads"])
    say(ready=True)
    if spec.get("gate"):
        sys.stdin.buffer.read(1)
    handler = new_handler(spec)

    def work(slot: int) -> None:
        pause = spec["threads"] / spec["rate"] if spec.get("rate") else 0.0
        for number in range(1, spec.get("count", ROOM)):
            session = "shared" if number % 4 == 0 else f"s{slot}"
            emit(spec["who"], slot, number, session)
            notes.add(slot, number)
            if pause:
                time.sleep(pause)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(spec["threads"])]
    if spec.get("compute"):
        threading.Thread(target=compute, daemon=True).start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handler.flush()
    tell_stats(handler)


class FarSide:
    """A transport whose far side is a file, which outlives every process.

    Args:
        path: The file; a line an event that arrived.
        loses: How likely an answer is lost, after the event has arrived.
        down: Whether nothing arrives at all.
    """

    is_connected = True

    def __init__(self, path: Path, loses: float, down: bool) -> None:
        self.name = path.stem
        self._loses = loses
        self._down = down
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        # A kill may cut a write between two pages: what is not whole has not arrived.
        os.ftruncate(self._fd, path.read_bytes().rfind(b"\n") + 1)

    def arrive(self, data: bytes) -> None:
        """Have it there; perhaps nobody hears of it."""
        if self._down:
            raise ConnectionError("down")
        os.write(self._fd, data)
        if random.random() < self._loses:
            raise TimeoutError("the answer was lost")

    async def send(self, event: bytes, metadata: object = None) -> bool:
        """Take one event."""
        self.arrive(event + b"\n")
        return True

    async def close(self) -> None:
        """Stay open: a late event may come."""

    async def health_check(self) -> bool:
        """Return whether something would arrive."""
        return not self._down


class FarSideOfBatches(FarSide):
    """The same for batches."""

    async def send_batch(self, batch: list[Any]) -> bool:
        """Take all of a batch."""
        self.arrive(b"".join(event.line + b"\n" for event in batch))
        return True


def far_sides(spec: dict[str, Any]) -> list[FarSide]:
    """Return two transports, one that takes single events and one that takes batches."""
    folder, how = Path(spec["far"]), (spec.get("loses", 0.0), spec.get("down", False))
    return [
        FarSide(folder / "single.lines", *how),
        FarSideOfBatches(folder / "batch.lines", *how),
    ]


def deliver_until_killed(spec: dict[str, Any]) -> None:
    """Log, and deliver what was logged."""
    quick = {"retry_delay_seconds": 0.01, "breaker_reset_seconds": 0.05}
    spec["options"] = {**quick, "downstream_transport": far_sides(spec)}
    log_until_killed(spec)


def deliver_the_rest(spec: dict[str, Any]) -> None:
    """Do as the next process does, until the test has seen enough."""
    quick = {"retry_delay_seconds": 0.01, "breaker_reset_seconds": 0.05}
    spec["options"] = {**quick, "downstream_transport": far_sides(spec)}
    handler = new_handler(spec)
    say(ready=True)
    sys.stdin.buffer.read(1)
    tell_stats(handler)
    handler.close()


def compute() -> None:
    """Hold the interpreter's lock as long as it lets one."""
    value = 1
    while True:
        value = value * 31 % 1_000_003


def leave_a_full_ring(spec: dict[str, Any]) -> None:
    """Log while the listener hangs in a user's formatter, then die: all of it is in the ring."""
    notes = Notes(spec["notes"], 1)

    def hang(_: Any) -> NoReturn:
        while True:
            time.sleep(HANG_SECONDS)

    new_handler({**spec, "options": {"log_format": "custom", "formatter": hang}})
    for number in range(1, spec["count"] + 1):
        emit(spec["who"], 0, number, f"s{number % 4}")
        notes.add(0, number)
    os.kill(os.getpid(), signal.SIGKILL)


def recover_here(spec: dict[str, Any]) -> None:
    """Do what every next process does: make a handler, whose start recovers; flush."""
    say(ready=True)
    handler = new_handler(spec)
    flushed = bool(handler.flush(timeout=HANG_SECONDS))
    tell_stats(handler, flushed=flushed)


def tell_stats(handler: Any, **more: Any) -> None:
    """Tell what the handler counted."""
    stats = handler.stats()
    counted = {"dropped": stats.dropped, "local_errors": stats.local_errors}
    say(**counted, written=stats.written, durability=stats.durability, **more)


def fork_often(spec: dict[str, Any]) -> None:
    """Fork beside logging threads; each child logs, and ends in one of three ways."""
    break_at_fork(spec)
    threads, forks = spec["threads"], spec["forks"]
    notes = Notes(spec["notes"], threads + forks, spec["room"])
    handler = new_handler(spec)
    stop = threading.Event()

    def work(slot: int) -> None:
        for number in itertools.takewhile(lambda _: not stop.is_set(), range(1, spec["room"])):
            emit("parent", slot, number, f"s{slot}")
            notes.add(slot, number)

    workers = [threading.Thread(target=work, args=(slot,)) for slot in range(threads)]
    for worker in workers:
        worker.start()
    hung, longest = 0, 0.0
    for slot in range(threads, threads + forks):
        pid = os.fork()
        if pid == 0:
            end_as_forked(spec, slot, notes, handler)
        seconds = wait_for(pid, spec["patience"])
        hung += seconds is None
        longest = max(longest, spec["patience"] if seconds is None else seconds)
    stop.set()
    for worker in workers:
        worker.join()
    handler.flush()
    tell_stats(handler, hung=hung, longest=longest)


def end_as_forked(spec: dict[str, Any], slot: int, notes: Notes, handler: Any) -> NoReturn:
    """Log in a forked child, then end: for the next process to recover, after a flush, by exit."""
    for number in range(1, spec["each"] + 1):
        emit("child", slot, number, "forked")
        notes.add(slot, number)
    if slot % 3 == 2:
        sys.exit(0)
    if slot % 3 == 1:
        handler.flush()
    os._exit(0)


def break_at_fork(spec: dict[str, Any]) -> None:
    """Take the reset after a fork out, where the test asks for the broken variant."""
    if spec.get("no_at_fork_reset"):
        from eventlog_handler._journal import JournalHandoff
        from eventlog_handler._listener import Listener

        Listener.after_fork_in_child = lambda self: None  # type: ignore[method-assign]
        JournalHandoff.abandon = lambda self: None  # type: ignore[method-assign]


def wait_for(pid: int, patience_seconds: float) -> float | None:
    """Wait for a child; return how long, or None and kill it when patience ends."""
    started = time.monotonic()
    while time.monotonic() - started < patience_seconds:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return time.monotonic() - started
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def serve_preforked(spec: dict[str, Any]) -> None:
    """A server that loads its application, then forks workers, and new ones for those that end."""
    workers, each = spec["workers"], spec["each"]
    notes = Notes(spec["notes"], workers + 1, spec["room"])
    handler = new_handler(spec)
    for number in range(1, each + 1):
        emit("master", 0, number, "master")
        notes.add(0, number)
    running: dict[int, int] = {}
    hung = 0
    for slot in range(1, workers + 1):
        pid = os.fork()
        if pid == 0:
            for number in range(1, each + 1):
                emit("worker", slot, number, f"request-{number % 5}")
                notes.add(slot, number)
            if slot % 2:
                os._exit(0)
            sys.exit(0)
        running[pid] = slot
        if len(running) == 4:
            hung += sum(wait_for(each_pid, spec["patience"]) is None for each_pid in running)
            running.clear()
        emit("master", 0, each + slot, "master")
        notes.add(0, each + slot)
    hung += sum(wait_for(each_pid, spec["patience"]) is None for each_pid in running)
    handler.flush()
    tell_stats(handler, hung=hung)


class Interrupted(BaseException):
    """What is thrown into a thread that logs."""


class Talkative:
    """Logs when it is turned into text, and when it is collected."""

    def __init__(self, speak: Callable[[int], object]) -> None:
        self.speak = speak
        self.itself = self

    def __str__(self) -> str:
        self.speak(4)
        return "talkative"

    __repr__ = __str__

    def __del__(self) -> None:
        self.speak(5)


class Turmoil:
    """Threads that log, and what interrupts them.

    Slots: 0 main, 1 interrupted thread, 2 plain thread, 3 signal, 4 conversion, 5 finalizer.

    Args:
        notes: Where calls that have returned are noted.
        seconds: How long.
    """

    def __init__(self, notes: Notes, seconds: float) -> None:
        self.notes = notes
        self.ends = time.monotonic() + seconds
        self.numbers = [itertools.count(1) for _ in range(6)]
        self.stop = threading.Event()
        self.caught = self.interrupts = 0
        self.armed: list[bool] = []
        self.nested: list[bool] = []

    def speak(self, slot: int, payload: object = None) -> None:
        """Log the next number of a slot."""
        number = next(self.numbers[slot])
        fields = {} if payload is None else {"payload": payload}
        emit("r", slot, number, f"s{slot % 2}", **fields)
        self.notes.add(slot, number)

    def speak_plainly(self) -> None:
        """Log objects that log when they are converted, and collected."""
        while not self.stop.is_set():
            self.speak(2, Talkative(self.speak))
            time.sleep(0.0005)

    def speak_and_catch(self) -> None:
        """Log, and log on after what is thrown at any place."""
        while not self.stop.is_set():
            # Twice, as the next may come in the handling of the one before it.
            with contextlib.suppress(Interrupted):
                self._catch()

    def _catch(self) -> None:
        while not self.stop.is_set():
            try:
                while not self.stop.is_set():
                    self.speak(1)
            except Interrupted:
                self.caught += 1

    def throw_at(self, target: threading.Thread) -> None:
        """Throw exceptions into a thread, and Ctrl-C into the main one."""
        while not self.stop.is_set():
            before = self.caught
            identity = ctypes.c_ulong(target.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(Interrupted))
            # A finalizer that is hit swallows it: then another is thrown.
            patience = time.monotonic() + 0.1
            while self.caught == before and time.monotonic() < patience:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.002)

    def on_interrupt(self, *_: object) -> None:
        """Raise, but only where it is caught: in the test's own clockwork it would show nothing."""
        if self.armed.pop() if self.armed else False:
            raise KeyboardInterrupt

    def on_timer(self, *_: object) -> None:
        """Log; the next signal may interrupt this handler, and its own handler in turn.

        Without an end to that, beside threads that hold the interpreter, the stack overflows.
        """
        if self.stop.is_set():
            return
        self.nested.append(True)
        if len(self.nested) < NESTED_SIGNALS:
            signal.setitimer(signal.ITIMER_REAL, TIMER_SECONDS)
        try:
            self.speak(3)
        finally:
            self.nested.pop()
            # Only the outermost begins anew: else none of them might ever come to its end.
            if not self.nested and not self.stop.is_set():
                signal.setitimer(signal.ITIMER_REAL, TIMER_SECONDS)

    def run(self) -> None:
        """Let it all loose until the time is up."""
        victim = threading.Thread(target=self.speak_and_catch)
        plain = threading.Thread(target=self.speak_plainly)
        thrower = threading.Thread(target=self.throw_at, args=(victim,))
        signal.signal(signal.SIGINT, self.on_interrupt)
        signal.signal(signal.SIGALRM, self.on_timer)
        signal.setitimer(signal.ITIMER_REAL, TIMER_SECONDS)
        for thread in (victim, plain, thrower):
            thread.start()
        while time.monotonic() < self.ends:
            try:
                while time.monotonic() < self.ends:
                    self.armed[:] = [True]
                    self.speak(0, Talkative(self.speak))
                    time.sleep(0)
                self.armed.clear()
            except KeyboardInterrupt:
                self.interrupts += 1
        self.stop.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for thread in (victim, plain, thrower):
            thread.join()


def interrupt_often(spec: dict[str, Any]) -> None:
    """Log from a timer's signals, finalizers and conversions, beside exceptions out of nowhere."""
    handler = new_handler(spec)
    gc.set_threshold(200)
    turmoil = Turmoil(Notes(spec["notes"], 6), spec["seconds"])
    turmoil.run()
    told = {"caught": turmoil.caught, "interrupts": turmoil.interrupts}
    if spec.get("kill"):
        say(**told)
        os.kill(os.getpid(), signal.SIGKILL)
    gc.collect()
    flushed = bool(handler.flush(timeout=HANG_SECONDS))
    tell_stats(handler, flushed=flushed, **told)


def nest_calls(spec: dict[str, Any]) -> None:
    """Log from within the hand-off of another call, and from within that one's, and so on."""
    from eventlog_handler._ring import Ring

    notes = Notes(spec["notes"], spec["deep"] + 1)
    handler = new_handler(spec)
    append = Ring.append
    inside: list[bool] = []
    numbers = [itertools.count(1) for _ in range(spec["deep"] + 1)]

    def speak() -> None:
        slot = len(inside)
        number = next(numbers[slot])
        emit("nested", slot, number, f"s{slot}")
        notes.add(slot, number)

    def interrupted(self: Ring, payload: bytes) -> Any:
        if len(inside) < spec["deep"]:
            inside.append(True)
            try:
                speak()
            finally:
                inside.pop()
        return append(self, payload)

    Ring.append = interrupted  # type: ignore[method-assign]
    for _ in range(20):
        speak()
    handler.flush()
    tell_stats(handler)


def fill_and_free(spec: dict[str, Any]) -> None:
    """Log to a disk that gets full and is freed, over and over."""
    notes = Notes(spec["notes"], 1)
    handler = new_handler(spec)
    numbers = itertools.count(1)
    longest = 0.0

    def log(count: int) -> None:
        nonlocal longest
        for number in itertools.islice(numbers, count):
            started = time.monotonic()
            emit("full", 0, number, f"s{number % 3}", filler="x" * 700)
            longest = max(longest, time.monotonic() - started)
            notes.add(0, number)

    for _ in range(spec["cycles"]):
        log(20)
        handler.flush()
        filler = fill(Path(spec["base"]).parent)
        before = handler.stats().local_errors
        log(60)
        wait_until(lambda before=before: handler.stats().local_errors > before)
        if spec.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        filler.unlink()
        if not handler.flush(timeout=HANG_SECONDS):
            raise TimeoutError("not flushed after the disk was freed")
    tell_stats(handler, longest=longest)


def fill(folder: Path) -> Path:
    """Take all the room there is, to the last byte; return what takes it."""
    path = folder / "filler"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for size in (1024 * 1024, 4096, 1):
        with contextlib.suppress(OSError):
            while True:
                os.write(fd, b"x" * size)
    os.close(fd)
    return path


def wait_until(reached: Callable[[], bool]) -> None:
    """Poll what another thread or process will make true."""
    ends = time.monotonic() + HANG_SECONDS
    while not reached():
        if time.monotonic() > ends:
            raise TimeoutError("waited in vain")
        time.sleep(0.002)


def cut_writes_short(spec: dict[str, Any]) -> None:
    """Have the kernel cut writes after each number of bytes, with a limit on the file's size."""
    notes = Notes(spec["notes"], 1)
    handler = new_handler(spec)
    emit("short", 0, 1, "s")
    notes.add(0, 1)
    handler.flush()
    path = handler.gateway.get_log_file_path("s")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for number, room in enumerate(range(0, spec["bytes"], spec["step"]), 2):
        before = handler.stats().local_errors
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + room, hard))
        emit("short", 0, number, "s")
        notes.add(0, number)
        wait_until(lambda before=before: handler.stats().local_errors > before)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        handler.flush()
    tell_stats(handler)


def open_many_sessions(spec: dict[str, Any]) -> None:
    """Log one event to each of many sessions with few descriptors."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    handler = new_handler(spec)
    started = time.monotonic()
    for number in range(1, spec["sessions"] + 1):
        emit("many", 0, number, f"session-{number}")
    flushed = bool(handler.flush(timeout=600.0))
    seconds = time.monotonic() - started
    tell_stats(
        handler, flushed=flushed, seconds=seconds, descriptors=len(os.listdir("/proc/self/fd"))
    )


# A child that has imported everything forks one process a command: so that a tracer attached to it
# sees the package's system calls, not the interpreter's.


def zygote(spec: dict[str, Any]) -> None:
    """Fork a process for each line of stdin: a specification of what it does; tell its id."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    warm_up(spec)
    say(ready=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            answer = os.open(os.devnull, os.O_WRONLY)
            os.dup2(answer, 1)
            os.dup2(answer, 2)
            traced(json.loads(line))
            sys.exit(0)
        say(pid=pid)
        _, status = os.waitpid(pid, 0)
        say(status=status)


def warm_up(spec: dict[str, Any]) -> None:
    """Import what a run imports late, as found in a child, so that no thread is left here."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        handler = new_handler({**spec, "base": spec["warm"]})
        emit("warm", 0, 1, "s")
        handler.close()
        with open(writing, "w") as file:
            file.write("\n".join(sys.modules))
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        names = file.read().split()
    os.waitpid(pid, 0)
    for name in names:
        with contextlib.suppress(ImportError):
            __import__(name)


def traced(spec: dict[str, Any]) -> None:
    """One short run; it waits at its gate, for the tracer to attach, in main or listener."""
    from eventlog_handler._listener import Listener

    notes = Notes(spec["notes"], 1, 4096)
    # Mapped now, so that no call of this test's own is counted, or fails.
    outcome = Notes(spec["outcome"], 1, OUTCOME_BYTES)
    errors: list[str] = []

    def gate() -> None:
        with contextlib.suppress(OSError), open(spec["gate"], "rb") as file:
            file.read(1)

    def note_error(error: Exception, context: str) -> None:
        errors.append(f"{context}: {error!r}")

    recover = Listener._recover
    first = [True]

    def gated(self: Listener) -> None:
        if first.pop() if first else False:
            gate()
        recover(self)

    if spec["thread"] == "main":
        gate()
    else:
        Listener._recover = gated  # type: ignore[method-assign]
    raised = 0
    handler = new_handler(
        {**spec, "options": {**spec.get("options", {}), "error_handler": note_error}}
    )
    for number in range(1, spec["count"] + 1):
        try:
            # The last is so large that it is written in pieces.
            filler = "x" * 60_000 * (number == spec["count"])
            emit(spec["who"], 0, number, f"s{number % 2}", filler=filler)
            notes.add(0, number)
        except Exception:
            raised += 1
        if number in (spec["count"] // 2, spec["count"]):
            handler.flush()
    stats = handler.stats()
    handler.close()
    told = {"raised": raised, "dropped": stats.dropped, "errors": errors}
    outcome.write(json.dumps({**told, "durability": stats.durability}))


CHILDREN: dict[str, Callable[[dict[str, Any]], None]] = {
    each.__name__: each
    for each in (
        log_until_killed,
        leave_a_full_ring,
        recover_here,
        fork_often,
        serve_preforked,
        interrupt_often,
        nest_calls,
        fill_and_free,
        cut_writes_short,
        open_many_sessions,
        deliver_until_killed,
        deliver_the_rest,
        zygote,
    )
}


# --- In the test ----------------------------------------------------------------------------------


T = TypeVar("T")


def count(ci: T, long: T) -> T:
    """Return how often: in every run, or in the longer one (`RELIABILITY=long`)."""
    return long if os.environ.get("RELIABILITY") == "long" else ci


def tell(name: str, **figures: object) -> None:
    """Print a test's figures, and add them to the file that `RELIABILITY_REPORT` names."""
    line = f"{name}: " + ", ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in figures.items()
    )
    print(line)
    path = os.environ.get("RELIABILITY_REPORT")
    if path:
        with open(path, "a") as file:
            file.write(line + "\n")


def missing(reason: str) -> NoReturn:
    """Skip for want of a tool; in CI, where it has to be there, fail."""
    import pytest

    print(f"cannot run: {reason}")
    if os.environ.get("CI"):
        pytest.fail(f"cannot run in CI: {reason}")
    pytest.skip(reason)


class Child:
    """A process of its own that runs one of the functions above.

    Args:
        kind: Which.
        spec: What it gets.
    """

    def __init__(self, kind: Callable[[dict[str, Any]], None], **spec: Any) -> None:
        ready = {
            key: str(value) if isinstance(value, Path) else value for key, value in spec.items()
        }
        program = Path(__file__).read_text()
        arguments = [sys.executable, "-c", program, kind.__name__, json.dumps(ready)]
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def answer(self, timeout_seconds: float = HANG_SECONDS) -> dict[str, Any]:
        """Return the next line that the child says."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout_seconds)[0]:
            self.kill()
            raise TimeoutError("the child says nothing")
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise EOFError(self.process.stderr.read().decode(errors="replace"))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def send(self, text: str) -> None:
        """Give the child a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        self.process.kill()
        self.end()

    def end(self, timeout_seconds: float = HANG_SECONDS) -> int:
        """Wait until it has ended by itself; return its code."""
        try:
            self.process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        return self.process.returncode

    def __enter__(self) -> Child:
        """Return the child."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process behind."""
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def recover(base: Path, **options: Any) -> dict[str, Any]:
    """Have a new process recover; return its figures."""
    with Child(recover_here, base=base, options=options) as child:
        child.answer()
        told = child.answer()
        child.end()
    return told


def _begun(path: Path) -> tuple[Path, str, int]:
    """Return what files are sorted by: `-1` follows the plain name, though its text does not."""
    stamp, _, taken = path.stem.partition("-")
    return path.parent, stamp, int(taken or 0)


class Tally:
    """What stands in the files of a base directory, against what was acknowledged.

    Args:
        base: The base directory.
        ordered: Slots whose events must stand in order; None is all.
        across: Whether the order holds from file to file of a session, or within each only.
    """

    def __init__(
        self, base: Path, ordered: Iterable[int] | None = None, across: bool = True
    ) -> None:
        self.found: dict[tuple[str, int], set[int]] = {}
        self.lines = self.lost = self.duplicated = self.disordered = self.invalid = 0
        self.acknowledged = self.notices = self.damaged = 0
        self._slots = None if ordered is None else set(ordered)
        last: dict[tuple[str, ...], int] = {}
        for path in sorted(base.rglob("*.jsonl"), key=_begun):
            place = str(path.parent) if across else str(path)
            for seq, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
                self._add(place, line, seq, last)
        self.damaged = len(list(base.glob(".eventlog/damaged/*")))

    def _add(self, place: str, line: bytes, seq: int, last: dict[tuple[str, ...], int]) -> None:
        self.lines += 1
        try:
            content = orjson.loads(line)
            event = content["event"]
            valid = line.endswith(b"\n") and content["seq"] == seq and bool(content["id"])
        except (ValueError, KeyError, TypeError):
            valid = False
        self.invalid += not valid
        if not valid:
            return
        if event["type"] == "eventlog.dropped":
            self.notices += 1
            return
        slot, number = event["slot"], event["n"]
        numbers = self.found.setdefault((event["who"], slot), set())
        self.duplicated += number in numbers
        numbers.add(number)
        if self._slots is None or slot in self._slots:
            key = (place, event["who"], str(slot))
            self.disordered += number <= last.get(key, 0)
            last[key] = number

    def expect(self, who: str, slot: int, numbers: set[int]) -> None:
        """Count what is missing of the numbers that were acknowledged."""
        self.acknowledged += len(numbers)
        self.lost += len(numbers - self.found.get((who, slot), set()))

    def expect_notes(self, who: str, path: Path, slots: int, room: int = ROOM) -> None:
        """Count what is missing of what a child has noted."""
        notes = Notes(path, slots, room)
        for slot in range(slots):
            self.expect(who, slot, notes.numbers(slot))

    @property
    def figures(self) -> dict[str, int]:
        """What a test prints."""
        return {
            "acknowledged": self.acknowledged,
            "lines": self.lines,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "out_of_order": self.disordered,
            "invalid": self.invalid,
            "damaged": self.damaged,
        }

    @property
    def faults(self) -> dict[str, int]:
        """What must be nothing at all."""
        names = ("lost", "duplicated", "out_of_order", "invalid", "damaged")
        return {name: value for name, value in self.figures.items() if name in names and value}


@contextlib.contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Give a directory for one round, and remove it after: rounds are many."""
    path = parent / name
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def mounted(source: str, target: Path, *options: str) -> Iterator[Path]:
    """Mount, and undo it whatever happens.

    Raises:
        PermissionError: Mounting is not allowed here.
    """
    target.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, source, target], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield target
    finally:
        for _ in range(100):
            if subprocess.run(["umount", target], capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
        else:
            subprocess.run(["umount", "--lazy", target], check=False)


def seeded(*parts: object) -> random.Random:
    """Return a source of randomness that is the same in every run."""
    return random.Random("-".join(map(str, parts)))


if __name__ == "__main__":
    CHILDREN[sys.argv[1]](json.loads(sys.argv[2]))
