"""azure-servicebus by itself: messages in batches, against the tests' peer."""

from collections.abc import Sequence

from azure.servicebus import ServiceBusMessage
from azure.servicebus.aio import ServiceBusClient
from azure.servicebus.exceptions import MessageSizeExceededError

from eventlog_handler.typing import OutgoingEvent
from tests.transports.servers import PASSWORD
from tests.transports.test_servicebus import POLICY, ServiceBusPeer


async def send(
    server: ServiceBusPeer, destination: str, batches: Sequence[Sequence[OutgoingEvent]]
) -> None:
    """Send each batch with what the transport sends, and wait until it is confirmed."""
    connection = (
        f"Endpoint=sb://127.0.0.1:{server.port};SharedAccessKeyName={POLICY};"
        f"SharedAccessKey={PASSWORD};UseDevelopmentEmulator=true"
    )
    async with (
        ServiceBusClient.from_connection_string(connection, retry_total=0) as client,
        client.get_queue_sender(destination) as sender,
    ):
        for batch in batches:
            transfer = await sender.create_message_batch()
            for event in batch:
                message = ServiceBusMessage(
                    event.line,
                    message_id=event.id,
                    session_id=event.session_id,
                    content_type="application/json",
                    application_properties={**event.metadata},
                )
                try:
                    transfer.add_message(message)
                except MessageSizeExceededError:
                    await sender.send_messages(transfer)
                    transfer = await sender.create_message_batch()
                    transfer.add_message(message)
            await sender.send_messages(transfer)
