"""The thread of a lane at its end, when the interpreter is ending too."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from eventlog_handler import _worker
from eventlog_handler._report import Report
from eventlog_handler._worker import Worker
from tests.test_lanes import Diary


class Looking(Diary):
    """A lane that has one thing looked up in a thread, when no thread takes work any more."""

    def __init__(self, report: Report, look_up: Callable[[], Any]) -> None:
        super().__init__(report, 0.0)
        self._look_up = look_up
        self.found: Any = None

    async def step(self) -> float:
        """Look it up."""
        loop = asyncio.get_running_loop()
        if not self.finished:
            await loop.run_in_executor(None, int)
            loop._default_executor.shutdown()  # type: ignore[attr-defined]
            try:
                self.found = await loop.run_in_executor(None, self._look_up)
            except OSError as error:
                self.found = error
        return await super().step()


def run(look_up: Callable[[], Any], told: list[str]) -> Any:
    """Run the lane; return what it has found."""
    report = Report(lambda error, context: told.append(context))
    lane = Looking(report, look_up)
    worker = Worker(lane, report)
    worker.start()
    worker.end(time.monotonic() + 30)
    assert worker.join(time.monotonic() + 30)
    return lane.found


def test_what_no_thread_takes_is_done_at_once() -> None:
    """A driver gets its result, or its error, from an executor that has ended too."""
    failure, told = OSError("unknown host"), list[str]()

    def fail() -> None:
        raise failure

    assert run(lambda: "127.0.0.1", told) == "127.0.0.1"
    assert run(fail, told) is failure
    assert told == []


@pytest.mark.parametrize(("late", "told"), [(True, []), (False, ["delivery thread"])])
def test_how_the_loop_ends_is_of_no_interest(
    monkeypatch: pytest.MonkeyPatch, late: bool, told: list[str]
) -> None:
    """After a lane's own end its loop may fail (3.12 starts no thread then); before, it is told."""
    really, heard = _worker.anyio.run, list[str]()

    def failing(main: Any) -> None:
        monkeypatch.undo()
        if late:
            really(main)
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(_worker.anyio, "run", failing)
    monkeypatch.setattr(_worker, "RESTART_SECONDS", 0.0)
    run(int, heard)
    assert heard == told
