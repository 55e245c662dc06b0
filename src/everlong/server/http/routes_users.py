"""Routes about one user."""

from __future__ import annotations

from starlette.exceptions import HTTPException

from everlong.server.engine.service import Service
from everlong.server.http.endpoint import Endpoint
from everlong.server.http.ids import id_of_path
from everlong.server.http.limits import in_thread
from everlong.server.http.messages import EventOut, UserOut

HISTORY = 100
"""Events of a user in an answer."""


def user_endpoints(service: Service) -> list[Endpoint]:
    """The routes about one user."""

    async def user(user_id: str) -> UserOut:
        """The state and the last events of a user."""
        live = service.live
        name = id_of_path("user_id", user_id, live.user_type)
        info = await in_thread(service.info, name)
        if info is None:
            raise HTTPException(404, "no such user")
        events = await in_thread(service.history, name, HISTORY)
        return UserOut(
            user_id=name,
            shard=info.shard,
            events=info.watermark.events,
            last_offset=info.watermark.offset,
            newest=info.watermark.newest,
            state_bytes=info.state_bytes,
            history=[
                EventOut(
                    offset=event.offset,
                    item_id=event.item_id,
                    timestamp=event.time,
                    fields=dict(event.fields),
                    known=event.item_id in live.item_ids.row_of,
                )
                for event in events
            ],
        )

    return [Endpoint("GET", "/v1/users/{user_id:path}", "read", user)]
