"""How many events whose call had returned are gone after `kill -9`, for this package and its peers.

    pip install '.[bench]'
    python benchmarks/loss.py [--kills 20]

One child at a time logs numbered events at full rate, and notes in a mapped file the last one whose
call has returned. It is killed at a random moment 0.2 to 0.7 seconds after the first. Then all that
the library left is read (ours: after a new process has recovered it), and what was noted and
cannot be found is lost.
"""

from __future__ import annotations

import argparse
import json
import mmap
import platform
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SETUPS = {
    "eventlog_handler, process": """
import eventlog_handler, logging
log = logging.getLogger("bench"); log.setLevel(20)
log.addHandler(eventlog_handler.EventLogHandler(log_base_dir=folder))
def call(n): log.info("n=%d", n, extra={"session_id": "s"})
""",
    "eventlog_handler, memory": """
import eventlog_handler, logging
log = logging.getLogger("bench"); log.setLevel(20)
log.addHandler(eventlog_handler.EventLogHandler(log_base_dir=folder, durability="memory"))
def call(n): log.info("n=%d", n, extra={"session_id": "s"})
""",
    "FileHandler": """
import logging
log = logging.getLogger("bench"); log.setLevel(20)
log.addHandler(logging.FileHandler(folder + "/log.txt"))
def call(n): log.info("n=%d", n)
""",
    "QueueHandler + QueueListener": """
import logging, logging.handlers, queue
q = queue.SimpleQueue()
logging.handlers.QueueListener(q, logging.FileHandler(folder + "/log.txt")).start()
log = logging.getLogger("bench"); log.setLevel(20)
log.addHandler(logging.handlers.QueueHandler(q))
def call(n): log.info("n=%d", n)
""",
    "loguru, enqueue": """
from loguru import logger
logger.remove(); logger.add(folder + "/log.txt", format="{message}", enqueue=True)
def call(n): logger.info("n=%d" % n)
""",
    "OpenTelemetry, batch": """
import logging
from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, ConsoleLogRecordExporter
out = open(folder + "/log.txt", "w")
provider = LoggerProvider()
provider.add_log_record_processor(BatchLogRecordProcessor(ConsoleLogRecordExporter(out=out)))
log = logging.getLogger("bench"); log.setLevel(20)
log.addHandler(LoggingHandler(logger_provider=provider))
def call(n): log.info("n=%d", n)
""",
    "python-logstash-async": """
import logging
from logstash_async.handler import AsynchronousLogstashHandler
log = logging.getLogger("bench"); log.setLevel(20)
log.addHandler(AsynchronousLogstashHandler(
    "127.0.0.1", 1, database_path=folder + "/log.db"))
def call(n): log.info("n=%d", n)
""",
}
CHILD = """
import mmap, sys
folder, noted = sys.argv[1:]
{setup}
with open(noted, "r+b") as file:
    last = mmap.mmap(file.fileno(), 8)
number = 0
while True:
    number += 1
    call(number)
    last[0:8] = number.to_bytes(8, "little")
"""
RECOVER = (
    "import sys, eventlog_handler; "
    "eventlog_handler.EventLogHandler(log_base_dir=sys.argv[1]).flush()"
)


def found(folder: Path) -> set[int]:
    """Return the numbers that stand anywhere in what a library has left."""
    numbers: set[int] = set()
    for path in folder.rglob("*"):
        if path.suffix == ".db":
            rows = sqlite3.connect(path).execute("SELECT event_text FROM event")
            texts = [json.loads(text)["message"] for (text,) in rows]
        elif path.is_file() and path.suffix != ".ring":
            texts = path.read_text(errors="replace").split("n=")[1:]
            texts = [f"n={text}" for text in texts]
        else:
            continue
        for text in texts:
            digits = text.removeprefix("n=")
            end = next((i for i, c in enumerate(digits) if not c.isdigit()), len(digits))
            if end:
                numbers.add(int(digits[:end]))
    return numbers


def kill_once(setup: str, chance: random.Random, recover: bool) -> tuple[int, int] | None:
    """Return how many calls had returned, and how many events are gone; None if it cannot run."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, noted = Path(temporary, "logs"), Path(temporary, "noted")
        folder.mkdir()
        noted.write_bytes(bytes(8))
        command = [sys.executable, "-c", CHILD.format(setup=setup), str(folder), str(noted)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with noted.open("r+b") as file, mmap.mmap(file.fileno(), 8) as last:
            read: Callable[[], int] = lambda: int.from_bytes(last[0:8], "little")  # noqa: E731
            while not read() and child.poll() is None:
                time.sleep(0.01)
            time.sleep(0.2 + chance.random() / 2)
            child.kill()
            child.wait()
            acknowledged = read()
        if not acknowledged:
            return None
        if recover:
            subprocess.run([sys.executable, "-c", RECOVER, str(folder)], check=True)
        return acknowledged, len(set(range(1, acknowledged + 1)) - found(folder))


def main() -> None:
    """Print a table: calls, and lost events (median and largest of the kills)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    print(f"CPython {platform.python_version()}, {platform.platform()}, {kills} kills each\n")
    print("| | calls that had returned (median) | lost (median) | lost (largest) |")
    print("|---|---|---|---|")
    for name, setup in SETUPS.items():
        chance = random.Random(1)
        runs = [kill_once(setup, chance, name.startswith("eventlog")) for _ in range(kills)]
        counted = [run for run in runs if run is not None]
        if not counted:
            print(f"| {name} | not installed | | |")
            continue
        calls = statistics.median(calls for calls, _ in counted)
        lost = sorted(lost for _, lost in counted)
        print(f"| {name} | {calls:.0f} | {statistics.median(lost):.0f} | {lost[-1]} |", flush=True)


if __name__ == "__main__":
    main()
