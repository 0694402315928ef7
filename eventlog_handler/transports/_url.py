"""URLs of transports, and the names that they hold: parsed, filled in, escaped. Pure."""

from __future__ import annotations

import hashlib
import re
import string
import urllib.parse
from collections.abc import Callable, Mapping
from typing import NamedTuple

from eventlog_handler.typing import OutgoingEvent


class Address(NamedTuple):
    """A URL taken apart. Only `shown` may be shown."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    """Without its leading slash, decoded."""
    username: str | None
    password: str | None
    query: str
    fragment: str

    @property
    def shown(self) -> str:
        """Scheme, hosts and path, which hold no secret."""
        hosts = ",".join(_host_text(*each) for each in self.hosts)
        return f"{self.scheme}://{hosts}{'/' if self.path else ''}{self.path}"


def _host_text(host: str, port: int) -> str:
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port}" if port else host


def parse_url(url: str, ports: Mapping[str, int]) -> Address:
    """Take a transport's URL apart (RFC 3986, but for several hosts, separated by commas).

    Args:
        url: `scheme://user:password@host:port,host:port/path?option=value`.
        ports: The schemes that it may have, and the port of each where the URL has none.

    Raises:
        ValueError: It cannot be read; says why, without showing what may be secret.
    """
    scheme, _, rest = url.partition("://")
    if scheme.lower() not in ports:
        known = " or ".join(f"{each}://" for each in ports)
        raise ValueError(f"{scheme[:20]!r} is no scheme of this transport; write {known}…")
    try:
        parts = urllib.parse.urlsplit(f"//{rest}")
        if "@" in parts.path:
            raise ValueError
    except ValueError:
        # Not what urllib says of it: that may quote the password.
        raise ValueError(
            f"the URL {scheme}://… cannot be read; percent-encode what is no letter or digit in "
            "user and password"
        ) from None
    userinfo, _, netloc = parts.netloc.rpartition("@")
    username, _, password = userinfo.partition(":")
    unquote = urllib.parse.unquote
    return Address(
        scheme.lower(),
        tuple(_host(scheme, each, ports[scheme.lower()]) for each in netloc.split(",")),
        unquote(parts.path[1:]),
        unquote(username) or None,
        unquote(password) or None,
        parts.query,
        parts.fragment,
    )


def _host(scheme: str, text: str, port: int) -> tuple[str, int]:
    found = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?", text)
    if not found or not 0 < int(found[2] or 1) < 65536:
        raise ValueError(
            f"the URL {scheme}://… cannot be read: write host or host:port, several with commas, "
            "an IPv6 address in brackets, a port from 1 to 65535"
        )
    return found[1].strip("[]"), int(found[2] or port)


def parse_options(text: str) -> dict[str, str]:
    """Return the options of a URL's query or fragment: `option=value&option=value`.

    Raises:
        ValueError: One has no value, or stands there twice.
    """
    pairs = [each.partition("=") for each in text.split("&") if each]
    options = {name: urllib.parse.unquote(value) for name, _, value in pairs}
    for name, equals, _ in pairs:
        if not equals or [each for each, _, _ in pairs].count(name) > 1:
            raise ValueError(f"the URL's option {name!r} wants one value: {name}=…")
    return options


class Template:
    """A destination's name in which `{session_id}` and `{type}` may stand.

    Never `str.format`: `{type.__class__}` leaks, `{type:>999999999}` is a bomb.

    Args:
        option: Whose value it is, for messages.
        pattern: The name; doubled braces are braces.

    Raises:
        ValueError: It has another field.
    """

    def __init__(self, option: str, pattern: str) -> None:
        try:
            self._parts = list(string.Formatter().parse(pattern))
        except ValueError as error:
            raise ValueError(f"{option}={pattern!r} cannot be read: {error}") from None
        for _, field, spec, conversion in self._parts:
            if field not in (None, "session_id", "type") or spec or conversion:
                raise ValueError(
                    f"{option}={pattern!r} has the field {field!r}; there are {{session_id}} and "
                    "{type}"
                )

    def fill(self, event: OutgoingEvent, escape: Callable[[str], str] = str) -> str:
        """Return the name for an event.

        Args:
            event: Whose session and type go in.
            escape: Makes of these what the far side takes as part of a name.
        """
        return "".join(
            literal + (escape(getattr(event, field)) if field else "")
            for literal, field, _, _ in self._parts
        )


def escape_token(text: str) -> str:
    """Return a text as one token of a name: letters, digits, `_-~`, all else percent-encoded."""
    return urllib.parse.quote(text, safe="", errors="surrogatepass").replace(".", "%2E")


def header_text(text: str) -> str:
    """Return a text as a header's value: printable ASCII; `%`, outer spaces, all else encoded."""
    kept = " !\"#$&'()*+,/:;<=>?@[\\]^`{|}"
    value = urllib.parse.quote(text, safe=kept, errors="surrogatepass")
    return re.sub("^ +| +$", lambda spaces: "%20" * len(spaces[0]), value)


def within(most: int, text: str) -> str:
    """Return a text (ASCII) that is no longer than a far side takes; no two become the same.

    Args:
        most: Characters. A shorter text stays; of a longer one it has exactly so many: its
            beginning, `~`, and the SHA-256 of the whole.
        text: What may come from outside, and have any length.
    """
    if len(text) < most:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text[: most - 1 - len(digest)]}~{digest}"
