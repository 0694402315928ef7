"""What is compared, each as code that defines `call(n)` and `finish()`; and how a child runs it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile

RECORD = """
import logging
log = logging.getLogger("bench"); log.setLevel(20); log.propagate = False
def call(n):
    log.info("token %d of %s", n, "answer",
             extra={"session_id": "chat-42", "user": "ada", "n": n, "model": "m1", "ok": True})
def finish(): pass
"""
OURS = """
from eventlog_handler import EventLogHandler
handler = EventLogHandler(log_base_dir=folder, durability="DURABILITY", block_timeout_seconds=60)
log.addHandler(handler)
def finish(): assert handler.flush(timeout=600)
"""
JSON_FILE = """
from pythonjsonlogger.orjson import OrjsonFormatter
file = logging.FileHandler(folder + "/log.jsonl"); file.setFormatter(OrjsonFormatter())
"""
CHAIN = """
import logging, orjson, structlog
def configure(last, factory):
    structlog.configure([
        structlog.contextvars.merge_contextvars, structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True), structlog.processors.format_exc_info,
        last], wrapper_class=structlog.make_filtering_bound_logger(20),
        logger_factory=factory, cache_logger_on_first_use=True)
log = structlog.get_logger()
def call(n):
    log.info("token", session_id="chat-42", user="ada", n=n, model="m1", ok=True)
def finish(): pass
"""
PAIR = "QueueHandler + QueueListener"
ONE_FUNCTION = "all of it in one function, without what can wait"
SUBJECTS = {
    "floor (NullHandler)": RECORD + "log.addHandler(logging.NullHandler())",
    "ours, memory": RECORD + OURS.replace("DURABILITY", "memory"),
    "ours, process": RECORD + OURS.replace("DURABILITY", "process"),
    "ours, disk": RECORD + OURS.replace("DURABILITY", "disk"),
    PAIR: RECORD
    + JSON_FILE
    + """
import logging.handlers, queue
q = queue.Queue(-1); listener = logging.handlers.QueueListener(q, file); listener.start()
log.addHandler(logging.handlers.QueueHandler(q))
def finish(): listener.stop()
""",
    "FileHandler": RECORD + JSON_FILE + "log.addHandler(file)",
    "concurrent-log-handler": RECORD
    + JSON_FILE
    + """
from concurrent_log_handler import ConcurrentRotatingFileHandler
file = ConcurrentRotatingFileHandler(folder + "/log.jsonl"); file.setFormatter(OrjsonFormatter())
log.addHandler(file)
""",
    "loguru, file": """
from loguru import logger
logger.remove(); logger.add(folder + "/log.jsonl", serialize=True)
bound = logger.bind(session_id="chat-42", user="ada", model="m1", ok=True)
def call(n): bound.info("token {} of {}", n, "answer", n=n)
def finish(): logger.complete()
""",
    "loguru, enqueue": """
from loguru import logger
logger.remove(); logger.add(folder + "/log.jsonl", serialize=True, enqueue=True)
bound = logger.bind(session_id="chat-42", user="ada", model="m1", ok=True)
def call(n): bound.info("token {} of {}", n, "answer", n=n)
def finish(): logger.complete()
""",
    "picologging, file": """
import picologging
log = picologging.getLogger("bench"); log.setLevel(20)
log.addHandler(picologging.FileHandler(folder + "/log.txt"))
def call(n): log.info("token %d of %s %s %s %s %s", n, "answer", "chat-42", "ada", "m1", True)
def finish(): pass
""",
    "logxide, file": """
from logxide import logging
log = logging.getLogger("bench"); log.setLevel(20); log.propagate = False
log.addHandler(logging.FileHandler(folder + "/log.txt"))
def call(n): log.info("token %d of %s %s %s %s %s", n, "answer", "chat-42", "ada", "m1", True)
def finish(): logging.flush()
""",
    "OpenTelemetry, batch": RECORD
    + """
import warnings; warnings.simplefilter("ignore")
from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, ConsoleLogRecordExporter
provider = LoggerProvider()
out = open(folder + "/log.jsonl", "w")
provider.add_log_record_processor(BatchLogRecordProcessor(ConsoleLogRecordExporter(out=out)))
log.addHandler(LoggingHandler(logger_provider=provider))
def finish(): provider.shutdown()
""",
    "python-logstash-async": RECORD
    + """
from logstash_async.handler import AsynchronousLogstashHandler
log.addHandler(AsynchronousLogstashHandler("127.0.0.1", 1, database_path=folder + "/log.db"))
""",
    "structlog, floor": CHAIN
    + """
def drop(logger, method, event): raise structlog.DropEvent
configure(drop, structlog.ReturnLoggerFactory())
""",
    "structlog, orjson to a file": CHAIN
    + """
configure(structlog.processors.JSONRenderer(serializer=orjson.dumps),
          structlog.BytesLoggerFactory(file=open(folder + "/log.jsonl", "wb")))
""",
    "structlog, ours": CHAIN
    + """
from eventlog_handler import EventLogProcessor
last = EventLogProcessor(passthrough=False, log_base_dir=folder)
configure(last, structlog.ReturnLoggerFactory())
def finish(): assert last.flush(timeout=600)
""",
}
GATEWAYS = {
    "the logger it replaces": """
class Old:
    async def __call__(self, event):
        path = pathlib.Path(folder) / event["session_id"]; path.mkdir(exist_ok=True)
        with open(path / "log.jsonl", "a") as file:
            file.write(json.dumps({"timestamp": datetime.now(timezone.utc).isoformat(),
                                   "event": event}) + "\\n")
gateway = Old()
""",
    "ours": """
from eventlog_handler import EventSessionLogger
gateway = EventSessionLogger(folder)
""",
    # One file that stays open, nobody else, nothing downstream, no figures, nothing that fails.
    ONE_FUNCTION: """
import orjson
from eventlog_handler._stamp import new_id, timestamp
class AtOnce:
    def __init__(self):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.seq, self.fd = 0, os.open(folder + "/log.jsonl", flags)
    async def __call__(self, event):
        body = b"%b" % orjson.dumps(dict(event)); self.seq += 1
        head = f'{{"timestamp":"{timestamp(time.time())}","id":"{new_id()}","seq":{self.seq},'
        os.write(self.fd, b'%b"event":%b}\\n' % (head.encode(), body))
        return os.fstat(self.fd).st_nlink > 0
gateway = AtOnce()
""",
}
CALLERS = [name for name in SUBJECTS if not name.startswith("structlog")]
CHAINS = [name for name in SUBJECTS if name.startswith("structlog")]
BESIDE = ["floor (NullHandler)", "ours, process", PAIR, "FileHandler"]

# --- How it is run ---

HEAD = """
import asyncio, json, os, pathlib, statistics, sys, threading, time
from datetime import datetime, timezone
folder = sys.argv[1]
def peak():
    # Not `ru_maxrss`, which begins with that of the process that started this one.
    [line] = [each for each in open("/proc/self/status") if each.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
"""
BURSTS = """
clock, bursts = time.perf_counter_ns, []
for burst in range(120):
    begun = clock()
    for number in range(50):
        call(number)
    bursts.append((clock() - begun) / 50)
    time.sleep(0.005)
bursts = sorted(bursts[20:])
print(json.dumps({"ns": statistics.median(bursts), "quick": bursts[len(bursts) // 10]}))
os._exit(0)  # A peer whose server is not there tries for half a minute at exit.
"""
"""What a call costs its caller: in bursts, with pauses in which other threads have their turn.

The quickest tenth too: a virtual core whose twin is busy takes up to 1.7 times as long, which comes
and goes within a second and is on one side of a median or on the other.
"""


def child(code: str) -> dict[str, float] | None:
    """Run a child in a folder of its own; return what it prints, or None where it cannot run."""
    # As it is installed: with byte code.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as folder:
        # Unbuffered, as a child may end by `os._exit`, which leaves what is in a buffer.
        command = [sys.executable, "-u", "-c", HEAD + code, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=kept)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1:], file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def alternate(codes: dict[str, str], rounds: int) -> dict[str, dict[str, float]]:
    """Run each code once a round; return the medians by name, without those that cannot run."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            figures = child(code)
            if figures is not None:
                found[name].append(figures)
    return {
        name: {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        for name, runs in found.items()
        if runs
    }


Row = list[str]
Table = tuple[Row, list[Row]]
