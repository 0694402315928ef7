"""Session ids and patterns become names that stay below the base directory."""

from __future__ import annotations

import hashlib
import os
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eventlog_handler._paths import SessionPaths, name_to_session, session_to_name

BASE = Path("/base/sessions")
NOW = datetime(2026, 11, 22, 6, 31, 56, 123456, tzinfo=timezone.utc)
DEVICES = {"con", "prn", "aux", "nul"} | {f"{d}{n}" for d in ("com", "lpt") for n in range(10)}
SPECIAL = [
    "",
    ".",
    "..",
    "...",
    "../..",
    "/",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:\\x",
    "con",
    "CON",
    "con.txt",
    "con.",
    "Lpt9.x",
    "-rf",
    "~",
    "%",
    "%41",
    "A",
    "a\0b",
    "\n",
    "\ud800",
    "\ud800\udc00",
    "\U00010000",
    "\udcff",
    "é",
    "e\u0301",
    ".eventlog",
    "a" * 128,
    "a" * 129,
    "é" * 22,
    "x" * 10_000,
]
any_text = st.one_of(
    st.text(alphabet=st.characters()),
    st.sampled_from(SPECIAL),
    st.text(alphabet="./-%~\\conCON1 a\ud800\udc00", max_size=12),
    st.builds(lambda text, n: text * n, st.text(alphabet=st.characters(), min_size=1), st.just(60)),
)


def is_safe(name: str) -> bool:
    """Return whether every file system takes `name` as one component that is nothing special."""
    return (
        re.fullmatch(r"[A-Za-z0-9_.%~-]{1,255}", name) is not None
        and name[0] not in ".-"
        and name[-1] != "."
        and name.split(".")[0].lower() not in DEVICES
    )


def paths(
    directory: Any = "{session_id}", unknown: Any = "unknown_{uuid}", file: Any = "%Y%m%d_%H%M%S"
) -> SessionPaths:
    """Return the paths of these patterns, with a known uuid."""
    return SessionPaths(BASE, directory, unknown, file, ".jsonl", "0000-1111")


@settings(max_examples=2000, deadline=None)
@given(session_id=any_text)
def test_any_id_becomes_one_safe_component_inside_the_base(session_id: str) -> None:
    """No session id leaves the base directory, or means anything special to a file system."""
    name = session_to_name(session_id)
    assert is_safe(name)
    assert len(name) <= 128
    assert os.path.dirname(os.path.normpath(BASE / name)) == str(BASE)


@settings(max_examples=2000, deadline=None)
@given(first=any_text, second=any_text)
@example(first="\ud800\udc00", second="\U00010000")
@example(first="a/b", second="a%2Fb")
@example(first="", second="%")
@example(first="a" * 129, second="a" * 130)
def test_two_ids_never_share_a_name(first: str, second: str) -> None:
    """Different sessions have different directories."""
    assert (session_to_name(first) == session_to_name(second)) == (first == second)


@settings(max_examples=2000, deadline=None)
@given(session_id=any_text)
def test_short_name_can_be_read_back(session_id: str) -> None:
    """A name tells its session id, unless the id was too long; then it tells none."""
    name = session_to_name(session_id)
    assert name_to_session(name) == (None if "~" in name else session_id)


@settings(max_examples=2000, deadline=None)
@given(name=any_text)
def test_foreign_name_is_never_taken_for_a_session(name: str) -> None:
    """A directory's name is read as an id only if that id would be given this very name."""
    found = name_to_session(name)
    assert found is None or session_to_name(found) == name


@pytest.mark.parametrize(
    ("session_id", "name"),
    [
        ("abc_1.2-3", "abc_1.2-3"),
        ("", "%"),
        ("%", "%25"),
        (".", "%2E"),
        ("..", "%2E%2E"),
        ("...", "%2E.%2E"),
        (".hidden", "%2Ehidden"),
        ("-rf", "%2Drf"),
        ("a.", "a%2E"),
        ("a/b", "a%2Fb"),
        ("a b", "a%20b"),
        ("é", "%C3%A9"),
        ("\ud800", "%ED%A0%80"),
        ("~", "%7E"),
        ("con", "%63on"),
        ("CON.txt", "%43ON.txt"),
        ("com1", "%63om1"),
        ("console", "console"),
        ("a" * 128, "a" * 128),
        ("a" * 129, "a" * 63 + "~" + hashlib.sha256(b"a" * 129).hexdigest()),
        ("é" * 22, ("%C3%A9" * 22)[:63] + "~" + hashlib.sha256("é".encode() * 22).hexdigest()),
    ],
)
def test_name_of_a_session(session_id: str, name: str) -> None:
    """Letters, digits and `_.-` stay; the rest is percent-encoded; long names end in a hash."""
    assert session_to_name(session_id) == name


@pytest.mark.parametrize(
    "name", ["", "%41", "%2f", "a%", "a b", "con", ".x", "%FF", "a~b", "é", "a\n", "a" * 129]
)
def test_name_that_is_not_ours_tells_no_session(name: str) -> None:
    """A name that no session would get is not read as one."""
    assert name_to_session(name) is None


fragments = st.sampled_from(
    [
        *("{session_id}", "{uuid}", "{", "}", "{{", "}}", "{}", "{0}", "{session_id.__class__}"),
        *("{session_id!r}", "{session_id:>999999999}", "{uuid:9}", "/", "//", "..", ".", "~", "%"),
        *("%Y", "%d", "%%", "%Q", "%s", "%z", "%9999d", "%c", "%x", "%-d", "%:z", "\\", "\0", "\n"),
        *("con", "nul.", "-", " ", "a", "\ud800", "é", "x" * 200),
    ]
)
pieces = st.lists(fragments, max_size=5).map("".join)
patterns = st.one_of(
    pieces,
    st.tuples(pieces, st.sampled_from(["{session_id}", "{uuid}", "%Y"]), pieces).map("".join),
    st.text(alphabet=st.characters()),
    st.text(alphabet=st.characters()).map(lambda text: f"{text}{{session_id}}"),
    st.one_of(st.none(), st.integers(), st.binary()),
)


@settings(max_examples=2000, deadline=None)
@given(pattern=patterns, session_id=any_text)
def test_any_directory_pattern_is_refused_or_stays_inside(pattern: Any, session_id: str) -> None:
    """Whatever stands in `session_directory_pattern`, no session's directory leaves the base."""
    try:
        made = paths(directory=pattern)
    except (ValueError, TypeError):
        return
    for levels in (made.directory(session_id), made.directory(None)):
        assert all(is_safe(level) for level in levels)
        assert Path(os.path.normpath(BASE.joinpath(*levels))).relative_to(BASE).parts == levels


@settings(max_examples=2000, deadline=None)
@given(pattern=patterns)
def test_any_unknown_pattern_is_refused_or_stays_inside(pattern: Any) -> None:
    """Whatever stands in `unknown_session_pattern`, it names one directory below the base."""
    try:
        made = paths(unknown=pattern)
    except (ValueError, TypeError):
        return
    (name,) = made.directory(None)
    assert is_safe(name)
    assert os.path.dirname(os.path.normpath(BASE / name)) == str(BASE)


@settings(max_examples=2000, deadline=None)
@given(pattern=patterns, taken=st.integers(0, 10**6))
def test_any_file_pattern_is_refused_or_stays_inside(pattern: Any, taken: int) -> None:
    """Whatever stands in `file_naming_pattern`, it names one file in the session's directory."""
    try:
        made = paths(file=pattern)
    except (ValueError, TypeError):
        return
    name = made.file_name(NOW, taken)
    assert is_safe(name)
    assert name.endswith(".jsonl")
    assert os.path.dirname(os.path.normpath(BASE / name)) == str(BASE)


@pytest.mark.parametrize(
    ("pattern", "levels"),
    [
        ("{session_id}", ("a%2Fb",)),
        ("{session_id:}", ("a%2Fb",)),
        ("prod/agents/{session_id}", ("prod", "agents", "a%2Fb")),
        ("s-{session_id}.d", ("s-a%2Fb.d",)),
        ("{{{session_id}}}", ("%7Ba%2Fb%7D",)),
        ("{session_id}{session_id}", ("a%2Fba%2Fb",)),
    ],
)
def test_directory_of_a_session(pattern: str, levels: tuple[str, ...]) -> None:
    """`/` makes levels, and the id stands, encoded, wherever `{session_id}` does."""
    assert paths(directory=pattern).directory("a/b") == levels


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("unknown_{uuid}", "unknown_0000-1111"), ("none", "none"), ("..", "%2E%2E"), ("a/b", "a%2Fb")],
)
def test_directory_without_a_session(pattern: str, name: str) -> None:
    """Events without a session go to one directory, beside those of the sessions."""
    assert paths("top/{session_id}", pattern).directory(None) == ("top", name)


def test_id_of_unknown_sessions_is_the_filled_pattern() -> None:
    """The id that unknown sessions go under is known before its directory exists."""
    assert paths(unknown="none/{uuid}").unknown == "none/0000-1111"


@pytest.mark.parametrize(
    ("taken", "name"), [(0, "20261122_063156.jsonl"), (2, "20261122_063156-2.jsonl")]
)
def test_file_name_is_the_time_and_a_number_where_it_is_taken(taken: int, name: str) -> None:
    """A name that another writer took is followed by a number."""
    assert paths().file_name(NOW, taken) == name


def test_file_name_is_encoded() -> None:
    """What strftime renders passes the same encoding as a session's name."""
    assert paths(file="%H:%M").file_name(NOW) == "06%3A31.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"directory": "{agent}/{session_id}"},
            "session_directory_pattern='{agent}/{session_id}' has the level '{agent}': use "
            "letters, digits, '_', '-', '.'; no leading dot",
        ),
        (
            {"directory": "../{session_id}"},
            "session_directory_pattern='../{session_id}' has the level '..': use letters, "
            "digits, '_', '-', '.'; no leading dot",
        ),
        (
            {"directory": "/{session_id}"},
            "session_directory_pattern='/{session_id}' has the level '': use letters, digits, "
            "'_', '-', '.'; no leading dot",
        ),
        (
            {"directory": "%/{session_id}"},
            "session_directory_pattern='%/{session_id}' has the level '%': use letters, digits, "
            "'_', '-', '.'; no leading dot",
        ),
        (
            {"directory": "{session_id}/logs"},
            "session_directory_pattern='{session_id}/logs' lacks {session_id} in its last level: "
            "sessions would share a directory",
        ),
    ],
)
def test_directory_pattern_is_refused(options: dict[str, str], message: str) -> None:
    """A pattern that mixes sessions or leaves the base is refused, and the message says why."""
    with pytest.raises(ValueError, match="_pattern=") as caught:
        paths(**options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "pattern",
    ["{session_id.__class__}", "{session_id!r}", "{session_id:>999999999}", "{}", "{uuid}"],
)
def test_field_that_is_not_the_documented_one_is_refused(pattern: str) -> None:
    """Only the bare field is allowed: attributes leak, and widths are bombs."""
    with pytest.raises(ValueError, match="_pattern=") as caught:
        paths(directory=pattern)
    field = re.fullmatch(r"\{([^!:}]*).*", pattern)
    assert field is not None
    assert str(caught.value) == (
        f"session_directory_pattern={pattern!r} has the field {field[1]!r}; write {{session_id}}, "
        "which is the only one"
    )


def test_unbalanced_brace_is_refused() -> None:
    """A pattern that cannot be parsed is refused with what the parser says."""
    with pytest.raises(ValueError, match="_pattern=") as caught:
        paths(directory="{session_id")
    assert str(caught.value) == (
        "session_directory_pattern='{session_id' cannot be read: expected '}' before end of string"
    )


def test_message_tells_the_whole_pattern() -> None:
    """Of a pattern with levels the message repeats all, as it stands in the configuration."""
    with pytest.raises(ValueError, match="_pattern=") as caught:
        paths(directory="prod/{sesion_id}")
    assert str(caught.value) == (
        "session_directory_pattern='prod/{sesion_id}' has the field 'sesion_id'; "
        "write {session_id}, which is the only one"
    )


def test_empty_unknown_pattern_is_refused() -> None:
    """Events without a session need a directory's name."""
    with pytest.raises(ValueError, match="_pattern=") as caught:
        paths(unknown="")
    assert str(caught.value) == "unknown_session_pattern='' is empty; write 'unknown_{uuid}'"


def test_unknown_pattern_has_only_the_field_uuid() -> None:
    """There is no session id to fill in where none is known."""
    with pytest.raises(ValueError, match="_pattern=") as caught:
        paths(unknown="{session_id}")
    assert str(caught.value) == (
        "unknown_session_pattern='{session_id}' has the field 'session_id'; write {uuid}, which "
        "is the only one"
    )


@pytest.mark.parametrize("pattern", ["", "a/b", "a\0b"])
def test_file_pattern_names_a_file(pattern: str) -> None:
    """A file's pattern is not empty and holds no separator."""
    with pytest.raises(ValueError, match="_pattern=") as caught:
        paths(file=pattern)
    assert str(caught.value) == (
        f"file_naming_pattern={pattern!r} must be a file's name: not empty, no '/', no NUL"
    )


def test_file_pattern_that_strftime_refuses_is_refused() -> None:
    """A lone surrogate cannot be a file's name, and the message says which option has it."""
    with pytest.raises(ValueError, match="_pattern=") as caught:
        paths(file="\ud800")
    assert str(caught.value).startswith("file_naming_pattern='\\ud800' is refused by strftime: ")


@pytest.mark.parametrize(
    ("argument", "option"),
    [
        ("directory", "session_directory_pattern"),
        ("unknown", "unknown_session_pattern"),
        ("file", "file_naming_pattern"),
    ],
)
def test_pattern_is_a_str(argument: str, option: str) -> None:
    """Another type is a TypeError that names the option."""
    with pytest.raises(TypeError) as caught:
        paths(**{argument: 7})
    assert str(caught.value) == f"{option} must be a str, not int"


@pytest.mark.parametrize(
    ("pattern", "session_id", "said", "expected"),
    [
        ("{session_id}", "chat 42/7", None, "chat 42/7"),
        ("{session_id}", "x" * 500, "x" * 500, "x" * 500),
        ("{session_id}", "x" * 500, None, session_to_name("x" * 500)),
        ("{session_id}", "chat", "another", "chat"),
        ("day/s-{session_id}", "chat", "chat", "chat"),
        ("day/s-{session_id}", "chat", None, "s-chat"),
    ],
)
def test_a_directory_tells_its_session(
    pattern: str, session_id: str, said: str | None, expected: str
) -> None:
    """By what an event in it says, if that fits; else by its name."""
    paths = SessionPaths(Path("/b"), pattern, "unknown", "log", ".jsonl", "u")
    assert paths.session(paths.directory(session_id), said) == expected
