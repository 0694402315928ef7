"""What transports to a server share, shown with a server that is a script."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from eventlog_handler import (
    TransportConnectionError,
    TransportError,
    TransportRejectedError,
    TransportTimeoutError,
)
from eventlog_handler.transports import _remote
from eventlog_handler.transports._remote import Outcomes, RemoteTransport
from eventlog_handler.typing import OutgoingEvent

URL = "script://ann:s3%2Fcret@host/path"


class Throttled(Exception):
    """A driver's error that its transport knows."""


class Client:
    """A connection."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.shut = False


class ScriptTransport(RemoteTransport):
    """Does what the test says."""

    ports = {"script": 1000, "scripts": 2000}
    tls_schemes = ("scripts",)
    errors = ((Throttled, TransportConnectionError),)

    def __init__(self, url: str = URL, **options: Any) -> None:
        super().__init__(url, **options)
        self.clients: list[Client] = []
        self.opening: Callable[[], Awaitable[None]] = done
        self.shutting: Callable[[], Awaitable[None]] = done
        self.asking: Callable[[], Awaitable[None]] = done
        self.answers: Callable[[Sequence[OutgoingEvent]], Awaitable[Outcomes]] = confirm

    async def _open(self) -> Client:
        await self.opening()
        self.clients.append(Client())
        return self.clients[-1]

    async def _deliver(self, client: Client, batch: Sequence[OutgoingEvent]) -> Outcomes:
        client.lines += [event.line for event in batch]
        return await self.answers(batch)

    async def _ask(self, client: Client) -> None:
        await self.asking()

    async def _shut(self, client: Client) -> None:
        await self.shutting()
        client.shut = True


async def done() -> None:
    """Succeed."""


async def hang() -> None:
    """Never end."""
    await asyncio.Event().wait()


async def confirm(batch: Sequence[OutgoingEvent]) -> Outcomes:
    """Confirm all."""
    return [None] * len(batch)


def failing(error: BaseException) -> Callable[..., Awaitable[Any]]:
    """Return what raises an error."""

    async def fail(*args: Any) -> Any:
        raise error

    return fail


def batch_of(*lines: bytes) -> list[OutgoingEvent]:
    """Return events."""
    return [OutgoingEvent(line, f"id-{n}", "s", "step", "now") for n, line in enumerate(lines)]


# Options.


def test_a_keyword_beats_the_url() -> None:
    """Options come from the query, and from keywords, which win; user and password likewise."""
    transport = ScriptTransport(f"{URL}?timeout_seconds=3&max_event_bytes=9", timeout_seconds=4.0)
    options = transport.options
    assert (options.timeout_seconds, options.max_event_bytes) == (4.0, 9)
    assert (options.username, options.password) == ("ann", "s3/cret")
    assert ScriptTransport(URL, password="other").options.password == "other"


def test_an_unknown_option_is_told_the_nearest() -> None:
    """A misspelled option is refused when it is configured."""
    with pytest.raises(TypeError, match="'timeout_second' is not an option: did you mean"):
        ScriptTransport(f"{URL}?timeout_second=3")


def test_a_wrong_value_is_told() -> None:
    """A wrong value is refused with option and value."""
    with pytest.raises(ValueError, match="max_event_bytes='many' is not a whole number"):
        ScriptTransport(f"{URL}?max_event_bytes=many")


@pytest.mark.parametrize("password", [123456, "", b"123456"])
def test_a_wrong_password_option_is_not_shown(password: Any) -> None:
    """A password that is no text is refused without being shown."""
    with pytest.raises(ValueError, match=r"^password must be a str") as caught:
        ScriptTransport("script://host", password=password)
    assert "123456" not in str(caught.value)


def test_name_and_repr_have_no_secret() -> None:
    """A transport goes under its URL without user, password and query, or under its `name`."""
    transport = ScriptTransport(f"{URL}?timeout_seconds=3")
    assert repr(transport) == "<ScriptTransport script://host:1000/path>"
    assert "s3" not in repr(transport.options)
    assert ScriptTransport(f"{URL}?name=there").name == "there"


def test_several_hosts_are_refused_where_one_is_meant() -> None:
    """A broker that is reached at one address says so."""
    assert ScriptTransport(URL).only_host() == ("host", 1000)
    with pytest.raises(ValueError, match="write one host"):
        ScriptTransport("script://a,b").only_host()


def test_files_for_tls_without_tls_are_refused() -> None:
    """Who names an authority means TLS: a plain connection would be a surprise."""
    with pytest.raises(ValueError, match="add tls=true"):
        ScriptTransport(f"{URL}?tls_ca_file=ca.pem")


def test_tls_comes_with_the_scheme_or_the_option(tmp_path: Path) -> None:
    """Both check the server's certificate and name."""
    for transport in (ScriptTransport("scripts://host"), ScriptTransport(f"{URL}?tls=true")):
        assert transport.tls is not None
        assert transport.tls.check_hostname
    assert ScriptTransport(URL).tls is None


def test_files_for_tls_are_read_when_it_is_configured(tmp_path: Path) -> None:
    """A file that is missing, or no certificate, is refused at once."""
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    for option in ("tls_ca_file", "tls_cert_file"):
        for path in (wrong, tmp_path / "missing.pem"):
            with pytest.raises(ValueError, match=path.name):
                ScriptTransport("scripts://host", **{option: str(path)})


# Sending.


def test_the_connection_is_opened_by_the_first_event_and_kept() -> None:
    """Nothing is opened before it is needed, and then once."""

    async def send() -> None:
        transport = ScriptTransport()
        assert not transport.is_connected
        for line in (b"a", b"b"):
            assert await transport.send(line) is True
        assert transport.is_connected
        [client] = transport.clients
        assert client.lines == [b"a", b"b"]
        await transport.close()
        assert client.shut
        assert not transport.is_connected

    asyncio.run(send())


def test_objects_and_text_are_encoded() -> None:
    """`send` by itself takes what is no line too."""

    async def send() -> None:
        transport = ScriptTransport()
        await transport.send("ä")
        await transport.send({"n": 1})
        assert transport.clients[0].lines == ["ä".encode(), b'{"n":1}']
        await transport.close()

    asyncio.run(send())


def test_a_line_that_is_too_long_is_refused_without_the_server() -> None:
    """It is refused for good; the others of its batch are sent, and outcomes keep their places."""

    async def send() -> None:
        transport = ScriptTransport(max_event_bytes=3)
        [error] = await transport.send_batch(batch_of(b"long"))
        assert isinstance(error, TransportRejectedError)
        assert str(error) == "the line has 4 bytes, max_event_bytes is 3"
        assert transport.clients == []
        found = await transport.send_batch(batch_of(b"a", b"long", b"b"))
        assert [type(each) for each in found] == [type(None), TransportRejectedError, type(None)]
        assert transport.clients[0].lines == [b"a", b"b"]
        with pytest.raises(TransportRejectedError):
            await transport.send(b"long")
        await transport.close()

    asyncio.run(send())


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (Throttled("s3/cret s3%2Fcret"), TransportConnectionError),
        (TimeoutError("s3/cret"), TransportTimeoutError),
        (asyncio.TimeoutError("s3/cret"), TransportTimeoutError),
        (ConnectionResetError("s3/cret"), TransportConnectionError),
        (asyncio.CancelledError("s3/cret"), TransportConnectionError),
        (KeyError("s3/cret"), TransportError),
        (TransportRejectedError("too large"), TransportRejectedError),
    ],
)
def test_what_a_drivers_error_means(error: BaseException, meaning: type[Exception]) -> None:
    """The table first, then time-outs and OSErrors; all else is one event's. No secret is shown."""

    async def send() -> Exception | None:
        transport = ScriptTransport()

        async def answers(batch: Sequence[OutgoingEvent]) -> Outcomes:
            return [error]

        transport.answers = answers
        [outcome] = await transport.send_batch(batch_of(b"a"))
        await transport.close()
        return outcome

    outcome = asyncio.run(send())
    assert type(outcome) is meaning
    assert "s3" not in str(outcome)
    assert outcome is error or outcome.__cause__ is error


def test_one_error_that_befell_many_stays_one() -> None:
    """So the delivery counts it once."""

    async def send() -> None:
        transport = ScriptTransport()
        error = ConnectionResetError()

        async def answers(batch: Sequence[OutgoingEvent]) -> Outcomes:
            return [None, error, error]

        transport.answers = answers
        first, second, third = await transport.send_batch(batch_of(b"a", b"b", b"c"))
        assert first is None
        assert second is third is not None
        await transport.close()

    asyncio.run(send())


def test_a_drivers_error_may_be_anything() -> None:
    """An exception that cannot be hashed, as those that are dataclasses, is told like others."""

    class Unhashable(Exception):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise AssertionError

    async def send() -> None:
        transport = ScriptTransport()

        async def answers(batch: Sequence[OutgoingEvent]) -> Outcomes:
            return [Unhashable("a"), Unhashable("b")]

        transport.answers = answers
        found = await transport.send_batch(batch_of(b"a", b"b"))
        assert [str(error) for error in found] == ["Unhashable: a", "Unhashable: b"]
        await transport.close()

    asyncio.run(send())


@pytest.mark.parametrize(("error", "kept"), [(OSError(), False), (KeyError(), True)])
def test_a_lost_connection_is_not_used_again(error: Exception, kept: bool) -> None:
    """After an outcome that means the connection a new one is opened; one event's own keeps it."""

    async def send() -> None:
        transport = ScriptTransport()

        async def answers(batch: Sequence[OutgoingEvent]) -> Outcomes:
            return [error]

        transport.answers = answers
        await transport.send_batch(batch_of(b"a"))
        assert transport.is_connected is kept
        transport.answers = confirm
        await transport.send(b"b")
        assert len(transport.clients) == (1 if kept else 2)
        await transport.close()
        assert [client.shut for client in transport.clients] == [True] * len(transport.clients)

    asyncio.run(send())


def test_whatever_is_raised_ends_the_connection() -> None:
    """What state the driver is in is not known: the next attempt begins anew."""

    async def send() -> None:
        transport = ScriptTransport()
        transport.answers = failing(KeyError("x"))
        with pytest.raises(TransportError, match="KeyError: 'x'"):
            await transport.send(b"a")
        assert not transport.is_connected
        await transport.close()

    asyncio.run(send())


def test_nothing_takes_for_ever() -> None:
    """Connecting, sending and asking have their time each; it says which it was."""

    async def send() -> None:
        transport = ScriptTransport(timeout_seconds=0.02, connect_timeout_seconds=0.01)
        transport.opening = hang
        with pytest.raises(TransportTimeoutError, match=r"within 0\.01 seconds"):
            await transport.send(b"a")
        transport.opening, transport.answers, transport.asking = done, lambda batch: hang(), hang
        with pytest.raises(TransportTimeoutError, match=r"within 0\.02 seconds"):
            await transport.send(b"a")
        assert not transport.is_connected
        assert await transport.health_check() is False
        await transport.close()

    asyncio.run(send())


def test_a_cancelled_send_ends_the_connection() -> None:
    """Where the delivery's own time is over, the connection is given up too."""

    async def send() -> None:
        transport = ScriptTransport()
        transport.answers = lambda batch: hang()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(transport.send(b"a"), 0.01)
        assert not transport.is_connected
        await transport.close()
        assert transport.clients[0].shut

    asyncio.run(send())


def test_health_is_what_the_server_says() -> None:
    """It opens a connection where there is none; any failure is a no."""

    async def ask() -> None:
        transport = ScriptTransport()
        assert await transport.health_check() is True
        assert transport.is_connected
        transport.asking = failing(Throttled())
        assert await transport.health_check() is False
        transport.opening = failing(OSError())
        assert await transport.health_check() is False
        await transport.close()

    asyncio.run(ask())


# Whose connection it is.


def test_a_goodbye_that_hangs_or_fails_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """`close` waits a bounded time; what a driver raises there is of no interest."""
    monkeypatch.setattr(_remote, "SHUT_SECONDS", 0.01)

    async def close() -> None:
        for shutting in (hang, failing(OSError())):
            transport = ScriptTransport()
            transport.shutting = shutting
            await transport.send(b"a")
            await asyncio.wait_for(transport.close(), 30)
            assert not transport.is_connected

    asyncio.run(close())


def test_a_connection_of_a_loop_that_is_over_is_left() -> None:
    """It could not even be closed there; the next loop has its own."""
    transport = ScriptTransport()
    asyncio.run(transport.send(b"a"))
    asyncio.run(transport.send(b"b"))
    asyncio.run(transport.close())
    first, second = transport.clients
    assert (first.lines, second.lines) == ([b"a"], [b"b"])
    assert not first.shut


def test_a_child_leaves_its_parents_connection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fork the child opens its own and closes nothing: a goodbye would be the parent's."""

    async def both() -> None:
        transport = ScriptTransport()
        await transport.send(b"parent's")
        parent = os.getpid()
        monkeypatch.setattr(_remote.os, "getpid", lambda: parent + 1)
        await transport.send(b"child's")
        first, second = transport.clients
        assert (first.lines, second.lines) == ([b"parent's"], [b"child's"])
        await transport.close()
        assert (first.shut, second.shut) == (False, True)

    asyncio.run(both())


def test_another_loop_does_not_take_the_connection_away() -> None:
    """Who asks from the application's own loop gets a connection for that one question."""

    async def ask() -> None:
        transport = ScriptTransport()
        await transport.send(b"a")
        assert await asyncio.to_thread(asyncio.run, transport.health_check()) is True
        transport.asking = failing(OSError())
        assert await asyncio.to_thread(asyncio.run, transport.health_check()) is False
        first, *others = transport.clients
        assert [client.shut for client in others] == [True, True]
        assert transport.is_connected
        assert not first.shut
        await transport.close()

    asyncio.run(ask())


# Pieces.


def test_a_batch_is_cut_by_count_and_by_bytes() -> None:
    """A request has so many events and bytes at most; one that is larger goes alone."""
    pieces: list[list[bytes]] = []

    async def send(piece: Sequence[OutgoingEvent]) -> Outcomes:
        pieces.append([event.line for event in piece])
        return [None] * len(piece)

    in_pieces = ScriptTransport()._in_pieces
    batch = batch_of(b"1", b"2", b"3", b"44", b"55", b"666666", b"7")
    assert asyncio.run(in_pieces(batch, 2, 5, send)) == [None] * 7
    assert pieces == [[b"1", b"2"], [b"3", b"44"], [b"55"], [b"666666"], [b"7"]]
    pieces.clear()
    asyncio.run(in_pieces(batch[:3], 9, 5, send, extra_bytes=2))
    assert pieces == [[b"1"], [b"2"], [b"3"]]


@pytest.mark.parametrize(
    ("error", "meaning"), [(OSError("x"), "OSError: x"), (KeyError("x"), "KeyError: 'x'")]
)
def test_after_a_piece_that_failed_none_is_sent(error: Exception, meaning: str) -> None:
    """Its error befalls all that is left, as nobody's own fault; what was confirmed stays so."""

    async def send(piece: Sequence[OutgoingEvent]) -> Outcomes:
        if piece[0].line == b"2":
            raise error
        return [None] * len(piece)

    first, *others = asyncio.run(
        ScriptTransport()._in_pieces(batch_of(b"1", b"2", b"3"), 1, 9, send)
    )
    assert first is None
    assert others[0] is others[1]
    assert isinstance(others[0], TransportConnectionError)
    assert (str(others[0]), others[0].__cause__) == (meaning, error)


def test_the_only_event_of_a_batch_has_its_own_error() -> None:
    """Then it is known whose fault it is."""
    send = failing(KeyError("x"))
    [outcome] = asyncio.run(ScriptTransport()._in_pieces(batch_of(b"1"), 1, 9, send))
    assert type(outcome) is TransportError
