"""Servers of the tests' own: on loopback, a free port, a private folder; ended by process id."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

START_SECONDS = 60.0
"""Far beyond anything that is right: it stops what hangs, and measures nothing."""
PASSWORD = "s3cret/p@ss word"
"""Of every server that knows passwords; with characters that a URL has to encode."""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def wait_for(what: str, true: Callable[[], Any], seconds: float = START_SECONDS) -> None:
    """Wait until something is true; fails where it never is."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} seconds"
        time.sleep(0.01)


def encoded(text: str) -> str:
    """Return a text as it may stand anywhere in a URL."""
    return urllib.parse.quote(text, safe="")


def query(**options: Any) -> str:
    """Return options as a URL's query."""
    return "&".join(f"{name}={encoded(str(value))}" for name, value in options.items())


def installed(tool: str) -> str | None:
    """Return where a program is: on the path, beside this Python, or where Debian puts daemons."""
    places = f"{os.environ.get('PATH', '')}:{Path(sys.executable).parent}:/usr/sbin:/usr/local/sbin"
    return shutil.which(tool, path=places)


# Also where the tests are killed, no server stays behind. Not by `preexec_fn`: what it runs in the
# child may wait for a lock that some thread here held when the process was copied.
DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


class Received(NamedTuple):
    """An event as it lies at the far side."""

    line: bytes
    id: str
    session_id: str


class Broker(ABC):
    """A real server, which a test may kill, stop and start again on the same port and folder.

    Args:
        folder: Its data; empty.
    """

    missing: ClassVar[str | None] = None
    """Why it cannot run here, or None."""
    dedupes: ClassVar[bool] = False
    """Whether it drops an event that it has already, by its id."""
    passwords: ClassVar[bool] = True
    """Whether it can be told to want one."""
    tls_options: ClassVar[dict[str, str] | None] = None
    """What makes `url` one for TLS; None where the driver does not stay with the URL's address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command that runs the server in the foreground."""

    def environment(self) -> dict[str, str]:
        """Return variables that it wants beside those there are."""
        return {}

    @abstractmethod
    def ready(self) -> bool:
        """Return whether it answers."""

    @abstractmethod
    def url(self, destination: str, port: int | None = None, **options: Any) -> str:
        """Return a transport's URL.

        Args:
            destination: Stream, queue or topic.
            port: Where to connect, such as to a proxy; the server's unless given.
            **options: Go into the query; `password` beats the right one, `scheme` the usual.
        """

    @abstractmethod
    def make(self, destination: str) -> None:
        """Make a destination."""

    def spoil(self, destination: str) -> None:  # noqa: B027 - not there yet: nothing to do
        """See to it that a destination takes nothing until it is made."""

    def example(self, destination: str) -> tuple[str, str]:
        """Return a URL for the transport, and what the example's consumer wants for it."""
        return self.url(destination), self.url(destination)

    @abstractmethod
    def received(self, destination: str) -> list[Received]:
        """Return all that has arrived there since it was made, in order."""

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "output").open("ab") as output:
            self.process = subprocess.Popen(
                [*DIE_WITH_PARENT, *self.command()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env={**os.environ, **self.environment()},
                start_new_session=True,
            )
        wait_for(f"{type(self).__name__} (see {self.folder / 'output'})", self._answers)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "output").read_text()[-2000:]
        try:
            return self.ready()
        except Exception:
            return False

    def signal(self, number: int) -> None:
        """Send a signal to the server and whatever it has started."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End it at once, as a crash does; data that it has acknowledged stays."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        """Stop it: connections stay, nothing is answered."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self.signal(signal.SIGCONT)
