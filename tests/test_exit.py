"""How a process may end, each in an interpreter of its own: nothing that was logged is missing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.conftest import events_of

SETUP = """
import atexit, logging, logging.config, os, sys, threading, time
{before}
logging.config.dictConfig({{
    "version": 1,
    "handlers": {{"events": {{
        "class": "eventlog_handler.EventLogHandler", "log_base_dir": {base!r},
        "shutdown_timeout_seconds": {budget},
    }}}},
    "root": {{"level": "INFO", "handlers": ["events"]}},
}})
log = logging.getLogger("app")
def many(count=20_000):
    for number in range(count):
        log.info("%d", number, extra={{"session_id": "s1"}})
"""


def run(
    base: Path, script: str, before: str = "", budget: float = 30
) -> subprocess.CompletedProcess[str]:
    """Run a script whose root logger has our handler; it never closes anything."""
    setup = SETUP.format(base=str(base), before=before, budget=budget)
    code = setup + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )


def messages(base: Path) -> list[str]:
    """Return the messages of all events."""
    return [event["message"] for event in events_of(base)]


ALL = [str(number) for number in range(20_000)]


def test_normal_exit(base: Path) -> None:
    """20,000 calls and a normal exit: 20,000 lines, in order."""
    done = run(base, "many()")
    assert (done.returncode, done.stderr) == (0, "")
    assert messages(base) == ALL


def test_unhandled_exception(base: Path) -> None:
    """20,000 calls and an unhandled exception: 20,000 lines, in order."""
    done = run(base, "many(); raise ValueError('unhandled')")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: unhandled\n")
    assert messages(base) == ALL


def test_sys_exit_in_a_thread(base: Path) -> None:
    """20,000 calls in a thread that ends in `sys.exit`: 20,000 lines, in order."""
    done = run(base, "t = threading.Thread(target=lambda: (many(), sys.exit(3))); t.start()")
    assert (done.returncode, done.stderr) == (0, "")
    assert messages(base) == ALL


def test_sys_exit(base: Path) -> None:
    """20,000 calls and `sys.exit(3)`: the code, and 20,000 lines in order."""
    done = run(base, "many(); sys.exit(3)")
    assert (done.returncode, done.stderr) == (3, "")
    assert messages(base) == ALL


def test_a_handled_sigterm(base: Path) -> None:
    """A SIGTERM that ends in `sys.exit` loses nothing."""
    done = run(
        base,
        """
        import signal
        signal.signal(signal.SIGTERM, lambda *args: sys.exit(0))
        many(1000); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert messages(base) == ALL[:1000]


def test_logging_in_exit_hooks(base: Path) -> None:
    """Hooks that run before and after ours may log; so may one after `logging.shutdown`."""
    done = run(
        base,
        "atexit.register(many, 3)",
        before="atexit._clear(); atexit.register(lambda: many(2)); atexit.register("
        "logging.shutdown)",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert messages(base) == ["0", "1", "2", "0", "1"]


def test_logging_shutdown_by_hand(base: Path) -> None:
    """A program that calls `logging.shutdown()` and logs on keeps what it logs."""
    done = run(base, "many(2); logging.shutdown(); many(2)")
    assert (done.returncode, done.stderr) == (0, "")
    assert messages(base) == ["0", "1", "0", "1"]


@pytest.mark.parametrize("pause", ["time.sleep(0.001)", "pass"])
def test_a_daemon_thread_that_logs_at_exit(base: Path, pause: str) -> None:
    """What a daemon thread has logged when the main thread ends is written, and nothing hangs.

    That more comes than the listener can wait for costs no budget.
    """
    begun = time.monotonic()
    done = run(
        base,
        f"""
        ready = threading.Event()
        def forever():
            many(100); ready.set()
            while True: log.info("more", extra={{"session_id": "s2"}}); {pause}
        threading.Thread(target=forever, daemon=True).start(); ready.wait()
        """,
    )
    assert done.returncode == 0
    assert [e["message"] for e in events_of(base / "s1")] == ALL[:100]
    assert time.monotonic() - begun < 25


@pytest.mark.parametrize("how", ["await anyio.sleep(3600)", "time.sleep(3600)"])
def test_a_hung_transport(base: Path, how: str) -> None:
    """A transport that hangs costs the budget: the files are whole and the process ends."""
    done = run(
        base,
        f"""
        import anyio, eventlog_handler
        class Hung(eventlog_handler.NullTransport):
            async def send(self, event, metadata=None):
                {how}
        log.parent.handlers[0].gateway.update_downstream_transport(Hung())
        many(1000)
        """,
        budget=0.5,
    )
    assert done.returncode == 0
    assert messages(base) == ALL[:1000]


def test_structlog_processor_at_exit(base: Path) -> None:
    """A processor needs no close either."""
    done = run(
        base,
        f"""
        import structlog, eventlog_handler
        processor = eventlog_handler.EventLogProcessor(False, log_base_dir={str(base / "sl")!r})
        structlog.configure(processors=[processor])
        for number in range(1000): structlog.get_logger().info(str(number), session_id="s1")
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert messages(base / "sl") == ALL[:1000]


def test_logging_in_forked_children(base: Path) -> None:
    """Children made by `multiprocessing` and `os.fork` log on, and lose nothing at their end."""
    done = run(
        base,
        """
        import multiprocessing
        many(10)
        process = multiprocessing.get_context("fork").Process(target=many, args=(10,))
        process.start(); process.join()
        if os.fork() == 0:
            many(10); sys.exit(0)
        os.wait(); many(10)
        """,
    )
    assert done.returncode == 0
    assert sorted(messages(base)) == sorted(ALL[:10] * 4)
    assert len(list(base.rglob("*.jsonl"))) == 3


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_children_lose_nothing(base: Path, tmp_path: Path, method: str) -> None:
    """Children of every start method write what they logged, though they skip the exit hooks."""
    script = tmp_path / "app.py"
    script.write_text(
        SETUP.format(base=str(base), before="import multiprocessing", budget=30)
        + textwrap.dedent(
            f"""
            if __name__ == "__main__":
                context = multiprocessing.get_context({method!r})
                children = [context.Process(target=many, args=(10,)) for _ in range(2)]
                for child in children: child.start()
                for child in children: child.join()
                many(10)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(messages(base)) == sorted(ALL[:10] * 3)


LOOKS_UP = """
import asyncio, socket
class Transport:
    name, is_connected, taken = "there", True, []
    async def send(self, event, metadata=None):
        loop = asyncio.get_running_loop()
        with contextlib.suppress(socket.gaierror):
            await loop.getaddrinfo("host.invalid", 80)
        await loop.getaddrinfo("localhost", 80)
        self.taken.append(metadata["id"])
        return True
    async def close(self):
        print(len(self.taken))
    async def health_check(self):
        return True
"""


def test_a_transport_may_look_up_names_at_exit(base: Path) -> None:
    """Drivers do that in threads, which the interpreter starts no more; it is done all the same."""
    code = f"""
import contextlib, logging
{LOOKS_UP}
from eventlog_handler import EventLogHandler
told = lambda error, context: print(context, error)
logging.basicConfig(level="INFO", handlers=[EventLogHandler(
    log_base_dir={str(base)!r}, downstream_transport=Transport(), error_handler=told)])
for number in range(3):
    logging.info("%d", number, extra={{"session_id": "s1"}})
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")
