"""The gateway by itself: events of any kind, and a callback for the live ones."""

import asyncio
from dataclasses import dataclass

from eventlog_handler import SessionEvent, create_with_callback


@dataclass
class ToolCall:
    """An event class of the application."""

    session_id: str
    tool: str
    arguments: dict[str, str]


async def show(event: object) -> None:
    """Get each event as it was given."""
    print("live:", type(event).__name__)


async def main() -> None:
    """Log three kinds of events to one session."""
    async with create_with_callback(show) as gateway:
        await gateway(SessionEvent("user_message", "chat-42", role="user", data={"text": "Hi"}))
        await gateway(ToolCall("chat-42", "search", {"q": "journal"}))
        await gateway({"type": "answer", "session_id": "chat-42", "text": "Hello."})
        path = gateway.get_log_file_path("chat-42")
    print(path.read_text(), end="")


asyncio.run(main())
