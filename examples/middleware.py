"""FastAPI or Starlette: bind the session once a request, in plain ASGI.

A plain ASGI middleware runs in the request's own context; `BaseHTTPMiddleware` does not.
"""

import asyncio
import logging
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from eventlog_handler import EventLogHandler, session_context


class SessionMiddleware:
    """Binds the header `x-session-id` to all that is logged during a request."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        headers = dict(scope.get("headers") or [])
        session_id = headers.get(b"x-session-id")
        if session_id is None:
            await self.app(scope, receive, send)
            return
        async with session_context(session_id.decode("latin-1"), path=scope["path"]):
            await self.app(scope, receive, send)


async def chat(request: Request) -> JSONResponse:
    """An endpoint that knows nothing of sessions."""
    logging.getLogger("app").info("asked", extra={"event_type": "user_message"})
    return JSONResponse({"answer": "Hello."})


app = Starlette(routes=[Route("/chat", chat)])
app.add_middleware(SessionMiddleware)


async def request(path: str, session_id: str) -> None:
    """Send one request to the app as a server would."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            print(message["body"].decode())

    headers = [(b"x-session-id", session_id.encode())]
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": headers}
    await app(scope, receive, send)


if __name__ == "__main__":
    handler = EventLogHandler()
    logging.getLogger("app").addHandler(handler)
    logging.getLogger("app").setLevel(logging.INFO)
    asyncio.run(request("/chat", "chat-42"))
    handler.flush()
    print(handler.gateway.get_log_file_path("chat-42").read_text(), end="")
