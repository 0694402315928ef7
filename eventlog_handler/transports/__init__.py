"""Transports: the contract, the built-in ones, and how an option becomes instances.

A URL's scheme names the class. Each broker has one file, whose driver is imported only where such a
URL is configured; other packages register theirs as entry points of the group
`eventlog_handler.transports`: the scheme, and a callable that takes the URL.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from eventlog_handler.transports.base import TransportInterface

SCHEMES = {
    "amqp": "amqp:AmqpTransport",
    "amqps": "amqp:AmqpTransport",
    "http": "http:HttpTransport",
    "https": "http:HttpTransport",
    "kafka": "kafka:KafkaTransport",
    "nats": "nats:NatsTransport",
    "otlp": "otlp:OtlpTransport",
    "redis": "redis:RedisTransport",
    "rediss": "redis:RedisTransport",
    "servicebus": "servicebus:ServiceBusTransport",
    "sqs": "sqs:SqsTransport",
}
"""Module below this package and class, as text: nothing is imported that is not asked for."""
GROUP = "eventlog_handler.transports"
_NEEDED = ("send", "close", "health_check", "is_connected")


def named_transports(option: Any) -> dict[str, TransportInterface]:
    """Return the transports of `downstream_transport`, by name.

    Args:
        option: None, a transport, a URL, a class or function that makes one without arguments (as
            `ext://` gives in a `dictConfig`), or a list of these. A text may hold several URLs,
            with spaces between them.

    Raises:
        ImportError: A driver is not installed; says what to type.
        TypeError: Something that is no transport.
        ValueError: A URL that cannot be, or two transports of one name: their figures could not be
            told apart.
    """
    named: dict[str, TransportInterface] = {}
    for item in _items(option):
        transport = _instance(item)
        name = str(getattr(transport, "name", None) or type(transport).__qualname__)
        if name in named:
            raise ValueError(
                f"downstream_transport has two transports named {name!r}; give one of them a `name`"
            )
        named[name] = transport
    return named


def _items(option: Any) -> list[Any]:
    if isinstance(option, (list, tuple)):
        # By index: only so `logging.config` replaces the `ext://` of a list's items.
        return [each for index in range(len(option)) for each in _items(option[index])]
    if isinstance(option, str):
        return list(option.split())
    return [] if option is None else [option]


def _instance(item: Any) -> TransportInterface:
    if isinstance(item, str):
        item = _from_url(item)
    elif isinstance(item, type) or (callable(item) and not hasattr(item, "send")):
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


def _from_url(url: str) -> Any:
    scheme = url.partition("://")[0].lower()
    if scheme in SCHEMES:
        module, _, name = SCHEMES[scheme].partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(url)
    # Here, as it takes a third of the time in which all of this package is imported.
    from importlib.metadata import entry_points

    found = list(entry_points(group=GROUP, name=scheme))
    if len(found) == 1:
        return found[0].load()(url)
    if found:
        values = sorted(each.value for each in found)
        raise ValueError(f"{scheme}:// is offered by {', '.join(values)}: uninstall all but one")
    near = difflib.get_close_matches(scheme, SCHEMES, n=1)
    hint = f"did you mean {near[0]}://?" if near else f"there are {', '.join(SCHEMES)}"
    raise ValueError(
        f"downstream_transport has the scheme {scheme[:40]!r}, which no installed package offers: "
        f"{hint}"
    )
