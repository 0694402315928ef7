"""The sections that look at a service: a stalled disk, many tasks, an agent's events, a restart."""

from __future__ import annotations

from subjects import BESIDE, RECORD, SUBJECTS, Table, alternate

# A disk that stalls: each write to the log's files waits until `until` is over. Ours write by
# `os.write`, the others by their stream's `write`.
STALL = """
until = [0.0]
def wait():
    left = until[0] - time.monotonic()
    if left > 0: time.sleep(left)
real = os.write
def write(fd, data):
    wait(); return real(fd, data)
os.write = write
class Slow:
    def __init__(self, stream): self.stream = stream
    def write(self, text): wait(); return self.stream.write(text)
    def __getattr__(self, name): return getattr(self.stream, name)
if "file" in globals(): file.stream = Slow(file.stream)
"""
STALLED = """
call(0); time.sleep(0.2)
clock, spent, begun = time.perf_counter_ns, [], time.monotonic()
until[0] = begun + 2.2
while time.monotonic() < begun + 3:
    at = clock(); call(1); spent.append(clock() - at)
    time.sleep(0.002)
spent.sort()
figures = {f"p{p}": spent[len(spent) * p // 100] / 1000 for p in (50, 90, 99)}
finish()
print(json.dumps({**figures, "max": spent[-1] / 1000}))
os._exit(0)
"""
TASKS = """
import random
late, spent = [], []
async def one(rng, end):
    while time.monotonic() < end:
        await asyncio.sleep(rng.random())
        at = time.perf_counter_ns(); call(1); spent.append(time.perf_counter_ns() - at)
async def probe(end):
    while time.monotonic() < end:
        at = time.perf_counter_ns(); await asyncio.sleep(0.001)
        late.append(time.perf_counter_ns() - at - 1_000_000)
async def main():
    call(0); await asyncio.sleep(0.2)
    end = time.monotonic() + 4
    if stall: until[0] = time.monotonic() + 2
    rng = random.Random(6)
    await asyncio.gather(probe(end), *(one(rng, end) for _ in range(1000)))
asyncio.run(main())
late.sort(); spent.sort()
figures = {f"p{p}": late[len(late) * p // 100] / 1000 for p in (50, 99)}
finish()
print(json.dumps({**figures, "max": late[-1] / 1000, "call": statistics.median(spent) / 1000}))
os._exit(0)
"""
CORPUS = '''
import random
def corpus(kind, count):
    """Return messages and extras with a fixed seed.

    `delta` is a text delta of about 200 bytes as a line, `step` a step of about 2 kB, `history` a
    conversation of about 100 kB. `mixed` is an agent's stream: 95 % deltas, 4.5 % steps, which
    stand for tool calls and their results, and 0.5 % histories.
    """
    rng = random.Random(6)
    words = [f"word{n}" for n in range(500)]
    def text(size): return " ".join(rng.choices(words, k=size // 8))
    def delta(n): return {"event_type": "delta", "index": n, "text": text(40)}
    def step(n):
        call = {"name": "search", "arguments": {"query": text(200), "limit": 10}}
        return {"event_type": "tool_call", "index": n, "call": call, "result": text(1500)}
    def history(n):
        told = [{"role": ("user", "assistant")[i % 2], "content": text(1950)} for i in range(50)]
        return {"event_type": "history", "index": n, "messages": told}
    make = {"delta": delta, "step": step, "history": history}
    def kind_of(): return rng.choices(("delta", "step", "history"), (950, 45, 5))[0]
    chosen = [kind_of() if kind == "mixed" else kind for _ in range(count)]
    return [{"session_id": "chat-42", **make[each](n)} for n, each in enumerate(chosen)]
'''
SIZES = """
import logging
extras = corpus(kind, count)
size = sum(len(json.dumps(each)) for each in extras)
for extra in extras[:200]: log.info("event", extra=extra)
process, thread, begun = time.process_time_ns(), time.thread_time_ns(), time.perf_counter_ns()
for extra in extras: log.info("event", extra=extra)
caller = time.thread_time_ns() - thread
finish()
whole, wall = time.process_time_ns() - process, time.perf_counter_ns() - begun
print(json.dumps({"caller": caller / count / 1000, "whole": whole / count / 1000,
                  "rate": size / wall * 1000}))
os._exit(0)
"""
FULL = (
    RECORD
    + """
import os, signal, time
from eventlog_handler import EventLogHandler
real = os.write
def write(fd, data):
    if data[:1] == b"{": time.sleep(600)
    return real(fd, data)
os.write = write
folder = sys.argv[1]
handler = EventLogHandler(log_base_dir=folder, overflow="drop")
log.addHandler(handler)
number = 0
while not handler.stats().dropped:
    for number in range(number, number + 100):
        log.info("event", extra={"session_id": f"chat-{number % 100}", "text": "x" * 100})
stats = handler.stats()
print(stats.received - sum(stats.dropped.values()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
)
RECOVERY = """
import subprocess
from eventlog_handler import EventLogHandler
done = subprocess.run([sys.executable, "-c", "import sys" + full, folder], stdout=subprocess.PIPE)
begun = time.perf_counter_ns()
handler = EventLogHandler(log_base_dir=folder)
assert handler.flush(timeout=600)
seconds = (time.perf_counter_ns() - begun) / 1e9
found = [path.read_bytes() for path in pathlib.Path(folder).glob("chat-*/*.jsonl")]
lines = sum(each.count(b"\\n") for each in found)
assert lines == int(done.stdout), (lines, done.stdout)
print(json.dumps({"events": lines, "MB": sum(map(len, found)) / 1e6, "seconds": seconds}))
"""
SINK = '''
import logging, resource
from eventlog_handler import EventLogHandler, TransportConnectionError, TransportInterface
class Sink(TransportInterface):
    """Takes everything, or is down."""
    name, is_connected, taken = "sink", True, 0
    def __init__(self, up): self.up = up
    async def send_batch(self, batch):
        if not self.up: raise TransportConnectionError("down")
        self.taken += len(batch)
        return True
    async def send(self, event, metadata=None): return await self.send_batch([event])
    async def health_check(self): return self.up
    async def close(self): pass
'''
DOWN = """
folder = sys.argv[1]
handler = EventLogHandler(log_base_dir=folder, downstream_transport=Sink(False),
                          block_timeout_seconds=60)
log = logging.getLogger("bench"); log.setLevel(20); log.propagate = False; log.addHandler(handler)
for number in range(1_000_000):
    log.info("token %d", number, extra={"session_id": f"chat-{number % 100}", "text": "x" * 100})
"""
CATCHING_UP = """
import subprocess
subprocess.run([sys.executable, "-c", "import sys" + down, folder], check=True)
sink, begun = Sink(True), time.perf_counter_ns()
handler = EventLogHandler(log_base_dir=folder, downstream_transport=sink)
while sink.taken < 1_000_000: time.sleep(0.01)
seconds = (time.perf_counter_ns() - begun) / 1e9
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"events": sink.taken, "seconds": seconds, "MiB": peak}))
"""


def stalled(rounds: int) -> Table:
    """Latency of a call every 2 ms for 3 s, in 2 of which the disk takes nothing."""
    found = alternate({name: SUBJECTS[name] + STALL + STALLED for name in BESIDE}, rounds)
    rows = [[n, *(f"{each[p]:,.0f}" for p in each)] for n, each in found.items()]
    return ["", "p50, µs", "p90, µs", "p99, µs", "longest, µs"], rows


def tasks(rounds: int) -> Table:
    """1,000 tasks of an asyncio loop that log about twice a second: how late one of 1 ms wakes."""
    codes = {
        f"{name}{', stalled disk' if stall else ''}": (
            f"{SUBJECTS[name]}{STALL}stall = {stall}\n{TASKS}"
        )
        for stall in (False, True)
        for name in BESIDE
    }
    found = alternate(codes, rounds)
    rows = [[n, *(f"{each[p]:,.0f}" for p in each)] for n, each in found.items()]
    return ["", "late p50, µs", "late p99, µs", "latest, µs", "a call, µs"], rows


def sizes(rounds: int) -> Table:
    """Events as an agent makes them, by size, and mixed; as fast as they can be logged."""
    counts = {"delta": 20_000, "step": 10_000, "history": 500, "mixed": 10_000}
    codes = {
        f"{kind} | {name}": f"kind, count = {kind!r}, {count}\n{CORPUS}{SUBJECTS[name]}{SIZES}"
        for kind, count in counts.items()
        for name in BESIDE
    }
    found = alternate(codes, rounds)
    rows = []
    for key, each in found.items():
        figures = [f"{each['caller']:.1f}", f"{each['whole']:.1f}", f"{each['rate']:,.0f}"]
        rows.append([*key.split(" | "), *figures])
    return ["event", "", "caller's CPU, µs", "whole CPU, µs", "MB a second"], rows


def recovery(rounds: int) -> Table:
    """A ring of 16 MiB that a killed process has filled, until all of it is in the files."""
    [found] = alternate({"ours": f"full = {FULL!r}\n{RECOVERY}"}, rounds).values()
    rate = found["events"] / found["seconds"]
    row = [
        f"{found['events']:,.0f}",
        f"{found['MB']:.1f}",
        f"{found['seconds']:.2f}",
        f"{rate:,.0f}",
    ]
    return ["events", "MB", "seconds", "events a second"], [row]


def catching_up(rounds: int) -> Table:
    """A million events in 100 sessions, logged while a transport was down, by the next process."""
    [found] = alternate({"ours": f"{SINK}down = {SINK + DOWN!r}\n{CATCHING_UP}"}, 1).values()
    rate = found["events"] / found["seconds"]
    row = [
        f"{found['events']:,.0f}",
        f"{found['seconds']:.1f}",
        f"{rate:,.0f}",
        f"{found['MiB']:.0f}",
    ]
    return ["events", "seconds", "events a second", "peak memory, MiB"], [row]
