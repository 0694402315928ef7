"""structlog: the processor takes every event on its way to the console."""

import structlog

from eventlog_handler import EventLogProcessor, redact_keys

events = EventLogProcessor(processors=[redact_keys("api_key")])

structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        events,
        structlog.processors.format_exc_info,
        structlog.dev.ConsoleRenderer(colors=False),
    ]
)
log = structlog.get_logger()

structlog.contextvars.bind_contextvars(session_id="chat-42")
log.info("tool called", event_type="tool_call", tool="search", api_key="secret")
try:
    raise ValueError("no result")
except ValueError:
    log.exception("tool failed")

events.flush()
print(events.gateway.get_log_file_path("chat-42").read_text(), end="")
