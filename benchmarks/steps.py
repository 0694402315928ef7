"""The section that takes a call apart: what each step costs, and what the same would cost least."""

from __future__ import annotations

from subjects import BURSTS, ONE_FUNCTION, PAIR, RECORD, SUBJECTS, Table, alternate

# A handler that goes so far and no farther. The ring is small and begins anew when it is full, so
# that its pages are as warm as those of one that a listener empties.
CUT = """
from eventlog_handler import EventLogHandler
from eventlog_handler._journal import MappedRing
from eventlog_handler._snapshot import usual_event
handler = EventLogHandler(log_base_dir=folder)
ring, field = MappedRing(pathlib.Path(folder), 65536).ring, "session_id"
handler._feed.put_record = lambda record: STEP
log.addHandler(handler)
"""
STEPS = {
    "filter, settings": "None",
    "fields, session, number, time, JSON": "usual_event(record, field)",
    "checksum, frame, store": "ring.append(usual_event(record, field)[1]) or ring.clear()",
}
REST = "lock, queue, and all calls: ours, process"
# All of it again, straight on: no filter, setting, bound field, unusual record or signal handler
# is asked for, and no ring is ever full.
AT_ONCE = """
import itertools, mmap, queue, struct, zlib, orjson
numbers = itertools.count(1)
words = struct.Struct("<QII").pack
class AtOnce(logging.Handler):
    def __init__(self):
        super().__init__()
        with open(folder + "/ring", "wb") as file: os.posix_fallocate(file.fileno(), 0, 2**16)
        self.file = open(folder + "/ring", "r+b")
        self.ring, self.at = memoryview(mmap.mmap(self.file.fileno(), 2**16)), 0
        self.mutex, self.queue = threading.RLock(), queue.SimpleQueue()
        self.own = set(vars(logging.makeLogRecord({})))
    def handle(self, record):
        held = record.__dict__
        fields = {"type": "log", "session_id": None, "level": record.levelname,
                  "logger": record.name, "message": record.msg % record.args}
        for name in held:
            if name not in self.own: fields[name] = held[name]
        head = held["session_id"], "log", next(numbers), record.created
        payload = orjson.dumps((*head[2:], fields))
        length = len(payload)
        with self.mutex:
            at = self.at if self.at + length + 32 < 2**16 else 0
            kept = words(at, zlib.crc32(payload), length) + payload
            self.ring[at:at + 16 + length] = kept
            self.at = at + length + 16
            self.queue.put((head, kept, at))
def listen():
    while True: once.queue.get()
once = AtOnce(); log.addHandler(once)
threading.Thread(target=listen, daemon=True).start()
"""


def steps(rounds: int) -> Table:
    """A call of ours taken apart: the same bursts, cut off after each step."""
    codes = {"floor": SUBJECTS["floor (NullHandler)"], PAIR: SUBJECTS[PAIR]}
    codes |= {name: RECORD + CUT.replace("STEP", step) for name, step in STEPS.items()}
    codes[REST] = SUBJECTS["ours, process"]
    codes[ONE_FUNCTION] = RECORD + AT_ONCE
    found = alternate({name: code + BURSTS for name, code in codes.items()}, rounds)
    floor = before = found.pop("floor")["ns"]
    pair = found.pop(PAIR)["ns"] - floor
    rows = []
    for name, each in found.items():
        spent = each["ns"]
        step = "" if name == ONE_FUNCTION else f"{(spent - before) / 1000:.1f}"
        so_far = spent - floor
        rows.append([name, step, f"{so_far / 1000:.1f}", f"{so_far / pair:.2f}"])
        before = spent
    return ["", "this step, µs", "over the floor, µs", f"of {PAIR}"], rows
