"""An SQS server that survives SIGKILL: `python sqs_server.py PORT JOURNAL KEY SECRET`.

moto keeps all in memory. This one writes each queue that is made and each message that is taken to
a journal before it answers, and replays it when it starts. What consumers have deleted is there
again then, as SQS may deliver it again anyway. It wants signatures made with one access key.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from moto import settings
from moto.core import DEFAULT_ACCOUNT_ID
from moto.iam.models import iam_backends
from moto.server import main
from moto.sqs import models
from moto.sqs.models import Message, Queue, SQSBackend, sqs_backends

REGION = "eu-west-1"
ALLOW = {
    "Version": "2012-10-17",
    "Statement": {"Effect": "Allow", "Action": "sqs:*", "Resource": "*"},
}


def let_in(key: str, secret: str) -> None:
    """Refuse whoever does not sign with this key."""
    iam = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
    iam.create_user(REGION, "tests")
    iam.put_user_policy("tests", "all", json.dumps(ALLOW))
    made = iam.create_access_key("tests")
    made.access_key_id, made.secret_access_key = key, secret
    settings.INITIAL_NO_AUTH_ACTION_COUNT = 0


def keep(journal: Path) -> None:
    """Make again what the journal has, and have it get what comes from now on."""
    lock = threading.Lock()
    known: set[tuple[str, str]] = set()
    replayed = journal.read_bytes().splitlines() if journal.exists() else []
    file: int | None = None
    create_queue = SQSBackend.create_queue

    def write(**entry: Any) -> None:
        if file is not None:
            os.write(file, json.dumps(entry).encode() + b"\n")

    def keeping_queue(backend: SQSBackend, name: str, tags: Any = None, **options: Any) -> Queue:
        queue = create_queue(backend, name, tags, **options)
        write(queue=name, options=options)
        return queue

    def keeping_message(queue: Queue, message: Message) -> None:
        # Instead of moto's own, which compares with each message there is, and takes no lock.
        mark = (queue.name, message.deduplication_id or message.id)
        with lock, queue._messages_lock:
            if mark in known:
                return
            known.add(mark)
            write(
                queue=queue.name,
                body=message.body,
                attributes=message.message_attributes,
                group=message.group_id,
                deduplication=message.deduplication_id,
            )
            queue._messages.append(message)
            queue._messages_lock.notify_all()

    SQSBackend.create_queue, Queue.add_message = keeping_queue, keeping_message
    backend = sqs_backends[DEFAULT_ACCOUNT_ID][REGION]
    for entry in map(json.loads, replayed):
        if "options" in entry:
            backend.create_queue(entry["queue"], **entry["options"])
            continue
        backend.send_message(
            entry["queue"],
            entry["body"],
            entry["attributes"],
            group_id=entry["group"],
            deduplication_id=entry["deduplication"],
        )
    file = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def hurry() -> None:
    """Spare moto most of its time: it asks for all of a queue's figures several times a message."""
    models.camelcase_to_underscores = functools.cache(models.camelcase_to_underscores)
    for figure in ("", "_delayed", "_not_visible"):
        setattr(Queue, f"approximate_number_of_messages{figure}", property(lambda queue: 0))


if __name__ == "__main__":
    port, journal, key, secret = sys.argv[1:]
    hurry()
    let_in(key, secret)
    keep(Path(journal))
    main(["--host", "127.0.0.1", "--port", port])
