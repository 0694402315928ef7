"""The section that tells what bounds a figure: what each part of it takes, by instructions."""

from __future__ import annotations

from instructions import all_counted, counted
from subjects import GATEWAYS, ONE_FUNCTION, RECORD, SUBJECTS, Table, child

FEW, MANY = 500, 2500
"""How often: what the second takes more than the first is the part's alone."""
EACH = "\nfor number in range(COUNT): "
END = "\nprint('{}'); os._exit(0)"
CALLS = f"{EACH}call(number)\n"
STORED = f"""
import orjson
from eventlog_handler._journal import JournalHandoff
from eventlog_handler._payload import pack
handoff = JournalHandoff(pathlib.Path(folder), 100_000, 2**26, False)
head = "chat-42", "log", 1, 1.5
fields = {{"type": "log", "session_id": "chat-42", "level": "info", "event": "token",
           "timestamp": "2026-11-27T23:00:00Z", "user": "ada", "n": 1, "model": "m1", "ok": True}}
{EACH}"""
AWAIT = """
event = {"type": "step", "session_id": "chat-42", "user": "ada", "model": "m1", "n": 1, "ok": True}
async def main(count):
    for number in range(count): await gateway(event)
asyncio.run(main(COUNT))
"""
# A turn of the loop is left out, as it depends on the time.
AWAITED = f"""
{GATEWAYS["ours"]}
gateway._turn_at = float("inf")
{AWAIT}"""
WRITING = f"""
{AWAITED.replace("COUNT", "1")}
files, then, one = gateway._files, lambda written: None, [gateway._intake.take(event)]
file = files._file("chat-42")
pieces, size, _ = files._chunk(file, one)
{EACH}"""
# Events wait, and who takes them is the main thread, whose instructions are counted.
WAITING = f"""
{RECORD}
from eventlog_handler import EventLogHandler
from eventlog_handler._listener import Listener
Listener.start = lambda self: None
handler = EventLogHandler(log_base_dir=folder, ring_bytes=2**26)
log.addHandler(handler)
listener = handler._feed._listener
handoff, files = listener._handoff, handler.gateway._files
{CALLS}"""
TAKEN = f"{WAITING}events = handoff.take(COUNT, 0)[0]\n"
LINES = """
for begin in range(0, COUNT, 50): files._chunk(files._file("chat-42"), events[begin:begin + 50])
"""
ALL = "while handoff.depth: listener._step(0)\n"
BATCHES = "import eventlog_handler._listener as module; module.BATCH = 50\n"
FLOOR = SUBJECTS["structlog, floor"] + CALLS
PARTS = {
    "a structlog line to a file": (SUBJECTS["structlog, orjson to a file"] + CALLS, FLOOR),
    "a structlog event of ours": (SUBJECTS["structlog, ours"] + CALLS, FLOOR),
    "- its JSON": (f"{STORED}orjson.dumps(fields)", ""),
    "- JSON, lock, checksum, store, queue": (f"{STORED}handoff.put(head, pack(head, fields))", ""),
    "what the listener does for an event, 50 at a time": (WAITING + BATCHES + ALL, WAITING),
    "- taken from the queue": (TAKEN, WAITING),
    "- the line, and where it ends": (TAKEN + LINES, TAKEN),
    "the logger that `await gateway(event)` replaces": (
        GATEWAYS["the logger it replaces"] + AWAIT,
        "",
    ),
    "`await gateway(event)`": (AWAITED, ""),
    "- snapshot and JSON": (f"{WRITING}gateway._intake.take(event)", ""),
    "- the file, open already": (f"{WRITING}files.append('chat-42', one, then)", ""),
    "- - the line, and where it ends": (f"{WRITING}files._chunk(file, one)", ""),
    "- - - its head, with the text of the time": (f"{WRITING}one[0].head(number)", ""),
    "- - `write`": (f"{WRITING}files._write('chat-42', file, pieces, size)", ""),
    "- - `fstat`": (f"{WRITING}os.fstat(file.fd)", ""),
    f"- {ONE_FUNCTION}": (GATEWAYS[ONE_FUNCTION] + AWAIT, ""),
}


def _each(code: str) -> float:
    """Return the instructions of what `code` does `COUNT` times, on its main thread."""
    if not code:
        return 0.0
    few, many = (code.replace("COUNT", str(count)) + END for count in (FEW, MANY))
    # Byte code is made before anything is counted.
    child(few)
    return (counted(many)[0] - counted(few)[0]) / (MANY - FEW)


def parts(rounds: int) -> Table:
    """What the parts of an event take of their thread's instructions, each in a loop of its own.

    By valgrind, as above. A part that begins with a dash is one of what stands above it.
    """
    codes = {code: code for pair in PARTS.values() for code in pair}
    found = all_counted(_each, codes)
    rows = [
        [name, f"{found[code] - found[less]:,.0f}"] for name, (code, less) in PARTS.items() if found
    ]
    return ["", "instructions"], rows
