"""The package's shape: ranks, public names, docstrings, types."""

from __future__ import annotations

import ast
import importlib
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest

import eventlog_handler

PACKAGE = Path(eventlog_handler.__file__).parent

RANKS = {
    "eventlog_handler": 7,
    "handler": 6,
    "processor": 6,
    "factories": 6,
    "_feed": 5.5,
    "_listener": 5,
    "session_logger": 4,
    "_delivery": 3.9,
    "_worker": 3.8,
    "_sender": 3.8,
    "_lanes": 3.7,
    "_batch": 3.7,
    "_backlog": 3.6,
    "_cursor": 3.5,
    "_lines": 3.4,
    "_outbox": 3.4,
    "_rejected": 3.3,
    "_recovery": 3.3,
    "_journal": 3.2,
    "_intake": 3,
    "_files": 2.5,
    "_downstream": 2.5,
    "_handoff": 2,
    "_ring": 0,
    "_payload": 1.1,
    "_owner": 1,
    "_database": 1,
    "redact": 2,
    "transports.builtin": 2,
    "transports._url": 1,
    "transports._remote": 2,
    "transports.redis": 2.1,
    "transports.amqp": 2.1,
    "transports.http": 2.1,
    "transports.kafka": 2.1,
    "transports.nats": 2.1,
    "transports.otlp": 2.2,
    "transports.servicebus": 2.1,
    "transports.sqs": 2.1,
    "transports": 2,
    "testing": 2,
    "metrics": 1,
    "_snapshot": 1.6,
    "_config": 1.5,
    "transports.base": 1,
    "_encode": 1,
    "_paths": 1,
    "_context": 1,
    "_breaker": 1,
    "_report": 1,
    "_lifecycle": 1.2,
    "_waiter": 1,
    "typing": 0.5,
    "_stamp": 0,
    "events": 0,
    "exceptions": 0,
}


def modules() -> dict[str, Path]:
    """Return the package's files by module name, without the package's own."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__").replace("__init__", "eventlog_handler")] = path
    return found


def imports(path: Path) -> set[str]:
    """Return which of our modules a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "eventlog_handler":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("eventlog_handler."):
                found.add(node.module.removeprefix("eventlog_handler."))
    return found


def test_every_module_has_a_rank() -> None:
    """A new module is given its place first."""
    assert modules().keys() == RANKS.keys()


@pytest.mark.parametrize("name", sorted(RANKS))
def test_a_module_imports_only_from_below(name: str) -> None:
    """No module imports one of its own rank or above: so there are no circles."""
    above = {used for used in imports(modules()[name]) if RANKS[used] >= RANKS[name]}
    assert above == set()


@pytest.mark.parametrize("name", sorted(RANKS))
def test_no_file_outgrows_an_evening(name: str) -> None:
    """No file is longer than 450 lines."""
    assert len(modules()[name].read_text().splitlines()) <= 450


SPECIFIED = [
    "EventSessionLogger",
    "TransportInterface",
    "CallbackTransport",
    "LoggingTransport",
    "NullTransport",
    "EventSessionLoggerError",
    "LocalLoggingError",
    "SerializationError",
    "TransportError",
    "TransportConnectionError",
    "TransportTimeoutError",
    "create_session_logger",
    "create_logging_only",
    "create_with_callback",
    "create_with_transport",
    "create_from_environment",
    "migrate_from_session_logger",
    "create_backward_compatible",
    "SessionEvent",
    "SemiSessionEvent",
    "EventLogHandler",
    "EventLogProcessor",
    "session_context",
]


def test_the_specified_names_are_there() -> None:
    """Every name of the specification can be imported from the package."""
    assert set(SPECIFIED) <= set(eventlog_handler.__all__)


def test_all_is_sorted_and_complete() -> None:
    """`__all__` lists exactly what the package's own file imports, in order."""
    assert eventlog_handler.__all__ == sorted(eventlog_handler.__all__)
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = [a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assert sorted(imported) == eventlog_handler.__all__


def members(cls: type[Any]) -> list[tuple[str, Any]]:
    """Return the public functions and properties that a class of ours defines."""
    found = [(name, getattr(v, "fget", v)) for name, v in vars(cls).items()]
    return [(n, v) for n, v in found if not n.startswith("_") and inspect.isfunction(v)]


def functions() -> list[Any]:
    """Return every public function, and every public method of a public class."""
    found = []
    for name in eventlog_handler.__all__:
        thing = getattr(eventlog_handler, name)
        if inspect.isclass(thing):
            found += [pytest.param(v, id=f"{name}.{n}") for n, v in members(thing)]
            if "__call__" in vars(thing):
                found.append(pytest.param(vars(thing)["__call__"], id=f"{name}.__call__"))
        else:
            found.append(pytest.param(thing, id=name))
    return found


@pytest.mark.parametrize("name", eventlog_handler.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    """Every public name has a docstring of its own."""
    thing = getattr(eventlog_handler, name)
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{name}(")


@pytest.mark.parametrize("function", functions())
def test_every_public_function_is_typed_and_documented(function: Any) -> None:
    """Every parameter and result has a type, and the function says what it does."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function)
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    assert "return" in hints
    assert function.__doc__
    assert [p.name for p in parameters if p.name not in hints] == []


def test_the_constructors_signature_is_the_specified_one() -> None:
    """Names, order and defaults of the gateway's constructor are the specification's."""
    parameters = inspect.signature(eventlog_handler.EventSessionLogger).parameters
    assert [(p.name, p.default) for p in parameters.values()] == [
        ("log_base_dir", None),
        ("downstream_callback", None),
        ("downstream_transport", None),
        ("include_system_prompt", True),
        ("log_format", "jsonl"),
        ("file_naming_pattern", "%Y%m%d_%H%M%S"),
        ("error_handler", None),
        ("max_retry_attempts", 3),
        ("retry_delay_seconds", 1.0),
        ("enable_local_logging", True),
        ("session_directory_pattern", "{session_id}"),
        ("unknown_session_pattern", "unknown_{uuid}"),
        ("kwargs", inspect.Parameter.empty),
    ]


def test_the_transports_contract_is_the_specified_one() -> None:
    """`TransportInterface` has the four specified members, and no other is abstract."""
    interface = eventlog_handler.TransportInterface
    assert interface.__abstractmethods__ == {"send", "close", "health_check", "is_connected"}


def test_the_package_says_that_it_is_typed() -> None:
    """`py.typed` is installed."""
    assert (PACKAGE / "py.typed").exists()


def test_every_module_can_be_imported_alone() -> None:
    """Each module has a docstring."""
    for name in RANKS:
        full = "eventlog_handler" if name == "eventlog_handler" else f"eventlog_handler.{name}"
        assert importlib.import_module(full).__doc__, name
