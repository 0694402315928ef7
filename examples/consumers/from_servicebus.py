"""Print a session's events from Service Bus: `python from_servicebus.py servicebus://… chat-42`.

The URL is the transport's own, of a queue that requires sessions. Needs
`pip install 'eventlog-handler[servicebus]'`.
"""

import json
import sys
from urllib.parse import parse_qs, unquote, urlsplit

from azure.servicebus import ServiceBusClient
from azure.servicebus.exceptions import SessionLockLostError


def main(url: str, session_id: str) -> None:
    """Receive the session, and go on until interrupted."""
    parts = urlsplit(url)
    login, _, host = parts.netloc.rpartition("@")
    policy, _, key = login.partition(":")
    fields = [f"Endpoint=sb://{host}", f"SharedAccessKeyName={unquote(policy)}"]
    fields.append(f"SharedAccessKey={unquote(key)}")
    if parse_qs(parts.query).get("emulator") == ["true"]:
        fields.append("UseDevelopmentEmulator=true")
    queue, seen = unquote(parts.path[1:]), set()
    with ServiceBusClient.from_connection_string(";".join(fields)) as client:
        while True:
            receiver = client.get_queue_receiver(queue, session_id=session_id, max_wait_time=10)
            try:
                with receiver:
                    for message in receiver:
                        # At least once: whatever comes again has the same id.
                        if message.message_id not in seen:
                            seen.add(message.message_id)
                            line = b"".join(message.body)
                            print(json.dumps(json.loads(line)["event"]), flush=True)
                        receiver.complete_message(message)
            except SessionLockLostError:
                # It is held for the queue's lock duration; whatever was not completed comes again.
                continue


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
