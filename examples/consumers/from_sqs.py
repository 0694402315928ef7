"""Print a session's events from an SQS queue: `python from_sqs.py sqs://… chat-42`.

The URL is the transport's own, with a queue's name. What is printed is deleted from the queue;
other sessions' messages are left to other readers. Only a FIFO queue keeps the order.

Needs `pip install 'eventlog-handler[sqs]'`.
"""

import json
import sys
from urllib.parse import parse_qsl, unquote, urlsplit

from botocore.session import get_session


def main(url: str, session_id: str) -> None:
    """Take messages, and go on until interrupted."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    client = get_session().create_client(
        "sqs",
        region_name=options.get("region"),
        endpoint_url=options.get("endpoint_url"),
        aws_access_key_id=unquote(parts.username or "") or None,
        aws_secret_access_key=unquote(parts.password or "") or None,
    )
    queue = client.get_queue_url(QueueName=parts.netloc.rpartition("@")[2])["QueueUrl"]
    request = {"QueueUrl": queue, "MaxNumberOfMessages": 10, "WaitTimeSeconds": 20}
    seen = set()
    while True:
        answer = client.receive_message(**request, MessageAttributeNames=["id", "session_id"])
        for message in answer.get("Messages", ()):
            told = {k: each["StringValue"] for k, each in message["MessageAttributes"].items()}
            if told.get("session_id") != session_id:
                continue
            # At least once: whatever comes again has the same id.
            if told["id"] not in seen:
                seen.add(told["id"])
                print(json.dumps(json.loads(message["Body"])["event"]), flush=True)
            client.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
