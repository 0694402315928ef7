"""URLs of transports: how they are read, what they hide, which class they name."""

from __future__ import annotations

import configparser
import importlib
import logging.config
import re
import sys
import textwrap
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventlog_handler import EventSessionLogger
from eventlog_handler.transports import SCHEMES, named_transports
from eventlog_handler.transports._url import (
    Template,
    escape_token,
    header_text,
    parse_options,
    parse_url,
    within,
)
from eventlog_handler.transports.redis import RedisTransport
from eventlog_handler.typing import OutgoingEvent
from tests.transports.servers import encoded

PORTS = {"bus": 1000, "buss": 2000, "plain": 0}
TEXT = st.text(min_size=1).filter(lambda text: not re.search("[\ud800-\udfff]", text))


def event(session_id: str = "chat-42", type: str = "step") -> OutgoingEvent:  # noqa: A002
    """Return an event of a session."""
    return OutgoingEvent(b"{}", "id", session_id, type, "now")


def test_all_parts_of_a_url() -> None:
    """Scheme, user, password, hosts, path, query and fragment are told apart."""
    found = parse_url("BUS://ann:pa%2Fss@a:1,b,[::1]:3/some/path%20x?o=1&p=2#f=3", PORTS)
    assert found.scheme == "bus"
    assert (found.username, found.password) == ("ann", "pa/ss")
    assert found.hosts == (("a", 1), ("b", 1000), ("::1", 3))
    assert found.path == "some/path x"
    assert (found.query, found.fragment) == ("o=1&p=2", "f=3")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("bus://ann:secret@host/path?o=secret#secret", "bus://host:1000/path"),
        ("buss://:secret@host:7", "buss://host:7"),
        ("plain://host/", "plain://host"),
        ("plain://[::1]:4/x", "plain://[::1]:4/x"),
        ("bus://a,b/x", "bus://a:1000,b:1000/x"),
    ],
)
def test_what_is_shown_of_a_url_has_no_secret(url: str, shown: str) -> None:
    """Only scheme, hosts with their ports, and path are shown."""
    assert parse_url(url, PORTS).shown == shown


@given(TEXT, TEXT)
def test_user_and_password_may_be_anything(username: str, password: str) -> None:
    """Percent-encoded, any text can be a user or a password."""
    found = parse_url(f"bus://{encoded(username)}:{encoded(password)}@host", PORTS)
    assert (found.username, found.password, found.hosts) == (username, password, (("host", 1000),))


@pytest.mark.parametrize(
    "url",
    [
        "bus://",
        "bus://host:0",
        "bus://host:65536",
        "bus://host:port",
        "bus://::1",
        "bus://[::1",
        "bus://a,,b",
        "bus://ann:s3cret/x@host",
        "bus://ann:s3cret[@host",
        "bus://ann:s3cret\u2100@host",
    ],
)
def test_a_url_that_cannot_be_read_is_not_shown(url: str) -> None:
    """The message says what to write, and quotes nothing that may be secret."""
    with pytest.raises(ValueError, match=r"^the URL bus://… cannot be read[;:]") as caught:
        parse_url(url, PORTS)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_a_scheme_of_another_transport_is_refused() -> None:
    """A class takes its own schemes only."""
    with pytest.raises(ValueError, match=r"'kafka' is no scheme .* redis:// or rediss://"):
        RedisTransport("kafka://host")


def test_options_are_decoded() -> None:
    """An option's value is percent-encoded; a plus is a plus."""
    assert parse_options("a=1%262&b=x+y=z&") == {"a": "1&2", "b": "x+y=z"}


@pytest.mark.parametrize("text", ["a", "a=1&a=2"])
def test_an_option_has_one_value(text: str) -> None:
    """An option without a value, or with two, is refused by its name."""
    with pytest.raises(ValueError, match="option 'a' wants one value: a=…"):
        parse_options(text)


def test_a_template_is_filled_in() -> None:
    """`{session_id}` and `{type}` stand for the event's, escaped as asked; doubled braces stay."""
    template = Template("stream", "a.{session_id}.{type}{{}}")
    assert template.fill(event("x.y")) == "a.x.y.step{}"
    assert template.fill(event("x.y", "*"), escape_token) == "a.x%2Ey.%2A{}"


@pytest.mark.parametrize(
    "pattern", ["{id}", "{}", "{session_id.x}", "{session_id:>9999999}", "{type!r}"]
)
def test_a_template_knows_two_fields(pattern: str) -> None:
    """Anything else in braces is refused where it is configured."""
    with pytest.raises(ValueError, match=r"^stream=.* there are {session_id} and {type}"):
        Template("stream", pattern)


def test_a_template_that_cannot_be_read() -> None:
    """An open brace is refused with its reason."""
    with pytest.raises(ValueError, match=r"^stream='{' cannot be read"):
        Template("stream", "{")


@given(st.text())
def test_tokens_and_headers_are_safe_and_can_be_read_back(text: str) -> None:
    """A token has no separator, a header's value is printable ASCII; both can be decoded."""
    token, value = escape_token(text), header_text(text)
    assert re.fullmatch(r"[A-Za-z0-9_~%-]*", token)
    assert re.fullmatch(r"([!-~]([ -~]*[!-~])?)?", value)
    for found in (token, value):
        assert urllib.parse.unquote(found, errors="surrogatepass") == text


@given(st.text("ab%~", max_size=140), st.text("ab%~", max_size=140))
def test_a_text_is_cut_and_stays_its_own(one: str, other: str) -> None:
    """Below the limit a text stays; above, it has just so many characters, and a digest."""
    found = within(100, one)
    assert found == one or (len(one) >= 100 and len(found) == 100)
    assert (found == within(100, other)) == (one == other)


def test_a_text_may_hold_several_urls() -> None:
    """URLs are separated by white space, as a variable or a YAML block has them."""
    found = named_transports("redis://a/1\n  rediss://:pw@b?stream=x&name=there ")
    assert list(found) == ["redis://a:6379/1?stream=eventlog", "there"]
    assert [type(each) for each in found.values()] == [RedisTransport] * 2


def test_a_list_may_mix_urls_and_transports() -> None:
    """A list of a `dictConfig` may hold URLs, objects, and classes by `ext://`."""
    config = logging.config.ConvertingList(["ext://eventlog_handler.NullTransport", "redis://h"])
    config.configurator = logging.config.BaseConfigurator({})
    found = named_transports(config)
    assert list(found) == ["NullTransport", "redis://h:6379?stream=eventlog"]


def test_two_urls_of_one_destination_are_refused() -> None:
    """Their offsets could not be told apart."""
    with pytest.raises(ValueError, match="two transports named 'redis://h:6379"):
        named_transports(["redis://h", "redis://:other@h"])


@pytest.mark.parametrize(
    ("url", "hint"),
    [("redsi://h", "did you mean redis://?"), ("zeromq://:s3cret@h", "there are ")],
)
def test_a_misspelled_scheme_is_told_the_nearest(url: str, hint: str) -> None:
    """A scheme that nobody offers is refused, with what there is."""
    with pytest.raises(ValueError, match=re.escape(hint)) as caught:
        named_transports(url)
    assert "s3cret" not in str(caught.value)


def test_a_missing_driver_says_what_to_type(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """Without its driver a URL is refused when it is configured, with the command."""
    monkeypatch.delitem(sys.modules, "eventlog_handler.transports.redis")
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match=r"pip install 'eventlog-handler\[redis\]'"):
        EventSessionLogger(base, downstream_transport="redis://h")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_has_a_class_that_knows_it(scheme: str) -> None:
    """The table of schemes and the classes' own agree."""
    module, _, name = SCHEMES[scheme].partition(":")
    found = getattr(importlib.import_module(f"eventlog_handler.transports.{module}"), name)
    assert scheme in found.ports


def install(folder: Path, name: str, entry_points: str) -> None:
    """Have a package with entry points in a folder, as pip would."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


def test_another_package_offers_a_scheme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example's lines of setup.cfg, installed, make its scheme one of those there are."""
    example = Path(__file__).parents[2] / "examples" / "custom_transport.py"
    (tmp_path / "custom_transport.py").write_text(example.read_text())
    config = configparser.ConfigParser()
    config.read_string(
        textwrap.dedent(re.findall(r"\n\n(    \[.*?)\n\n", example.read_text(), re.S)[0])
    )
    [(group, line)] = config["options.entry_points"].items()
    install(tmp_path, "custom", f"[{group}]{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    [(name, transport)] = named_transports("lines://host:9000").items()
    assert (name, type(transport).__name__) == ("lines://host:9000", "LineTransport")
    with pytest.raises(ValueError, match="write lines://host:port"):
        named_transports("lines://host")


def test_two_packages_with_one_scheme_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which of them is meant is not guessed."""
    for name in ("one", "two"):
        install(tmp_path, name, f"[eventlog_handler.transports]\nlines = {name}:Transport\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="lines:// is offered by one:Transport, two:Transport"):
        named_transports("lines://host:9000")
