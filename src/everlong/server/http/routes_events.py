"""Routes that write: events, and the erasure of a user."""

from __future__ import annotations

import asyncio
import uuid

from starlette.exceptions import HTTPException

from everlong.server.engine.service import Placed, Service
from everlong.server.http.endpoint import Endpoint
from everlong.server.http.ids import check_id, id_of_path
from everlong.server.http.limits import in_time
from everlong.server.http.messages import ErasedOut, EventIn, EventsIn, EventsOut, ReceiptOut
from everlong.server.store.log import Event


def event_endpoints(service: Service) -> list[Endpoint]:
    """The routes that write."""

    async def post_events(given: EventsIn) -> EventsOut:
        """Stores events and applies them.

        A 200 response means that the events are durable and applied to the states.
        """
        placed = await _placed(service, [_event(service, one) for one in given.events])
        return EventsOut([ReceiptOut(n, receipt.offset, receipt.new) for n, receipt in placed])

    async def erase_user(user_id: str) -> ErasedOut:
        """Overwrites the events and states of a user."""
        name = id_of_path("user_id", user_id, service.live.user_type)
        return ErasedOut(await in_time(service.erase(name)))

    return [
        Endpoint("POST", "/v1/events", "ingest", post_events),
        Endpoint("DELETE", "/v1/users/{user_id:path}", "admin", erase_user),
    ]


def _event(service: Service, given: EventIn) -> Event:
    """An event of the log.

    Raises:
        HTTPException: 422 for an id of another type, or a field that the model cannot read.
    """
    live = service.live
    for name, codes in live.model.field_codes.items():
        value = given.fields.get(name)
        if not (isinstance(value, int) and 0 <= value < codes):
            raise HTTPException(
                422, f"fields.{name}: expected a code 0 .. {codes - 1}, received something else"
            )
    user_id = check_id("user_id", given.user_id, live.user_type)
    item_id = check_id("item_id", given.item_id, live.item_type)
    name = given.event_id or str(
        uuid.uuid5(uuid.NAMESPACE_OID, repr((user_id, item_id, given.timestamp)))
    )
    return Event(name, user_id, item_id, given.timestamp, given.fields)


async def _placed(service: Service, events: list[Event]) -> list[Placed]:
    """Receipts in the order of the events."""
    if len(service.shards) == 1:
        (future,) = service.ingest(events)
        return [Placed(0, receipt) for receipt in await in_time(future)]
    order = service.by_shard(events)
    answers = await asyncio.gather(*map(in_time, service.ingest(events)))
    receipts = {number: iter(some) for number, some in zip(order, answers, strict=True)}
    shards = (service.shard_of(event.user_id) for event in events)
    return [Placed(number, next(receipts[number])) for number in shards]
