"""A model of delivery: hypothesis writes, breaks the far sides, kills, restarts and deletes.

Everything is real but the threads and the far sides: session files, the database, what is parked.
Two transports, one that takes single events and one that takes batches, each remember what they
took over all restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import sqlite3
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import orjson
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from eventlog_handler import (
    TransportConnectionError,
    TransportError,
    TransportInterface,
    TransportRejectedError,
    TransportTimeoutError,
    _backlog,
    _lines,
    _outbox,
    _rejected,
    _sender,
    _stamp,
    _worker,
)
from eventlog_handler._config import resolve
from eventlog_handler._delivery import Delivery, FileRegister
from eventlog_handler._files import Layout, SessionFiles
from eventlog_handler._report import Report
from eventlog_handler._sender import Sender
from eventlog_handler._stamp import new_id
from eventlog_handler.typing import EncodedEvent, OutgoingEvent
from tests.reliability.harness import count, tell

EXAMPLES = count(1000, 20_000)
NAMES = ("single", "batch")
BEHAVIOURS = ("take", "refuse", "false", "timeout", "late", "exit")
told: Counter[str] = Counter()


class Killed(BaseException):
    """Stands for a SIGKILL."""


class Peer:
    """A far side: what it has taken, and how it behaves next."""

    def __init__(self) -> None:
        self.taken: list[OutgoingEvent] = []
        self.script: deque[str] = deque()
        self.well = True
        self.refused: set[str] = set()
        self.out_of_turn: set[str] = set()
        """These come later than their session's next, if they come."""

    def offer(self, event: OutgoingEvent) -> Exception | None:
        """Behave as the script says; return what an attempt ends in, None for taken."""
        behaviour = self.script.popleft() if self.script else "take"
        told[f"offers {behaviour}"] += 1
        if event.id in self.refused or behaviour == "refuse":
            # For good: asked again, it says the same.
            self.refused.add(event.id)
            self.out_of_turn.add(event.id)
            return TransportRejectedError("no")
        if behaviour in ("take", "late"):
            self.taken.append(event)
        if behaviour == "take":
            return None
        if behaviour == "timeout":
            return TransportTimeoutError("nothing heard")
        if behaviour == "late":
            return TransportConnectionError("taken, but nobody hears of it")
        return TransportError(behaviour)


class Single(TransportInterface):
    """Takes one event at a time."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    async def send(self, event: Any, metadata: dict[str, Any] | None = None) -> bool:
        """Offer it to the peer."""
        error = self.peer.offer(OutgoingEvent(event, **(metadata or {})))
        if isinstance(error, TransportError) and str(error) == "exit":
            raise SystemExit(1)
        if isinstance(error, TransportError) and str(error) == "false":
            return False
        if error is not None:
            raise error
        return True

    async def close(self) -> None:
        """Nothing to close."""

    async def health_check(self) -> bool:
        """As the peer is."""
        return self.peer.well

    @property
    def is_connected(self) -> bool:
        """As the peer is."""
        return self.peer.well


class Together(Single):
    """Takes batches, up to the first event that it does not take."""

    async def send_batch(self, batch: Sequence[OutgoingEvent]) -> Any:
        """Offer all to the peer."""
        outcomes: list[Exception | None] = []
        for event in batch:
            outcomes.append(self.peer.offer(event))
            error = outcomes[-1]
            if isinstance(error, TransportRejectedError):
                continue
            if error is not None:
                if str(error) == "exit":
                    raise SystemExit(1)
                if str(error) == "false":
                    return None
                outcomes += [error] * (len(batch) - len(outcomes))
                break
        return outcomes


class Machine(RuleBasedStateMachine):
    """One process after the other on one base directory."""

    make: ClassVar[dict[str, type[Single]]] = {"single": Single, "batch": Together}

    def __init__(self) -> None:
        super().__init__()
        shm = Path("/dev/shm")
        self.base = Path(tempfile.mkdtemp(prefix="model", dir=shm if shm.is_dir() else None))
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(_stamp, "_prefix", f"{0:020x}")
        self.patch.setattr(_stamp, "NUMBERS", itertools.count(1))
        self.patch.setattr(_outbox, "RETRY_SECONDS", 0.0)
        self.patch.setattr(_outbox, "CHUNK_ROWS", 3)
        self.patch.setattr(_sender, "CHUNK_ROWS", 3)
        self.patch.setattr(_sender, "RETRY_SECONDS", 0.0)
        self.patch.setattr(_lines, "CHUNK_BYTES", 400)
        self.patch.setattr(_worker.Worker, "start", lambda worker: None)
        self.fuse = 0
        self.dead = False
        self._count_down("_try", _outbox.Outbox)
        self._count_down("append", SessionFiles)
        self._count_down("park", _sender)
        self._remember_what_is_parked()
        self.loop = asyncio.new_event_loop()
        self.peers = {name: Peer() for name in NAMES}
        self.written: dict[str, list[str]] = {}
        self.clock = 1_700_000_000.0
        self.processes = 0
        self.begin()

    def _count_down(self, name: str, owner: Any) -> None:
        """Have a step of the real code be one at which the process may be killed."""
        real = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            self.burn()
            result = real(*args, **options)
            self.burn()
            return result

        self.patch.setattr(owner, name, call)

    def _remember_what_is_parked(self) -> None:
        real = _sender.park

        def call(base: Path, transport: str, event: OutgoingEvent, reason: str) -> None:
            self.peers[transport].out_of_turn.add(event.id)
            real(base, transport, event, reason)

        self.patch.setattr(_sender, "park", call)

    def burn(self) -> None:
        """Kill, where the fuse is at its end."""
        if self.fuse:
            self.fuse -= 1
            self.dead = self.dead or self.fuse == 0
        if self.dead:
            raise Killed

    def begin(self) -> None:
        """Start a process."""
        self.fuse, self.dead = 0, False
        self.processes += 1
        self.patch.setattr(_stamp, "_prefix", f"{self.processes:020x}")
        options = resolve(
            {
                "log_base_dir": self.base,
                "retry_delay_seconds": 0.0,
                "max_retry_attempts": 2,
                "breaker_failures": 3,
                "breaker_reset_seconds": 0.001,
                "batch_events": 8,
                "max_file_bytes": 1500,
                "shutdown_timeout_seconds": 0,
                "file_naming_pattern": "log",
            },
            {},
        )
        report = Report(None)
        self.delivery = Delivery(
            options, report, lambda session, path: self.files.committed(session, path)
        )
        self.files = SessionFiles(
            options.paths("u"),
            Layout("jsonl"),
            max_open_files=2,
            file_mode=0o600,
            directory_mode=0o700,
            max_file_bytes=options.max_file_bytes,
            registrar=FileRegister(self.delivery),
        )
        self.transports = {name: self.make[name](self.peers[name]) for name in NAMES}
        self.delivery.use_transports(self.transports)

    def die(self) -> None:
        """Kill the process: its locks go, its memory goes, nothing else happens."""
        told["kills"] += 1
        self.fuse, self.dead = 0, False
        for outbox in self.delivery._outboxes:
            outbox._disconnect()
            outbox._let_go()
        self.files.close()

    def senders(self) -> list[Sender]:
        """Return the lanes of the transports."""
        return [sender for sender, _ in self.delivery._senders.values()]

    @contextlib.contextmanager
    def killing(self, calls: int) -> Any:
        """Kill the process at a step of what is done inside, and begin the next one."""
        self.fuse = calls
        try:
            yield
        except Killed:
            self.die()
            self.begin()
        self.fuse = 0

    @rule(
        session=st.sampled_from(["a", "b", "c/d"]),
        count=st.integers(1, 6),
        size=st.sampled_from([0, 30, 900]),
        calls=st.sampled_from([0, 0, 0, 1, 2, 3, 4]),
    )
    def write(self, session: str, count: int, size: int, calls: int) -> None:
        """Write events of a session."""
        events = []
        for _ in range(count):
            self.clock += 0.001
            body = orjson.dumps({"type": "note", "session_id": session, "x": "x" * size})
            events.append(EncodedEvent(session, "note", new_id(), self.clock, body))
        with self.killing(calls):
            while events:
                # What is in the file when the process is killed counts; the rest is another's care.
                events = events[self.files.append(session, events, self._written) :]

    def _written(self, written: Any) -> None:
        told["events"] += len(written.events)
        ids = [event.id for event in written.events]
        self.written.setdefault(written.session, []).extend(ids)
        self.delivery.hand_over(written)

    @rule(
        name=st.sampled_from(NAMES),
        steps=st.integers(1, 5),
        script=st.lists(st.sampled_from(BEHAVIOURS), min_size=1, max_size=8),
        well=st.booleans(),
        calls=st.sampled_from([0, 0, 0, 0, 0, 2, 3, 4, 5, 6]),
    )
    def send(self, name: str, steps: int, script: list[str], well: bool, calls: int) -> None:
        """Let a transport work, whose far side behaves as the script says."""
        peer = self.peers[name]
        peer.script = deque(script)
        peer.well = well
        with self.killing(calls):
            for _ in range(steps):
                self.step(self.delivery._senders[name][0])

    def step(self, sender: Sender) -> float:
        """Take one step of a lane."""
        return self.loop.run_until_complete(sender.step())

    @rule(
        what=st.sampled_from(
            ["kill", "close", "delete", "damage", "replace", "remove_and_add", "send_again"]
        ),
        name=st.sampled_from(NAMES),
    )
    def disturb(self, what: str, name: str) -> None:
        """Do something to the process, its transports or its database."""
        told[what] += 1
        if what in ("kill", "close"):
            getattr(self, what)()
        elif what in ("delete", "damage"):
            self.lose_the_database(what == "damage")
        else:
            getattr(self, what)(name)

    def kill(self) -> None:
        """Kill between two steps."""
        self.die()
        self.begin()

    def close(self) -> None:
        """End the process as it should, whatever is left."""
        self.delivery.close(time.monotonic())
        self.files.close()
        self.begin()

    def lose_the_database(self, damage: bool) -> None:
        """Delete the database under the process, or write rubbish into it."""
        path = self.base / ".eventlog" / _outbox.DATABASE
        if damage and path.exists():
            path.write_bytes(b"rubbish" * 1000)
            return
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)

    def replace(self, name: str) -> None:
        """Have another object send for a transport's name."""
        self.transports[name] = self.make[name](self.peers[name])
        self._use(dict(self.transports))

    def remove_and_add(self, name: str) -> None:
        """Take a transport away and give it back before the next event."""
        self._use({other: self.transports[other] for other in NAMES if other != name})
        self._use(dict(self.transports))

    def _use(self, transports: dict[str, Single]) -> None:
        before = self.senders()
        self.delivery.use_transports(transports)
        for sender in before:
            if sender not in self.senders():
                # Its thread ends after the batch in hand, and there is none.
                sender.abandon()

    def send_again(self, name: str) -> None:
        """Have what was refused sent again."""
        self.peers[name].refused.clear()
        self.delivery.resend_rejected(name)

    @invariant()
    def no_position_is_past_what_is_owed(self) -> None:
        """What the database says is acknowledged was taken or parked."""
        for name, below, position in self.rows():
            done = self.done(name)
            with contextlib.suppress(FileNotFoundError):
                head = (self.base / below).read_bytes()[:position]
                for line in head.splitlines():
                    text, _ = _rejected.unwrap(line)
                    assert orjson.loads(text)["id"] in done, "a position is past what is owed"

    def rows(self) -> list[tuple[str, str, int]]:
        """Return what the database says, if it can be read."""
        path = self.base / ".eventlog" / _outbox.DATABASE
        if not path.exists():
            return []
        with (
            contextlib.suppress(sqlite3.DatabaseError),
            contextlib.closing(sqlite3.connect(path)) as database,
        ):
            return database.execute("SELECT transport, path, position FROM acked").fetchall()
        return []

    def done(self, name: str) -> set[str]:
        """Return the ids of events that a far side has, or that are parked for it."""
        return {event.id for event in self.peers[name].taken} | set(self.parked(name))

    def parked(self, name: str) -> list[str]:
        """Return the ids of the events that are parked for a transport."""
        ids = []
        for path in (self.base / ".eventlog" / "rejected").glob(f"{name}*.jsonl"):
            lines = path.read_bytes().splitlines()
            ids += [orjson.loads(_rejected.unwrap(line)[0])["id"] for line in lines]
        return ids

    @rule()
    def settle(self) -> None:
        """Have all far sides well, wait, and look at everything."""
        told["checks"] += 1
        for peer in self.peers.values():
            peer.script.clear()
            peer.well = True
        for sender in self.senders():
            self.run_dry(sender)
        for name in NAMES:
            self.check(name)

    def run_dry(self, sender: Sender) -> None:
        """Step until nothing is left."""
        sender._tend_at = 0.0
        deadline = time.monotonic() + 20
        while True:
            pause = self.step(sender)
            left = sender.backlog.lag_events or sender._more
            if not left and not sender.deaf and pause > 0.01:
                return
            assert time.monotonic() < deadline, "it does not come to an end"
            time.sleep(min(pause, 0.001))

    def check(self, name: str) -> None:
        """Every event at least once, and each session's in order."""
        parked = set(self.parked(name))
        first: dict[str, int] = {}
        for number, event in enumerate(self.peers[name].taken):
            first.setdefault(event.id, number)
            assert orjson.loads(event.line)["id"] == event.id
        for session, ids in self.written.items():
            missing = [found for found in ids if found not in first and found not in parked]
            assert missing == [], f"{name} lacks {len(missing)} of {session}"
            again = self.peers[name].out_of_turn
            order = [first[found] for found in ids if found in first and found not in again]
            assert order == sorted(order), f"{name} has {session} out of order"
            of_it = {event.session_id for event in self.peers[name].taken if event.id in ids}
            assert of_it <= {session}, "an event has another session's id"

    def teardown(self) -> None:
        """Let the next process deliver all."""
        try:
            self.die()
            self.begin()
            self.settle()
            self.delivery.close(time.monotonic())
            assert self.rows() == [], "rows are left of what is sent"
        finally:
            self.die()
            self.patch.undo()
            self.loop.close()
            shutil.rmtree(self.base, ignore_errors=True)


def run(examples: int, shrink: bool = True) -> None:
    """Run the state machine."""
    phases = tuple(Phase) if shrink else (Phase.generate,)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[phase for phase in phases if phase is not Phase.explain],
        ),
    )


@pytest.mark.timeout(900 if EXAMPLES == 1000 else 0)
def test_every_event_reaches_every_transport_in_order() -> None:
    """Through refusals, lost answers, kills, rotations and lost databases nothing is missing."""
    told.clear()
    run(EXAMPLES)
    tell(f"model of delivery, {EXAMPLES} examples", **told)
    assert told["checks"] >= EXAMPLES


def _unregistered(outbox: object, path: str, session: str, positions: object) -> dict[str, Any]:
    return {}


def _too_far(sender: Sender, cursors: Sequence[Any]) -> list[Any]:
    return [_outbox.Owed(c.path, c.session, c.end) for c in cursors if c.growing or not c.done]


def _behind_all(backlog: Any, outbox: Any, owed: Any, extent: Any) -> int:
    cursor = _backlog.Cursor(outbox, owed.path, owed.session, owed.position, growing=False)
    cursor.end, cursor.oldest = extent.end, extent.oldest
    backlog._queues.setdefault(owed.session, deque()).append(cursor)
    backlog._count(cursor, -extent.events)
    backlog._moved(cursor)
    return 0


def _not_kept(base: Path, transport: str, event: OutgoingEvent, reason: str) -> None:
    """Throw a refused event away."""


@pytest.mark.parametrize(
    ("target", "broken", "expected"),
    [
        ("_outbox.Outbox.register", _unregistered, "lacks|out of order"),
        ("_sender.Sender._positions", _too_far, "a position is past|lacks"),
        ("_backlog.Backlog.owe", _behind_all, "out of order"),
        ("_sender.park", _not_kept, "lacks|a position is past"),
    ],
)
def test_a_missing_safeguard_is_noticed(
    monkeypatch: pytest.MonkeyPatch, target: str, broken: object, expected: str
) -> None:
    """Without the row before the line, the order of files, or the parking the model fails."""
    monkeypatch.setattr(f"eventlog_handler.{target}", broken)
    with pytest.raises(AssertionError, match=expected):
        run(500, shrink=False)
