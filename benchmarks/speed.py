"""What a call costs, and all that follows it, for this package and its peers, in one run.

    pip install '.[bench]'
    python benchmarks/speed.py [section …] [--rounds 5] [--write docs]

Each figure is the median of child processes that alternate between the subjects, so that a busy
machine is busy for all; what counts are the ratios within one run. `--write` puts `benchmarks.md`
and `benchmarks.png` into a folder.
"""

from __future__ import annotations

import argparse
import inspect
import os
import platform
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import load
from instructions import instructions
from parts import parts
from steps import steps
from subjects import (
    BESIDE,
    BURSTS,
    CALLERS,
    CHAINS,
    GATEWAYS,
    PAIR,
    SUBJECTS,
    Table,
    alternate,
    child,
)

# --- What is measured: the rest of a child, which prints one JSON object ---

WHOLE = """
for number in range(1000): call(number)
count, begun = 20_000, time.process_time_ns()
for number in range(count):
    call(number)
    if number % 2000 == 0: time.sleep(0.005)
finish()
spent = time.process_time_ns() - begun
files = [path for path in pathlib.Path(folder).rglob("*") if path.suffix in (".jsonl", ".txt")]
size = sum(path.stat().st_size for path in files) / (count + 1000)
print(json.dumps({"ns": spent / count, "bytes": size, "MiB": peak()}))
"""
COMPUTING = """
def compute():
    while True: sum(range(2000))
threading.Thread(target=compute, daemon=True).start()
clock, spent = time.perf_counter_ns, []
for number in range(600):
    begun = clock(); call(number); spent.append(clock() - begun)
    time.sleep(0.002)
spent = sorted(spent[100:])
print(json.dumps({f"p{p}": spent[len(spent) * p // 100] for p in (50, 90, 99)}))
"""
THREADS = """
def work():
    for number in range(20_000 // threads): call(number)
begun = time.perf_counter_ns()
group = [threading.Thread(target=work) for _ in range(threads)]
for thread in group: thread.start()
for thread in group: thread.join()
finish()
print(json.dumps({"ns": (time.perf_counter_ns() - begun) / 20_000}))
"""
SESSIONS = """
import logging
from eventlog_handler import EventLogHandler
handler = EventLogHandler(log_base_dir=folder, block_timeout_seconds=60)
log = logging.getLogger("bench"); log.setLevel(20); log.propagate = False; log.addHandler(handler)
extras = [{"session_id": f"chat-{n}", "text": "x" * 100} for n in range(sessions)]
for extra in extras: log.info("first", extra=extra)
assert handler.flush(timeout=600)
begun, most = time.perf_counter_ns(), 0
for number in range(count):
    log.info("token", extra=extras[number % sessions])
    if number % 5000 == 0: most = max(most, len(os.listdir("/proc/self/fd")))
assert handler.flush(timeout=600)
rate = count / (time.perf_counter_ns() - begun) * 1e9
print(json.dumps({"per_second": rate, "descriptors": most}))
os._exit(0)
"""
GATEWAY = """
async def main():
    event = {"type": "step", "session_id": "chat-42", "user": "ada", "model": "m1", "ok": True}
    clock, bursts = time.perf_counter_ns, []
    for burst in range(60):
        begun = clock()
        for number in range(50): await gateway({**event, "n": number})
        bursts.append((clock() - begun) / 50)
    print(json.dumps({"ns": statistics.median(bursts[10:])}))
asyncio.run(main())
"""
MEMORY = """
import logging
from eventlog_handler import EventLogHandler
handler = EventLogHandler(log_base_dir=folder, block_timeout_seconds=60)
log = logging.getLogger("bench"); log.setLevel(20); log.propagate = False; log.addHandler(handler)
def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
seen = []
for number in range(1_000_000):
    log.info("token %d", number, extra={"session_id": f"chat-{number % 100}", "text": "x" * 100})
    if number % 50_000 == 49_999: seen.append(resident())
assert handler.flush(timeout=600)
figures = {"first": seen[1], "last": seen[-1], "most": max(seen[1:]), "least": min(seen[1:])}
print(json.dumps(figures))
os._exit(0)
"""
IMPORT = """
import anyio, structlog, orjson, pythonjsonlogger
begun = time.perf_counter_ns()
import eventlog_handler
print(json.dumps({"ms": (time.perf_counter_ns() - begun) / 1e6}))
"""


def caller(rounds: int) -> Table:
    """What a call costs its caller over the floor: bursts of 50 calls, with pauses."""
    found = alternate({name: SUBJECTS[name] + BURSTS for name in CALLERS}, rounds)
    return _with_the_quickest(found, "floor (NullHandler)", PAIR)


def chains(rounds: int) -> Table:
    """The same at the end of a structlog chain."""
    found = alternate({name: SUBJECTS[name] + BURSTS for name in CHAINS}, rounds)
    return _with_the_quickest(found, "structlog, floor", "structlog, orjson to a file")


def whole(rounds: int) -> Table:
    """CPU time of the whole process, until all lines are in the file, over the floor."""
    names = [name for name in CALLERS if name not in ("ours, disk", "python-logstash-async")]
    found = alternate({name: SUBJECTS[name] + WHOLE for name in names}, rounds)
    head, rows = _over_the_floor(found, "floor (NullHandler)", PAIR)
    more = [[f"{each['bytes']:.0f}", f"{each['MiB']:.0f}"] for each in found.values()]
    wider = [[*row, *added] for row, added in zip(rows, more, strict=True)]
    return [*head, "bytes a line", "peak memory, MiB"], wider


def _over_the_floor(found: dict[str, dict[str, float]], floor: str, measure: str) -> Table:
    least = found[floor]["ns"]
    other = found[measure]["ns"] - least
    rows = []
    for name, each in found.items():
        over = each["ns"] - least
        rows.append([name, f"{each['ns'] / 1000:.1f}", f"{over / 1000:.1f}", f"{over / other:.2f}"])
    return ["", "µs a call", "over the floor", f"of {measure}"], rows


def _with_the_quickest(found: dict[str, dict[str, float]], floor: str, measure: str) -> Table:
    head, rows = _over_the_floor(found, floor, measure)
    quick = {name: {"ns": each["quick"]} for name, each in found.items()}
    _, more = _over_the_floor(quick, floor, measure)
    wider = [[*row, over, of] for row, (_, _, over, of) in zip(rows, more, strict=True)]
    return [*head, "quickest tenth, over the floor", f"of {measure}"], wider


def computing(rounds: int) -> Table:
    """Latency of a call beside a thread that computes."""
    found = alternate({name: SUBJECTS[name] + COMPUTING for name in BESIDE}, rounds)
    rows = [[n, *(f"{each[p] / 1000:,.0f}" for p in each)] for n, each in found.items()]
    return ["", "p50, µs", "p90, µs", "p99, µs"], rows


def threads(rounds: int) -> Table:
    """Threads that log at once: time for an event until all lines are in the file."""
    rows = []
    for count in (1, 2, 4, 8):
        codes = {n: f"threads = {count}\n{SUBJECTS[n]}{THREADS}" for n in BESIDE[1:]}
        found = alternate(codes, rounds)
        rows.append([str(count), *(f"{found[name]['ns'] / 1000:.1f}" for name in BESIDE[1:])])
    return ["threads", *(f"{name}, µs" for name in BESIDE[1:])], rows


def sessions(rounds: int) -> Table:
    """Interleaved sessions: events a second until all lines are in the files."""
    counts = {1: 100_000, 100: 100_000, 10_000: 100_000, 100_000: 200_000}
    codes = {str(n): f"sessions, count = {n}, {c}\n{SESSIONS}" for n, c in counts.items()}
    found = alternate(codes, rounds)
    first = found["1"]["per_second"]
    rows = []
    for name, each in found.items():
        rate = each["per_second"]
        row = [f"{int(name):,}", f"{rate:,.0f}", f"{rate / first:.2f}"]
        rows.append([*row, f"{each['descriptors']:.0f}"])
    return ["sessions", "events a second", "of one session", "descriptors"], rows


def gateway(rounds: int) -> Table:
    """An event that is awaited, beside a logger that opens, appends and closes."""
    found = alternate({name: code + GATEWAY for name, code in GATEWAYS.items()}, rounds)
    first = found["the logger it replaces"]["ns"]
    rows = [[n, f"{e['ns'] / 1000:.1f}", f"{e['ns'] / first:.2f}"] for n, e in found.items()]
    return ["", "µs a call", "of the old one"], rows


def memory(rounds: int) -> Table:
    """Resident memory over a million events, every 50,000 from the 100,000th on."""
    [found] = alternate({"ours": MEMORY}, 1).values()
    return ["first, MiB", "least", "most", "last"], [
        [f"{found[key]:.1f}" for key in ("first", "least", "most", "last")]
    ]


def imports(rounds: int) -> Table:
    """`import eventlog_handler`, after its required dependencies, from byte code."""
    child(IMPORT)
    [found] = alternate({"ours": IMPORT}, rounds).values()
    return ["ms"], [[f"{found['ms']:.1f}"]]


SECTIONS: dict[str, Callable[[int], Table]] = {
    each.__name__: each
    for each in (
        caller,
        steps,
        instructions,
        parts,
        whole,
        computing,
        chains,
        gateway,
        sessions,
        threads,
        memory,
        imports,
        load.stalled,
        load.tasks,
        load.sizes,
        load.recovery,
        load.catching_up,
    )
}
SAID = "## What bounds it"
PEERS = ("structlog", "python-json-logger", "orjson", "loguru", "picologging", "logxide")
MORE_PEERS = ("concurrent-log-handler", "opentelemetry-sdk", "python-logstash-async")


def versions() -> str:
    """Return what was measured on what."""
    found = [f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"]
    found.append(f"CPython {platform.python_version()}")
    for name in (*PEERS, *MORE_PEERS):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    return ", ".join(found)


def table_lines(table: Table) -> Iterable[str]:
    """Return a table in Markdown."""
    head, rows = table
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def plot(table: Table, path: Path) -> None:
    """Draw what a call costs over the floor."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows: list[Any] = [row for row in table[1] if row[2] != "0.0" and row[0] != "ours, disk"]
    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    colors = ["tab:orange" if row[0].startswith("ours") else "tab:gray" for row in rows]
    bars = axes.barh([row[0] for row in rows], [float(row[2]) for row in rows], color=colors)
    axes.bar_label(bars, padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("µs a call, over the floor")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, and print each section as it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    lines = [
        "# How fast it is",
        "",
        f"`python benchmarks/speed.py --rounds {arguments.rounds}`: {versions()}. Medians of child "
        "processes that alternate. What counts are the ratios within a section.",
        "",
        "![What a call costs over the floor](benchmarks.png)",
        "",
    ]
    print("\n".join(lines), flush=True)
    for name in arguments.sections or SECTIONS:
        section = SECTIONS[name]
        table = section(arguments.rounds)
        about = inspect.getdoc(section) or ""
        part = [f"## {name.capitalize().replace('_', ' ')}", "", about, "", *table_lines(table), ""]
        print("\n".join(part), flush=True)
        lines += part
        if name == "caller" and arguments.write:
            plot(table, arguments.write / "benchmarks.png")
    if arguments.write:
        page = arguments.write / "benchmarks.md"
        # What is said of the figures is written by hand, and stays.
        said = page.read_text().partition(SAID)[2] if page.exists() else ""
        page.write_text("\n".join([*lines, SAID + (said or "\n")]))


if __name__ == "__main__":
    main()
