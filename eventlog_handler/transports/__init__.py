"""Transports: the contract, the built-in ones, and how an option becomes instances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from eventlog_handler.transports.base import TransportInterface

_NEEDED = ("send", "close", "health_check", "is_connected")


def named_transports(option: Any) -> dict[str, TransportInterface]:
    """Return the transports of `downstream_transport`, by name.

    Args:
        option: None, a transport, a class or function that makes one without arguments (as
            `ext://` gives in a `dictConfig`), or a list of these.

    Raises:
        TypeError: Something that is no transport.
        ValueError: Two transports of one name: their figures could not be told apart.
    """
    items = [] if option is None else option if isinstance(option, (list, tuple)) else [option]
    named: dict[str, TransportInterface] = {}
    for item in items:
        transport = _instance(item)
        name = str(getattr(transport, "name", None) or type(transport).__qualname__)
        if name in named:
            raise ValueError(
                f"downstream_transport has two transports named {name!r}; give one of them a `name`"
            )
        named[name] = transport
    return named


def _instance(item: Any) -> TransportInterface:
    if isinstance(item, type) or (callable(item) and not hasattr(item, "send")):
        make: Callable[[], Any] = item
        item = make()
    missing = [name for name in _NEEDED if not hasattr(item, name)]
    if missing:
        raise TypeError(
            f"downstream_transport has a {type(item).__name__}, which is no transport: it lacks "
            f"{', '.join(missing)}; write a subclass of TransportInterface"
        )
    transport: TransportInterface = item
    return transport
