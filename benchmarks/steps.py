"""The section that takes a call apart: what each step costs, and what the same would cost least."""

from __future__ import annotations

from subjects import RECORD, SUBJECTS, Table, alternate

BURSTS = """
clock, bursts = time.perf_counter_ns, []
for burst in range(120):
    begun = clock()
    for number in range(50):
        call(number)
    bursts.append((clock() - begun) / 50)
    time.sleep(0.005)
print(json.dumps({"ns": statistics.median(bursts[20:])}))
os._exit(0)  # A peer whose server is not there tries for half a minute at exit.
"""
"""What a call costs its caller: in bursts, with pauses in which other threads have their turn."""

# A handler that goes so far and no farther. The ring is small and begins anew when it is full, so
# that its pages are as warm as those of one that a listener empties.
CUT = """
from eventlog_handler import EventLogHandler
from eventlog_handler._encode import encode
from eventlog_handler._journal import MappedRing
from eventlog_handler._ring import pack
from eventlog_handler._snapshot import usual_fields
handler = EventLogHandler(log_base_dir=folder)
of_record = handler._feed._intake.of_record
ring = MappedRing(pathlib.Path(folder), 65536).ring
class Cut(logging.Handler):
    def handle(self, record): STEP
log.addHandler(Cut())
"""
STEPS = {
    "record to fields": "usual_fields(record)",
    "JSON": "encode(usual_fields(record))",
    "session, id, time": "of_record(record)",
    "packing": "pack(of_record(record))",
    "checksum, frame, store": "ring.append(pack(of_record(record))) or ring.clear()",
}
# All of it again, straight on: no filter, setting, bound field, unusual record or signal handler
# is asked for, and no ring is ever full.
AT_ONCE = """
import mmap, queue, struct, zlib, orjson
from eventlog_handler._stamp import new_id, timestamp
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
        session, number, when = held["session_id"], new_id(), timestamp(record.created)
        body = b"%b" % orjson.dumps(fields)
        text = f"{number}{when}log{session}".encode()
        payload = struct.pack("<BHIi", len(number), len(when), 3, len(session)) + text + body
        with self.mutex:
            at = self.at if self.at + len(payload) + 32 < 2**16 else 0
            self.ring[at:at + 16] = struct.pack("<QQ", at, zlib.crc32(payload))
            self.ring[at + 16:at + 16 + len(payload)] = payload
            self.at = at + len(payload) + 16
            self.queue.put((session, "log", number, when, body, at))
def listen():
    while True: once.queue.get()
once = AtOnce(); log.addHandler(once)
threading.Thread(target=listen, daemon=True).start()
"""
PAIR = "QueueHandler + QueueListener"


def steps(rounds: int) -> Table:
    """A call of ours taken apart: the same bursts, cut off after each step."""
    codes = {"floor": SUBJECTS["floor (NullHandler)"], PAIR: SUBJECTS[PAIR]}
    codes |= {name: RECORD + CUT.replace("STEP", step) for name, step in STEPS.items()}
    codes["filter, settings, lock, queue: ours, process"] = SUBJECTS["ours, process"]
    codes["all of it in one function, without what can wait"] = RECORD + AT_ONCE
    found = alternate({name: code + BURSTS for name, code in codes.items()}, rounds)
    floor = before = found.pop("floor")["ns"]
    pair = found.pop(PAIR)["ns"] - floor
    rows = []
    for name, each in found.items():
        spent = each["ns"]
        step = "" if name.startswith("all") else f"{(spent - before) / 1000:.1f}"
        so_far = spent - floor
        rows.append([name, step, f"{so_far / 1000:.1f}", f"{so_far / pair:.2f}"])
        before = spent
    return ["", "this step, µs", "over the floor, µs", f"of {PAIR}"], rows
