"""The events of an agent, made with a fixed seed."""

from __future__ import annotations

import random
from typing import Any

Event = dict[str, Any]

MIXTURE = {"delta": 950, "step": 45, "history": 5}
"""Of 1,000 events of an agent's stream, how many are of which kind."""


def corpus(kind: str, count: int) -> list[Event]:
    """Return the extra fields of events, the same ones at every call.

    Sizes are those of the fields as JSON. `delta` is a piece of streamed text, 200 bytes. `step` is
    a tool call with its arguments and its result, 2 kB. `history` is a conversation of 50 messages,
    a nested list of 100 kB. `mixed` is an agent's stream in a random order: 95 % deltas, 4.5 %
    steps and 0.5 % histories, of which the histories are two thirds of the bytes.

    Args:
        kind: One of these four.
        count: How many events.
    """
    rng = random.Random(6)
    source = " ".join(f"word{rng.randrange(500)}" for _ in range(20_000))

    def text(size: int) -> str:
        start = rng.randrange(len(source) - size)
        return source[start : start + size]

    def delta() -> Event:
        return {"event_type": "delta", "text": text(125)}

    def step() -> Event:
        call = {"name": "search", "arguments": {"query": text(200), "limit": 10, "recent": True}}
        return {"event_type": "tool_call", "call": call, "result": text(1_610)}

    def history() -> Event:
        told = [{"role": ("user", "assistant")[n % 2], "content": text(1_960)} for n in range(50)]
        return {"event_type": "history", "messages": told}

    make = {"delta": delta, "step": step, "history": history}
    mixed = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=count)
    kinds = mixed if kind == "mixed" else [kind] * count
    return [{"session_id": "chat-42", "index": n, **make[each]()} for n, each in enumerate(kinds)]
