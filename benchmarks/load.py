"""The sections that look at a service: a stalled disk, many tasks, an agent's events, a restart."""

from __future__ import annotations

from pathlib import Path

from subjects import BESIDE, RECORD, SUBJECTS, Table, alternate

# Holds each write between two moments: all of `os` for ours, the stream's for the others. The
# stores into our mapped journal go by no such call, and neither do a file's opening and closing.
STALL = """
import logging
stalled, held = [0.0, 0.0], []
def wait():
    now = time.monotonic()
    if stalled[0] <= now < stalled[1]: held.append(1); time.sleep(stalled[1] - now)
def holding(write):
    def held_write(*given): wait(); return write(*given)
    return held_write
for name in ("write", "writev", "pwrite", "pwritev"): setattr(os, name, holding(getattr(os, name)))
class Slow:
    def __init__(self, stream): self.stream = stream
    def write(self, text): wait(); return self.stream.write(text)
    def __getattr__(self, name): return getattr(self.stream, name)
if "file" in globals(): file.stream = Slow(file.stream)
def stall(begun): stalled[:] = begun + 0.5, begun + 2.5
def check(calls):
    if isinstance(log.handlers[0], logging.NullHandler): return
    lines = sum(path.read_bytes().count(b"\\n") for path in pathlib.Path(folder).rglob("*.jsonl"))
    assert lines == calls, f"{lines} lines of {calls} calls"
    assert held or not stalled[1], "no write was held"
def percentiles(spent, every):
    # Who is blocked asks no more: what was due meanwhile has waited too, each `every` less long.
    due = sorted(left for each in spent for left in range(max(each, 1), 0, -every))
    figures = {f"p{p}": due[len(due) * p // 100] / 1000 for p in (50, 90, 99)}
    return {**figures, "max": due[-1] / 1000}
"""
STALLED = """
call(0); time.sleep(0.2)
clock, spent, begun = time.perf_counter_ns, [], time.monotonic()
stall(begun)
while time.monotonic() < begun + 3:
    at = clock(); call(1); spent.append(clock() - at)
    time.sleep(0.002)
finish(); check(len(spent) + 1)
print(json.dumps(percentiles(spent, 2_000_000)))
os._exit(0)
"""
TASKS = """
import random
late, spent, clock = [], [], time.perf_counter_ns
async def one(rng, end):
    while time.monotonic() < end:
        await asyncio.sleep(rng.random() / 2)
        at = clock(); call(1); spent.append(clock() - at)
async def probe(end):
    while time.monotonic() < end:
        at = clock(); await asyncio.sleep(0.001)
        late.append(clock() - at - 1_000_000)
async def main():
    call(0); await asyncio.sleep(0.2)
    begun, rng = time.monotonic(), random.Random(6)
    if stalls: stall(begun)
    await asyncio.gather(probe(begun + 3), *(one(rng, begun + 3) for _ in range(1000)))
asyncio.run(main())
finish(); check(len(spent) + 1)
print(json.dumps({**percentiles(late, 1_000_000), "call": statistics.median(spent) / 1000}))
os._exit(0)
"""
SIZES = """
sys.path.append(benchmarks)
from corpus import corpus
events = corpus(kind, count)
size = sum(len(json.dumps(each)) for each in events)
for each in events[:2 * burst]: log.info("event", extra=each)
clock, caller = time.perf_counter_ns, 0
for first in range(0, 100 * burst, burst):
    begun = clock()
    for each in events[first:first + burst]: log.info("event", extra=each)
    caller += clock() - begun
    time.sleep(0.005)
spent, begun = time.process_time_ns(), clock()
for each in events: log.info("event", extra=each)
finish()
whole, seconds = time.process_time_ns() - spent, (clock() - begun) / 1e9
print(json.dumps({"caller": caller / 100 / burst / 1000, "whole": whole / count / 1000,
                  "rate": size / 1e6 / seconds, "bytes": size / count}))
os._exit(0)
"""
FULL = (
    "import os, signal, sys, time\n"
    + RECORD
    + """
from eventlog_handler import EventLogHandler
def stalled(*given): time.sleep(600)
for name in ("write", "writev", "pwrite", "pwritev"): setattr(os, name, stalled)
handler = EventLogHandler(log_base_dir=sys.argv[1], overflow="drop")
log.addHandler(handler)
number = 0
while not handler.stats().dropped:
    for number in range(number, number + 100):
        log.info("token", extra={"session_id": f"chat-{number % 100}", "text": "x" * 100})
stats = handler.stats()
print(stats.received - sum(stats.dropped.values()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
)
RECOVERY = """
import subprocess
from eventlog_handler import EventLogHandler
done = subprocess.run([sys.executable, "-c", full, folder], stdout=subprocess.PIPE, timeout=120)
begun = time.perf_counter_ns()
handler = EventLogHandler(log_base_dir=folder)
assert handler.flush(timeout=600)
seconds = (time.perf_counter_ns() - begun) / 1e9
found = [path.read_bytes() for path in pathlib.Path(folder).glob("chat-*/*.jsonl")]
lines = sum(each.count(b"\\n") for each in found)
assert lines == int(done.stdout), f"{lines} of {done.stdout}"
print(json.dumps({"events": lines, "MB": sum(map(len, found)) / 1e6, "seconds": seconds}))
"""
SINK = """
import logging, os, sys, time
from eventlog_handler import EventLogHandler, TransportConnectionError, TransportInterface
class Sink(TransportInterface):
    name, is_connected = "sink", True
    def __init__(self, up): self.up, self.taken, self.seen = up, 0, bytearray(1_000_001)
    async def send_batch(self, batch):
        if not self.up: raise TransportConnectionError("down")
        self.taken += len(batch)
        for event in batch: self.seen[int(event.id.rpartition("-")[2])] = 1
        return True
    async def send(self, event, metadata=None): raise TransportConnectionError("batches only")
    async def health_check(self): return self.up
    async def close(self): pass
"""
DOWN = """
handler = EventLogHandler(log_base_dir=sys.argv[1], downstream_transport=Sink(False),
                          block_timeout_seconds=60)
log = logging.getLogger("bench"); log.setLevel(20); log.propagate = False; log.addHandler(handler)
for number in range(1_000_000):
    log.info("token %d", number, extra={"session_id": f"chat-{number % 100}", "text": "x" * 100})
assert handler.flush(timeout=600)
os._exit(0)
"""
CATCHING_UP = """
import subprocess
subprocess.run([sys.executable, "-c", down, folder], check=True, timeout=300)
sink, begun = Sink(True), time.perf_counter_ns()
handler = EventLogHandler(log_base_dir=folder, downstream_transport=sink)
assert handler.flush(until="transport", timeout=600)
seconds = (time.perf_counter_ns() - begun) / 1e9
assert sum(sink.seen) == 1_000_000, f"{sum(sink.seen)} came"
print(json.dumps({"taken": sink.taken, "seconds": seconds, "MiB": peak()}))
os._exit(0)
"""
BENCHMARKS = str(Path(__file__).resolve().parent)


def stalled(rounds: int) -> Table:
    """Latency of a call every 2 ms for 3 s, while each write to the disk is held for 2 of them.

    The disk stalls by injection: between 0.5 s and 2.5 s a write waits until that time is over. It
    is in `os.write` and its kind for ours, and in the `write` of the stream for the others, which
    is what each calls for its log's file. What is no write is not held: opening a file, and the
    stores into our mapped journal. The calls that were due while one was blocked count as having
    waited until it returned. In the end all lines are in the file, or the run counts for nothing.
    """
    found = alternate({name: SUBJECTS[name] + STALL + STALLED for name in BESIDE}, rounds)
    rows = [[n, *(f"{each[p]:,.0f}" for p in each)] for n, each in found.items()]
    return ["", "p50, µs", "p90, µs", "p99, µs", "longest, µs"], rows


def tasks(rounds: int) -> Table:
    """1,000 tasks of an asyncio loop that each log 4 times a second: how late the loop wakes.

    One more task sleeps 1 ms again and again, for 3 s, and takes how much later than that it wakes;
    what was due while the loop stood still counts too. The second half is with the stalled disk of
    the section before. A call is its median.
    """
    codes = {
        f"{name}{', stalled disk' if stalls else ''}": (
            f"{SUBJECTS[name]}{STALL}stalls = {stalls}\n{TASKS}"
        )
        for stalls in (False, True)
        for name in BESIDE
    }
    found = alternate(codes, rounds)
    rows = []
    for name, each in found.items():
        late = [f"{each[key]:,.0f}" for key in ("p50", "p90", "p99", "max")]
        rows.append([name, *late, f"{each['call']:.1f}"])
    return ["", "late p50, µs", "p90, µs", "p99, µs", "latest, µs", "a call, µs"], rows


def sizes(rounds: int) -> Table:
    """Events as an agent makes them, by size, and mixed.

    Their shape is told by `corpus` in `corpus.py`; bytes are those of the fields as JSON. What the
    caller pays is the mean of bursts with pauses, over the floor. CPU of the whole process and MB a
    second are until all lines are in the file, logged as fast as they can be.
    """
    counts = {"delta": (20_000, 50), "step": (10_000, 50), "history": (400, 2)}
    codes = {
        f"{kind} | {name}": (
            f"kind, count, burst, benchmarks = {kind!r}, {count}, {burst}, {BENCHMARKS!r}\n"
            f"{SUBJECTS[name]}{SIZES}"
        )
        for kind, (count, burst) in {**counts, "mixed": (10_000, 50)}.items()
        for name in BESIDE
    }
    found = alternate(codes, rounds)
    rows = []
    for key, each in found.items():
        kind, name = key.split(" | ")
        if name != BESIDE[0]:
            over = each["caller"] - found[f"{kind} | {BESIDE[0]}"]["caller"]
            figures = [f"{over:.1f}", f"{each['whole']:.1f}", f"{each['rate']:,.0f}"]
            rows.append([kind, f"{each['bytes']:,.0f}", name, *figures])
    head = ["event", "bytes", "", "caller, over the floor, µs", "whole CPU, µs", "MB a second"]
    return head, rows


def recovery(rounds: int) -> Table:
    """A ring of 16 MiB that a killed process has filled, until all of it is in the files.

    That process logs to 100 sessions while all its writes stall, until an event finds no room.
    Then a new one begins; its imports are not counted.
    """
    [found] = alternate({"ours": f"full = {FULL!r}\n{RECOVERY}"}, rounds).values()
    row = [f"{found['events']:,.0f}", f"{found['MB']:.1f}", f"{found['seconds']:.2f}"]
    rate = found["events"] / found["seconds"]
    return ["events", "MB", "seconds", "events a second"], [[*row, f"{rate:,.0f}"]]


def catching_up(rounds: int) -> Table:
    """A million events in 100 sessions, logged in an outage, that the next process sends.

    Until `flush(until="transport")` has returned and all have come. The transport takes a batch at
    once, and only counts. One round.
    """
    [found] = alternate({"ours": f"{SINK}down = {SINK + DOWN!r}\n{CATCHING_UP}"}, 1).values()
    rate = 1_000_000 / found["seconds"]
    row = ["1,000,000", f"{found['taken'] - 1_000_000:,.0f}", f"{found['seconds']:.1f}"]
    head = ["events", "sent twice", "seconds", "events a second", "peak memory, MiB"]
    return head, [[*row, f"{rate:,.0f}", f"{found['MiB']:.0f}"]]
