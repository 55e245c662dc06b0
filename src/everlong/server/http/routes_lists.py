"""Routes that answer with items: recommend, rank, similar."""

from __future__ import annotations

import asyncio
import time

from starlette.exceptions import HTTPException

from everlong.server.engine.served_model import Listed, Wanted
from everlong.server.engine.service import Service
from everlong.server.http.endpoint import Endpoint
from everlong.server.http.ids import check_id, id_of_path
from everlong.server.http.limits import in_thread, in_time
from everlong.server.http.messages import (
    MAX_UNKNOWN,
    ItemOut,
    ListOut,
    RankIn,
    RankOut,
    RecommendIn,
    SimilarIn,
    SimilarOut,
    UnknownOut,
)
from everlong.server.store.log import Id

STALE_S = 0.05
"""Seconds that a request waits for the event that it wants in the state."""


def list_endpoints(service: Service) -> list[Endpoint]:
    """The routes that answer with items."""

    def checked(item_ids: list[Id]) -> list[Id]:
        kind = service.live.item_type
        return [check_id("item_id", item, kind) for item in item_ids]

    async def recommend(given: RecommendIn) -> ListOut:
        """The best items for a user.

        The items that the user has seen are those of the log.
        """
        user_id = check_id("user_id", given.user_id, service.live.user_type)
        wanted = Wanted(
            k=given.k,
            at=given.at,
            exclude=checked(given.exclude),
            among=None if given.among is None else checked(given.among),
        )
        fresh = await _reached(service, user_id, given.min_offset)
        found = await in_time(service.recommend(user_id, wanted, filter_seen=given.filter_seen))
        return ListOut(
            _items(found),
            service.live.name,
            service.knows(user_id),
            not fresh,
            _unknown(found),
        )

    async def rank(given: RankIn) -> RankOut:
        """Candidates in order for a user.

        Candidates that the catalogue does not contain are left out and reported.
        """
        user_id = check_id("user_id", given.user_id, service.live.user_type)
        candidates = checked(given.candidates)
        live = service.live
        found = await in_thread(service.rank, user_id, candidates, given.at)
        return RankOut(_items(found), live.name, service.knows(user_id), _unknown(found))

    async def similar(item_id: str, given: SimilarIn) -> SimilarOut:
        """The items nearest to one."""
        live = service.live
        name = id_of_path("item_id", item_id, live.item_type)
        try:
            found = await in_thread(live.similar, name, given.k)
        except TypeError as error:
            raise HTTPException(404, str(error)) from None
        if found is None:
            raise HTTPException(404, "the catalogue does not contain this item")
        return SimilarOut(_items(found), live.name)

    return [
        Endpoint("POST", "/v1/recommend", "read", recommend),
        Endpoint("POST", "/v1/rank", "read", rank),
        Endpoint("GET", "/v1/items/{item_id:path}/similar", "read", similar),
    ]


def _items(found: Listed) -> list[ItemOut]:
    return [ItemOut(*pair) for pair in zip(found.items, found.scores, strict=True)]


def _unknown(found: Listed) -> UnknownOut:
    return UnknownOut(len(found.unknown), list(found.unknown[:MAX_UNKNOWN]))


async def _reached(service: Service, user_id: Id, offset: int) -> bool:
    """Whether the states of a user's shard contain an offset, after a moment at most."""
    until = time.monotonic() + STALE_S
    while service.offset_of(user_id) < offset:
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.002)
    return True
