"""The main job: a dictConfig, unchanged logging calls, one file per session, lines forwarded.

Run it with `python3 examples/run.py`, or where the package is installed with its extra `yaml`.
"""

import logging
import logging.config
from pathlib import Path

import yaml

from eventlog_handler import session_context

HERE = Path(__file__).resolve().parent
logger = logging.getLogger("agent")


def answer(question: str) -> None:
    """An agent's turn, whose logging calls know nothing of this package."""
    logger.info("question", extra={"event_type": "user_message", "text": question})
    logger.info("calling %s", "search", extra={"event_type": "tool_call", "tool": "search"})
    try:
        raise TimeoutError("search did not answer")
    except TimeoutError:
        logger.exception("tool failed")


logging.config.dictConfig(yaml.safe_load((HERE.parent / "logging.yaml").read_text()))

with session_context("chat-42", user="ada"):
    answer("What is a journal?")
logger.info("a record that names its session itself", extra={"session_id": "chat-43"})

# Only because this script prints what it wrote; at exit nothing has to be called.
handler = next(h for h in logging.getLogger().handlers if hasattr(h, "gateway"))
handler.flush()

for session in ("chat-42", "chat-43"):
    path = handler.gateway.get_log_file_path(session)
    print(f"\n{path}")
    print(path.read_text(), end="")
stats = handler.stats()
print(f"\n{stats.written} lines written, {stats.bytes} bytes")
