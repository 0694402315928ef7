"""What a Service Bus namespace does for senders and session receivers, over AMQP 1.0.

`python servicebus_peer.py folder port policy key`. An entity is a file in the folder: its messages,
one a line (the encoded message in base64), written before they are acknowledged. So what is
acknowledged survives SIGKILL. A file `name.refusal` beside it has an error condition and bytes: a
transfer that has them is refused. What a receiver has settled is not kept: each receiver that comes
begins at the first message.

A login is a token that is signed with the key, or the key itself as what an identity service gave.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

from proton import Condition, Data, Delivery, Message, symbol
from proton.handlers import FlowController, Handshaker
from proton.reactor import Container

MOST_BYTES = 256 * 1024
"""A message or a batch, in the standard tier."""
DATA_SECTION = 0x75
SIGNED = "SharedAccessSignature "


class Peer(Handshaker):
    """Answers one port.

    Args:
        folder: With the entities.
        port: On loopback.
        policy: The name that is known.
        key: Its key.
    """

    def __init__(self, folder: Path, port: int, policy: str, key: str) -> None:
        super().__init__()
        self.handlers = [FlowController(1000)]
        self._folder, self._port, self._policy, self._key = folder, port, policy, key
        self._replies: dict[str, Any] = {}
        """The link for answers about tokens, by connection."""
        self._allowed: set[tuple[str, str]] = set()
        """Connections and the entities that each has shown a token for."""
        self._readers: dict[Any, list[Any]] = {}
        """Links to receivers: entity, session, and how many bytes of its file have been read."""
        self._tag = 0

    def on_reactor_init(self, event: Any) -> None:
        """Listen; cut off what a kill has left half written."""
        for path in self._folder.iterdir():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        event.container.listen(f"127.0.0.1:{self._port}")

    def on_link_remote_open(self, event: Any) -> None:
        """Attach a link; refuse it at once where there is no such entity or no token for it."""
        link = event.link
        address = (link.remote_target if link.is_receiver else link.remote_source).address
        connection = event.connection.remote_container
        refusal = None
        if address == "$cbs":
            if link.is_sender:
                self._replies[connection] = link
        elif (connection, _entity(address)) not in self._allowed:
            refusal = "amqp:unauthorized-access"
        elif not self._path(address).exists():
            refusal = "amqp:not-found"
        elif link.is_sender:
            link.properties = {symbol("com.microsoft:locked-until-utc"): 0}
            self._readers[link] = [address, _session_wanted(link), 0]
        if not refusal:
            # A refused link is attached to nothing, and detached.
            link.source.copy(link.remote_source)
            link.target.copy(link.remote_target)
            link.max_message_size = MOST_BYTES
        link.open()
        if refusal:
            link.condition = Condition(refusal, f"{address} is refused", {symbol("peer"): "test"})
            link.close()

    def on_delivery(self, event: Any) -> None:
        """Take what has come whole; let go of what a receiver has settled."""
        delivery, link = event.delivery, event.link
        if link.is_sender:
            if delivery.updated:
                delivery.update(delivery.remote_state or Delivery.ACCEPTED)
                delivery.settle()
            return
        if not delivery.readable or delivery.partial:
            return
        data = link.recv(delivery.pending)
        link.advance()
        address = link.remote_target.address
        refusal = None
        if address == "$cbs":
            self._check_token(event.connection.remote_container, data)
        elif refusal := self._refusal(address, data):
            # The driver cannot read a condition without a map.
            text = "Please wait 7 seconds and try again."
            delivery.local.condition = Condition(refusal, text, {symbol("peer"): "test"})
        else:
            self._store(address, data)
        delivery.update(Delivery.REJECTED if refusal else Delivery.ACCEPTED)
        delivery.settle()

    def on_link_flow(self, event: Any) -> None:
        """Send a receiver what it has asked for."""
        if event.link in self._readers:
            self._serve(event.link)

    def on_transport_closed(self, event: Any) -> None:
        """Forget a connection."""
        connection = event.connection.remote_container
        self._replies.pop(connection, None)
        self._allowed = {each for each in self._allowed if each[0] != connection}
        for link in [each for each in self._readers if each.connection == event.connection]:
            del self._readers[link]

    def _path(self, address: str) -> Path:
        return self._folder / urllib.parse.quote(_entity(address), safe="")

    def _check_token(self, connection: str, data: bytes) -> None:
        """Answer `put-token`."""
        request = _decoded(data)
        # Its type says "jwt" of both, as this driver has it.
        token = str(request.body)
        good = self._is_signed(token) if token.startswith(SIGNED) else token == self._key
        if good:
            self._allowed.add((connection, _entity(request.properties["name"])))
        text = "Accepted" if good else "InvalidSignature: The token has an invalid signature."
        answer = {"status-code": 202 if good else 401, "status-description": text}
        reply = Message(correlation_id=request.id, properties=answer)
        self._send(self._replies[connection], reply.encode())

    def _is_signed(self, token: str) -> bool:
        fields = token.removeprefix(SIGNED).split("&")
        parts = dict(each.split("=", 1) for each in fields)
        signed = f"{parts['sr']}\n{parts['se']}".encode()
        digest = hmac.digest(self._key.encode(), signed, hashlib.sha256)
        return (
            parts["skn"] == self._policy
            and hmac.compare_digest(base64.b64decode(urllib.parse.unquote(parts["sig"])), digest)
            and float(parts["se"]) > time.time()
        )

    def _refusal(self, address: str, data: bytes) -> str | None:
        if len(data) > MOST_BYTES:
            return "amqp:link:message-size-exceeded"
        path = self._path(address)
        if not path.exists():
            return "amqp:not-found"
        rule = path.with_name(f"{path.name}.refusal")
        condition, _, part = rule.read_bytes().partition(b" ") if rule.exists() else (b"", b"", b"")
        return condition.decode() if condition and part.strip() in data else None

    def _store(self, address: str, data: bytes) -> None:
        lines = b"".join(base64.b64encode(each) + b"\n" for each in _messages(data))
        with self._path(address).open("ab", buffering=0) as file:
            file.write(lines)
        for link in list(self._readers):
            self._serve(link)

    def _serve(self, link: Any) -> None:
        address, session, position = self._readers[link]
        with self._path(address).open("rb") as file:
            file.seek(position)
            while link.credit > 0 and (line := file.readline()):
                position = file.tell()
                data = base64.b64decode(line)
                if session in (None, _decoded(data).group_id):
                    self._send(link, data)
        self._readers[link][2] = position

    def _send(self, link: Any, data: bytes) -> None:
        self._tag += 1
        link.delivery(str(self._tag).zfill(32)[-16:])
        link.send(data)
        link.advance()


def _entity(address: str) -> str:
    """Return the entity of an address, which may be a whole URL."""
    return urllib.parse.unquote(urllib.parse.urlsplit(address).path.strip("/"))


def _session_wanted(link: Any) -> str | None:
    filters = link.remote_source.filter
    filters.rewind()
    wanted = filters.get_object() if filters.next() else {}
    value = wanted.get("com.microsoft:session-filter")
    return getattr(value, "value", value)


def _messages(data: bytes) -> list[bytes]:
    """Return the messages of a transfer: itself, or those in the data sections of a batch."""
    sections, rest = [], data
    while rest:
        section = Data()
        rest = rest[section.decode(rest) :]
        section.next()
        described = section.get_py_described()
        if described.descriptor == DATA_SECTION:
            sections.append(bytes(described.value))
    # A message begins with the constructor of a described value, a line of JSON with a brace.
    return sections if all(each[:1] == b"\0" for each in sections) else [data]


def _decoded(data: bytes) -> Message:
    message = Message()
    message.decode(data)
    return message


if __name__ == "__main__":
    Container(Peer(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])).run()
