"""What all tests share: real files in a private folder, both event loops, a clean slate."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import orjson
import pytest
import structlog

from eventlog_handler import EventLogHandler, _context, _report

# A shared machine is slow at times, which says nothing of the code.
hypothesis.settings.register_profile(
    "steady", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Run each async test on both event loops."""
    name: str = request.param
    return name


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a test leaves in logging, structlog, the environment and our rate limits."""
    import os

    for name in list(os.environ):
        if name.startswith("AGENT_LOG_"):
            monkeypatch.delenv(name)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    _report._said_at.clear()
    _context.teed.clear()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base directory that does not exist yet."""
    return tmp_path / "sessions"


@pytest.fixture
def make_handler(base: Path) -> Iterator[Callable[..., EventLogHandler]]:
    """Make handlers that are closed when the test ends."""
    made: list[EventLogHandler] = []

    def make(**options: Any) -> EventLogHandler:
        if "gateway" not in options:
            options.setdefault("log_base_dir", base)
        made.append(EventLogHandler(**options))
        return made[-1]

    yield make
    for handler in made:
        handler.close()


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger of this test's own, at DEBUG, that propagates nowhere."""
    found = logging.getLogger("tests.app")
    found.setLevel(logging.DEBUG)
    found.propagate = False
    yield found
    found.handlers.clear()
    found.filters.clear()


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a session file."""
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def events_of(directory: Path) -> list[dict[str, Any]]:
    """Return the events of all files below a directory, each file's in order."""
    return [line["event"] for path in sorted(directory.rglob("*.jsonl")) for line in lines_of(path)]
