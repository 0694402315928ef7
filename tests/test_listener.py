"""The listener thread and the hand-off: order, faults, overflow, restarts, fork, garbage."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eventlog_handler import (
    EventLogHandler,
    EventSessionLogger,
    LoggingTransport,
    _lifecycle,
    _listener,
)
from eventlog_handler._handoff import MemoryHandoff
from eventlog_handler._listener import RELEASE
from eventlog_handler._payload import head_of, pack_body
from eventlog_handler._stamp import new_id
from eventlog_handler.testing import RecordingTransport, capture_events
from eventlog_handler.typing import EncodedEvent
from tests.conftest import events_of, lines_of

Make = Callable[..., EventLogHandler]


def record(message: object, session_id: str = "s1", **extra: Any) -> logging.LogRecord:
    """Return a record of a session."""
    return logging.makeLogRecord({"msg": message, "session_id": session_id, **extra})


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for another thread; fails after 30 seconds."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "waited for 30 seconds"
        time.sleep(0.001)


def block_writes(handler: EventLogHandler) -> threading.Event:
    """Let the listener hang in its next write until the returned event is set."""
    gate = threading.Event()
    write = handler.gateway._write_and_hand_over

    def gated(*args: Any) -> int:
        gate.wait(30)
        return write(*args)

    handler.gateway._write_and_hand_over = gated  # type: ignore[method-assign]
    return gate


def hang_listener(handler: EventLogHandler) -> threading.Event:
    """Put one event, and return the gate once the listener hangs in writing it."""
    gate = block_writes(handler)
    handler.handle(record("held"))
    wait_until(lambda: handler._feed._listener.kept == 1)
    return gate


def test_eight_threads_keep_their_own_order(make_handler: Make, base: Path) -> None:
    """Each thread's events of a session stand in the order of its calls, and none is missing."""
    handler = make_handler()

    def log(number: int) -> None:
        for step in range(500):
            handler.handle(record(step, f"s{number % 2}", thread_number=number))

    threads = [threading.Thread(target=log, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handler.flush()
    events = events_of(base)
    for number in range(8):
        mine = [int(e["message"]) for e in events if e["thread_number"] == number]
        assert mine == list(range(500))
    stats = handler.stats()
    assert (stats.received, stats.written, stats.handoff_depth) == (4000, 4000, 0)


def test_numbers_have_no_gap(make_handler: Make) -> None:
    """`seq` counts 1, 2, 3 … within a file, across batches and writes."""
    handler = make_handler()
    for number in range(3000):
        handler.handle(record(number))
    handler.flush()
    lines = lines_of(handler.gateway.get_log_file_path("s1"))
    assert [line["seq"] for line in lines] == list(range(1, 3001))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_listener_is_restarted(make_handler: Make, base: Path) -> None:
    """When the thread dies, the next record starts another, and nothing is lost."""
    handler = make_handler()
    step = handler._feed._listener._step

    def die(timeout_seconds: float) -> None:
        raise SystemExit

    handler._feed._listener._step = die  # type: ignore[method-assign]
    thread = handler._feed._listener._thread
    assert thread is not None
    handler._feed._listener._handoff.put_marker(lambda: None)
    thread.join(30)
    handler._feed._listener._step = step  # type: ignore[method-assign]
    handler.handle(record("after"))
    handler.flush()
    assert [e["message"] for e in events_of(base)] == ["after"]
    assert handler._feed._listener._thread is not thread


def test_a_full_hand_off_drops_and_tells(make_handler: Make, base: Path) -> None:
    """With `overflow="drop"` what finds no room is counted, and the session's file says so."""
    handler = make_handler(overflow="drop", handoff_capacity=1)
    gate = hang_listener(handler)
    for number in range(3):
        handler.handle(record(number))
    gate.set()
    handler.flush()
    handler.handle(record("after"))
    handler.flush()
    assert [e.get("message", e) for e in events_of(base)] == [
        "held",
        {"type": "eventlog.dropped", "session_id": "s1", "reason": "overflow", "count": 2},
        "0",
        "after",
    ]
    stats = handler.stats()
    assert stats.dropped == {"overflow": 2}
    assert (stats.received, stats.written) == (5, 4)


def test_a_full_hand_off_blocks_until_there_is_room(make_handler: Make, base: Path) -> None:
    """With `overflow="block"` a call waits for the listener, and nothing is lost."""
    handler = make_handler(overflow="block", handoff_capacity=1, block_timeout_seconds=30)
    gate = hang_listener(handler)
    handler.handle(record("fits"))
    blocked = threading.Thread(target=handler.handle, args=(record("waits"),))
    blocked.start()
    gate.set()
    blocked.join(30)
    handler.flush()
    assert [e["message"] for e in events_of(base)] == ["held", "fits", "waits"]


def test_blocking_has_an_end(make_handler: Make) -> None:
    """After `block_timeout_seconds` the event is dropped and counted."""
    handler = make_handler(handoff_capacity=1, block_timeout_seconds=0.01)
    gate = hang_listener(handler)
    handler.handle(record("fits"))
    handler.handle(record("too many"))
    assert handler.stats().dropped == {"overflow": 1}
    gate.set()


def test_a_session_that_cannot_be_written_holds_back_no_other(
    make_handler: Make, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Events of a failing session are kept, in order, until its fault clears; others go on."""
    heard: list[str] = []
    handler = make_handler(error_handler=lambda error, context: heard.append(context))
    base.mkdir(exist_ok=True)
    (base / "s1").write_text("a file where the directory should be")
    handler.handle(record("one"))
    handler.handle(record("other", "s2"))
    handler.handle(record("two"))
    wait_until(lambda: handler.stats().local_errors > 0 and (base / "s2").exists())
    assert handler.stats().handoff_depth >= 1
    (base / "s1").unlink()
    handler.flush()
    assert [e["message"] for e in events_of(base / "s1")] == ["one", "two"]
    assert [e["message"] for e in events_of(base / "s2")] == ["other"]
    assert set(heard) == {"session file"}
    assert "cannot write a session file" in capsys.readouterr().err


def test_flush_tells_what_is_not_written(make_handler: Make, base: Path) -> None:
    """While a session's file cannot be written, a flush ends at its time and says no."""
    handler = make_handler()
    base.mkdir(exist_ok=True)
    (base / "s1").write_text("in the way")
    handler.handle(record("one"))
    wait_until(lambda: handler._feed._listener.kept == 1)
    receipt = handler.flush(timeout=0.5)
    assert not receipt
    assert receipt.waiting > 0
    (base / "s1").unlink()
    assert handler.flush(timeout=30)


def test_what_cannot_be_written_until_close_is_counted(make_handler: Make, base: Path) -> None:
    """Events of a session that fails until the shutdown budget is used up are named and counted."""
    handler = make_handler(shutdown_timeout_seconds=0.3, durability="memory")
    base.mkdir(exist_ok=True)
    (base / "s1").write_text("in the way")
    handler.handle(record("one"))
    handler.close()
    assert handler.stats().dropped == {"unwritable": 1}
    assert handler.stats().handoff_depth == 0


def test_the_end_does_not_wait_for_a_whole_batch(make_handler: Make) -> None:
    """Once the budget is used up no further session's file is begun, by whichever thread."""
    handler = make_handler(shutdown_timeout_seconds=0.01, durability="memory")
    gate = hang_listener(handler)
    for number in range(100):
        handler.handle(record("m", session_id=f"s{number}"))
    listener, files = handler._feed._listener, handler.gateway._files
    thread, append = listener._thread, files.append

    def slow(session_id: str | None, *given: Any) -> int:
        if session_id == "s0":
            wait_until(lambda: time.monotonic() >= listener._deadline)
        return append(session_id, *given)

    files.append = slow  # type: ignore[method-assign]
    gate.set()
    handler.close()
    assert thread is not None
    thread.join(30)
    # The one that was held, and the first of the hundred.
    assert handler.stats().written == 2


def test_what_is_logged_after_an_end_without_a_budget_is_written(
    make_handler: Make, base: Path
) -> None:
    """A budget of 0 is no reason to lose what an exit hook after ours still logs."""
    handler = make_handler(shutdown_timeout_seconds=0, durability="memory")
    handler._feed._listener.at_exit(time.monotonic())
    handler.handle(record("late"))
    assert [e["message"] for e in events_of(base)] == ["late"]


def test_what_cannot_be_written_until_close_waits_in_the_journal(
    make_handler: Make, base: Path
) -> None:
    """With a journal such events are no loss: the next process, or handler, writes them."""
    handler = make_handler(shutdown_timeout_seconds=0.3)
    base.mkdir(exist_ok=True)
    (base / "s1").write_text("in the way")
    handler.handle(record("one"))
    handler.close()
    assert handler.stats().dropped == {}
    (base / "s1").unlink()
    make_handler().flush()
    assert [e["message"] for e in events_of(base)] == ["one"]
    make_handler().flush()
    assert [e["message"] for e in events_of(base)] == ["one"]


def test_during_a_fault_memory_is_bounded(make_handler: Make, base: Path) -> None:
    """While a session cannot be written, no more than `handoff_capacity` events are kept aside."""
    handler = make_handler(handoff_capacity=2, overflow="drop")
    base.mkdir(exist_ok=True)
    (base / "s1").write_text("in the way")
    for number in range(2):
        handler.handle(record(number))
        wait_until(lambda number=number: handler._feed._listener.kept == number + 1)  # type: ignore[misc]
    for number in range(2, 6):
        handler.handle(record(number))
    assert handler.stats().dropped == {"overflow": 2}
    (base / "s1").unlink()
    handler.flush()
    wait_until(lambda: handler.stats().written >= 5)
    kept = [e.get("message") for e in events_of(base) if e["type"] == "log"]
    assert kept == ["0", "1", "2", "3"]


def test_a_defect_costs_one_event(make_handler: Make, base: Path) -> None:
    """An event whose writing raises anything but an OSError does not block those behind it."""
    handler = make_handler()
    write = handler.gateway._write_and_hand_over
    calls: list[int] = []

    def broken_once(session_id: str | None, events: Any) -> int:
        calls.append(len(events))
        if len(calls) == 1:
            raise ValueError("a defect")
        return write(session_id, events)

    handler.gateway._write_and_hand_over = broken_once  # type: ignore[method-assign]
    handler.handle(record("lost"))
    handler.flush()
    handler.handle(record("after"))
    handler.flush()
    assert [e.get("message") for e in events_of(base)] == [None, "after"]
    assert handler.stats().dropped == {"internal_error": 1}


def test_flush_on_the_listener_does_not_wait_for_itself(make_handler: Make, base: Path) -> None:
    """An error handler that flushes, on the listener thread, returns at once."""
    base.mkdir(exist_ok=True)
    (base / "s1").write_text("in the way")
    flushed: list[bool] = []
    handler: EventLogHandler | None = None

    def flush(error: Exception, context: str) -> None:
        if handler is not None:
            flushed.append(bool(handler.flush(timeout=30)))
            (base / "s1").unlink(missing_ok=True)

    handler = make_handler(error_handler=flush)
    handler.handle(record("one"))
    wait_until(lambda: len(flushed) == 1)
    assert flushed == [False]
    assert handler.flush(timeout=30)


def test_a_handler_that_is_garbage_writes_and_ends(base: Path) -> None:
    """Once nothing refers to a handler, its events are written, and its threads end."""
    transport = RecordingTransport()
    handler = EventLogHandler(log_base_dir=base, downstream_transport=transport)
    handler.handle(record("one"))
    listener = handler._feed._listener
    ((_, worker),) = handler.gateway._delivery._senders.values()
    threads = [listener._thread, worker._thread]
    gone = weakref.ref(handler)
    del handler, listener, worker
    gc.collect()
    assert gone() is None
    for thread in threads:
        assert thread is not None
        thread.join(30)
        assert not thread.is_alive()
    assert [e["message"] for e in events_of(base)] == ["one"]
    assert (len(transport.sent), transport.closed) == (1, True)


def test_a_garbage_handler_leaves_a_shared_gateway_open(make_handler: Make, base: Path) -> None:
    """A gateway that others use outlives its handlers, and takes new ones."""
    gateway = EventSessionLogger(base)
    for name in ("one", "two"):
        handler = EventLogHandler(gateway=gateway)
        second = EventLogHandler(gateway=gateway)
        handler.handle(record(name))
        thread = handler._feed._listener._thread
        del handler, second
        gc.collect()
        assert thread is not None
        thread.join(30)
    assert [e["message"] for e in events_of(base)] == ["one", "two"]
    assert not gateway._closed


def test_logging_from_a_signal_handler_does_not_deadlock(make_handler: Make, base: Path) -> None:
    """A signal handler may log while the interrupted call is logging."""
    handler = make_handler()
    seen: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        handler.handle(record("signal"))
        seen.append(number)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        count = 0
        while len(seen) < 50:
            # Once, not at intervals: under a slow tracer those would leave no time for the rest.
            signal.setitimer(signal.ITIMER_REAL, 0.0003)
            for _ in range(20):
                handler.handle(record(count))
                count += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    handler.flush()
    messages = [e["message"] for e in events_of(base)]
    assert messages.count("signal") == len(seen)
    assert [m for m in messages if m != "signal"] == [str(n) for n in range(count)]


def test_logging_inside_str_of_a_logged_object(make_handler: Make, base: Path) -> None:
    """An object whose `__str__` logs gets both events written."""
    handler = make_handler()

    class Talkative:
        def __str__(self) -> str:
            handler.handle(record("from inside"))
            return "outside"

    handler.handle(record("%s", args=(Talkative(),)))
    handler.flush()
    assert [e["message"] for e in events_of(base)] == ["from inside", "outside"]


def test_a_forked_child_writes_files_of_its_own(make_handler: Make, base: Path) -> None:
    """After a fork both sides log on, what waited is the parent's, and nothing is written twice."""
    transport = RecordingTransport()
    handler = make_handler(downstream_transport=transport)
    handler.handle(record("before"))
    handler.flush()
    gate = hang_listener(handler)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            del handler.gateway.__dict__["_write_and_hand_over"]
            handler.handle(record("child"))
            handler.flush()
            code = 0 if [e["message"] for e in transport.events] else 1
        finally:
            os._exit(code)
    gate.set()
    handler.handle(record("parent"))
    handler.flush()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    files = sorted(base.rglob("*.jsonl"), key=lambda path: path.stat().st_ctime_ns)
    messages = [[line["event"]["message"] for line in lines_of(path)] for path in files]
    assert sorted(messages) == [["before", "held", "parent"], ["child"]]
    ids = [line["id"] for path in files for line in lines_of(path)]
    assert len(set(ids)) == 4


def test_a_reset_listener_starts_over(make_handler: Make, base: Path) -> None:
    """What waited is forgotten, and the next record starts a thread."""
    handler = make_handler()
    handler.flush()
    listener = handler._feed._listener
    waiting = handler.gateway._intake.take({"message": "the parent's", "session_id": "s1"})
    assert waiting is not None
    thread = listener._thread
    assert thread is not None
    listener._ending = True
    listener._handoff.put_marker(lambda: None)
    thread.join(30)
    listener._ending = False
    hand_off(listener._handoff, waiting)
    listener.after_fork_in_child()
    handler.handle(record("the child's"))
    handler.flush()
    assert [e["message"] for e in events_of(base)] == ["the child's"]


def test_where_no_thread_can_start_the_caller_writes(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the interpreter's end, when no thread starts any more, a record is written at once."""

    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr("eventlog_handler._listener.threading.Thread", NoThread)
    monkeypatch.setattr("eventlog_handler._worker.threading.Thread", NoThread)
    handler = EventLogHandler(log_base_dir=base, downstream_transport=LoggingTransport())
    handler.handle(record("late"))
    assert [e["message"] for e in events_of(base)] == ["late"]
    handler.close()
    # It stands in the file, for the next process to send.
    assert handler.stats().transports["LoggingTransport"].lag_events == 1


def test_a_listener_that_hangs_does_not_hang_the_exit(base: Path) -> None:
    """A write that never returns costs the shutdown budget, and no more."""
    handler = EventLogHandler(log_base_dir=base, shutdown_timeout_seconds=0.2)
    gate = hang_listener(handler)
    done = threading.Thread(target=handler.close)
    done.start()
    done.join(30)
    assert not done.is_alive()
    gate.set()


def test_only_one_thread_starts_the_listener(make_handler: Make) -> None:
    """While one call starts the thread, another does not wait for it."""
    listener = make_handler()._feed._listener
    thread = listener._thread
    with listener._starting:
        listener._running = False
        listener.start()
    listener._running = True
    listener.start()
    assert listener._thread is thread


def test_what_arrives_as_the_thread_ends_restarts_it(make_handler: Make, base: Path) -> None:
    """An event put between the thread's last look and its end is written."""
    handler = make_handler()
    listener = handler._feed._listener
    finished = listener._finished

    def put_and_finish() -> bool:
        listener._finished = finished  # type: ignore[method-assign]
        event = handler.gateway._intake.take({"message": "last", "session_id": "s1"})
        assert event is not None
        hand_off(listener._handoff, event)
        return True

    listener._finished = put_and_finish  # type: ignore[method-assign]
    listener._handoff.put_marker(lambda: None)
    wait_until(lambda: len(events_of(base)) == 1)


def test_after_the_exit_hooks_events_are_written_by_their_callers(
    make_handler: Make, base: Path
) -> None:
    """An exit hook that runs after ours may still log."""
    handler = make_handler()
    handler.handle(record("before"))
    _lifecycle.end_all()
    handler.handle(record("after"))
    assert [e["message"] for e in events_of(base)] == ["before", "after"]


def test_captured_events_are_not_written(make_handler: Make, base: Path) -> None:
    """Inside `capture_events` a handler's events go to the list instead of the disk."""
    handler = make_handler()
    with capture_events() as events:
        handler.handle(record("hello"))
    handler.flush()
    assert [e["message"] for e in events] == ["hello"]
    assert events_of(base) == []


def test_a_batch_ends_at_a_marker() -> None:
    """`take` returns what was put before a marker, and the marker."""
    handoff = MemoryHandoff(10)
    gateway_event = _event()
    hand_off(handoff, gateway_event)
    handoff.put_marker(gc.collect)
    hand_off(handoff, gateway_event)
    assert handoff.take(10, 0.0) == ([gateway_event], gc.collect)
    assert handoff.take(10, 0.0) == ([gateway_event], None)
    assert handoff.take(10, 0.0) == ([], None)


def test_a_full_queue_refuses() -> None:
    """The plain queue takes no more than its capacity."""
    handoff = MemoryHandoff(1)
    assert [hand_off(handoff, _event()), hand_off(handoff, _event())] == [True, False]


def test_what_is_put_as_the_hand_off_retires_is_kept(make_handler: Make) -> None:
    """An event that arrives between the last batch and the end moves to what comes after."""
    handler = make_handler()
    handler.close()
    listener = handler._feed._listener
    hand_off(listener._handoff, _event())
    listener._retire()
    assert listener._handoff.depth == 1


def test_a_batch_has_a_limit() -> None:
    """`take` returns no more than it was asked for."""
    handoff = MemoryHandoff(10)
    for _ in range(3):
        hand_off(handoff, _event())
    assert len(handoff.take(2, 1.0)[0]) == 2
    assert handoff.depth == 1


def hand_off(handoff: MemoryHandoff, event: EncodedEvent, sync: bool = False) -> bool:
    """Hand an event off."""
    return handoff.put(head_of(event), pack_body(head_of(event), event.body), sync)


def _event() -> EncodedEvent:
    return EncodedEvent("s1", "log", new_id(), 1.5, b"{}")


def test_the_pause_between_retries_is_short() -> None:
    """A fault that clears is noticed within a second."""
    assert _listener.RETRY_SECONDS <= 1


def test_what_the_listener_logs_does_not_wait_for_itself(make_handler: Make, base: Path) -> None:
    """An event that the listener's thread logs while there is no room is dropped at once."""
    handler = make_handler(handoff_capacity=1, block_timeout_seconds=60)
    gate = threading.Event()
    write = handler.gateway._write_and_hand_over

    def logging_write(session_id: str | None, events: Any) -> int:
        gate.wait(30)
        handler.handle(record("inside"))
        return write(session_id, events)

    handler.gateway._write_and_hand_over = logging_write  # type: ignore[method-assign]
    handler.handle(record("held"))
    wait_until(lambda: handler._feed._listener.kept == 1)
    handler.handle(record("fits"))
    handler.gateway._write_and_hand_over, held = logging_write, write  # type: ignore[method-assign]
    gate.set()
    wait_until(lambda: handler.stats().dropped.get("overflow", 0) >= 1)
    handler.gateway._write_and_hand_over = held  # type: ignore[method-assign]


def test_without_local_files_there_is_no_journal(
    make_handler: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """With local logging off the level in force is `memory`, and it is said."""
    handler = make_handler(enable_local_logging=False)
    assert handler.stats().durability == "memory"
    assert "without local files there is no journal" in capsys.readouterr().err


def test_a_failing_recovery_is_told_and_stops_nothing(make_handler: Make, base: Path) -> None:
    """What a recovery cannot read stays where it is, and events are written all the same."""
    (base / ".eventlog").mkdir(parents=True)
    (base / ".eventlog" / "ab-1-1.ring").symlink_to("elsewhere")
    heard: list[str] = []
    handler = make_handler(error_handler=lambda error, context: heard.append(context))
    handler.handle(record("one"))
    handler.flush()
    assert heard == ["recovery"]
    assert [e["message"] for e in events_of(base)] == ["one"]


def test_the_handoff_hears_of_written_events_in_stretches(
    make_handler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where sessions are many, the journal is not told of each event by itself."""
    handler = make_handler()
    gate = hang_listener(handler)
    for number in range(2 * RELEASE + 50):
        handler.handle(record("m", session_id=f"s{number}"))
    handoff, told = handler._feed._listener._handoff, []
    written = handoff.written

    def note(events: Any) -> None:
        told.append(len(events))
        written(events)

    monkeypatch.setattr(handoff, "written", note)
    gate.set()
    assert handler.flush()
    assert [count for count in told if count] == [1, RELEASE, RELEASE, 50]


def test_what_waits_is_sorted_by_session(
    make_handler: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions that take turns, more than there are descriptors, share the opening of a file."""
    handler = make_handler(max_open_files=1)
    gate = hang_listener(handler)
    for number in range(3000):
        handler.handle(record(number, session_id=f"s{number % 2}"))
    opened, real = [], os.open

    def noted(path: Any, *given: Any, **options: Any) -> int:
        opened.append(os.fspath(path))
        return real(path, *given, **options)

    monkeypatch.setattr(os, "open", noted)
    gate.set()
    assert handler.flush()
    # That of the event that is held, and then one for each session.
    assert sum(path.endswith(".jsonl") for path in opened) == 3
    found = [e["message"] for e in events_of(base) if e["session_id"] == "s1"]
    assert found == ["held", *map(str, range(1, 3000, 2))]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_is_written_is_let_go_of_where_the_thread_dies(make_handler: Make) -> None:
    """A thread that is ended in mid-batch leaves nothing in the journal that stands in a file."""
    handler = make_handler()
    listener, write = handler._feed._listener, handler.gateway._write_and_hand_over
    gate = hang_listener(handler)
    for name in ("a", "b"):
        handler.handle(record("m", session_id=name))

    def dies(session_id: str | None, events: Any) -> int:
        if session_id == "b":
            handler.gateway._write_and_hand_over = write  # type: ignore[method-assign]
            raise SystemExit
        return write(session_id, events)

    handler.gateway._write_and_hand_over = dies  # type: ignore[method-assign]
    gate.set()
    thread = listener._thread
    assert thread is not None
    thread.join(30)
    assert [each.session_id for each in listener._kept["b"]] == ["b"]
    assert len(listener._handoff._entries) == 1  # type: ignore[attr-defined]
    assert handler.flush()


def test_an_end_leaves_alone_what_a_caller_is_writing(make_handler: Make, base: Path) -> None:
    """What came after the end is its caller's, and another end does not count it as lost."""
    handler = make_handler()
    listener = handler._feed._listener
    listener.end(time.monotonic() + 30)
    gate = block_writes(handler)
    caller = threading.Thread(target=handler.handle, args=(record("late"),), daemon=True)
    caller.start()
    wait_until(lambda: listener.kept == 1)
    listener.end(time.monotonic())
    gate.set()
    caller.join(30)
    assert messages(base) == ["late"]
    assert handler.stats().dropped == {}


def test_a_flush_after_the_end_tries_and_does_not_wait(make_handler: Make, base: Path) -> None:
    """Nobody tries again by himself then, and what others are writing is not waited for."""
    handler = make_handler(shutdown_timeout_seconds=0.1)
    handler._feed._listener.end(time.monotonic() + 30)

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    handler.gateway._write_and_hand_over = full  # type: ignore[method-assign]
    handler.handle(record("late"))
    begun = time.monotonic()
    assert not handler.flush(timeout=30)
    assert time.monotonic() - begun < 25
    del handler.gateway.__dict__["_write_and_hand_over"]
    assert handler.flush(timeout=30)
    assert messages(base) == ["late"]


# The pause after a batch


@pytest.fixture
def lingering(make_handler: Make, base: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make handlers whose thread has just written `first`, and pauses for longer than any test."""
    monkeypatch.setattr(_listener, "LINGER_SECONDS", 600.0)

    def make(**options: Any) -> EventLogHandler:
        handler = make_handler(**options)
        handler.handle(record("first"))
        wait_until(lambda: messages(base) == ["first"])
        return handler

    return make


def messages(base: Path) -> list[str]:
    """Return the messages that are in files."""
    return [each["message"] for each in events_of(base)]


def test_a_call_right_after_a_batch_wakes_nobody(lingering: Make) -> None:
    """What is put then waits for the next batch: waking a thread costs its caller a system call."""
    handler = lingering()
    handler.handle(record("second"))
    time.sleep(0.05)
    assert handler.stats().handoff_depth == 1


def test_a_flush_ends_the_pause(lingering: Make, base: Path) -> None:
    """Who waits for the files does not wait for the pause."""
    handler = lingering()
    handler.handle(record("second"))
    assert handler.flush(timeout=30)
    assert messages(base) == ["first", "second"]


def test_a_close_ends_the_pause(lingering: Make, base: Path) -> None:
    """The end of a handler is not the end of its events."""
    handler = lingering(shutdown_timeout_seconds=30)
    listener = handler._feed._listener
    handler.handle(record("second"))
    handler.close()
    assert messages(base) == ["first", "second"]
    assert not listener._running


def test_a_forgotten_handler_ends_the_pause(lingering: Make, base: Path) -> None:
    """Nor is it where a handler is collected that nobody has closed."""
    handler = lingering()
    handler.handle(record("second"))
    handler._feed._release()
    wait_until(lambda: messages(base) == ["first", "second"])


def test_a_full_hand_off_ends_the_pause(lingering: Make, base: Path) -> None:
    """A call that waits for room has it made."""
    handler = lingering(handoff_capacity=1, block_timeout_seconds=30)
    for message in ("second", "third"):
        handler.handle(record(message))
    assert handler.flush(timeout=30)
    assert messages(base) == ["first", "second", "third"]
    assert handler.stats().dropped == {}


def test_calls_for_the_end_of_the_pause_do_not_pile_up(lingering: Make) -> None:
    """However long somebody waits for a disk that stands still, one call is enough."""
    listener = lingering()._feed._listener
    for _ in range(1000):
        listener.hurry()
    assert listener._hurry.qsize() <= 1
