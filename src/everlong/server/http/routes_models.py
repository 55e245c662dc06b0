"""Routes that look after the service: its model, and items that no list contains."""

from __future__ import annotations

import logging

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from everlong.server.engine.served_model import ServedModel
from everlong.server.engine.service import Service
from everlong.server.http.endpoint import Endpoint
from everlong.server.http.ids import check_id
from everlong.server.http.messages import ModelIn, ModelOut, UnavailableIn, UnavailableOut

log = logging.getLogger(__name__)


def model_endpoints(service: Service) -> list[Endpoint]:
    """The routes that look after the service; they have no bound in time."""

    def described() -> ModelOut:
        live, previous = service.live, service.previous
        return ModelOut(
            name=live.recommender.origin.model,
            digest=live.name,
            items=len(live.item_ids),
            users=service.num_users,
            bytes_per_user=service.bytes_per_user,
            user_type="integer" if live.user_type is int else "text",
            item_type="integer" if live.item_type is int else "text",
            event_fields=dict(live.model.field_codes),
            exact=live.exact,
            previous=None if previous is None else previous.name,
            recall=live.recall,
        )

    async def model() -> ModelOut:
        """The live model."""
        return described()

    async def switch(given: ModelIn) -> ModelOut:
        """Makes another model live.

        The service builds the states of the other model from the log while the live one answers.
        """
        try:
            served_model = await run_in_threadpool(ServedModel.read, given.folder)
        # a folder may hold anything
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            log.warning("%s cannot be served: %s", given.folder, error)
            raise HTTPException(422, f"this model cannot be served: {error}") from None
        try:
            await run_in_threadpool(service.switch, served_model, since=given.since)
        except ValueError as error:
            raise HTTPException(422, f"this model cannot be served: {error}") from None
        return described()

    async def roll_back() -> ModelOut:
        """Makes the previous model live again."""
        try:
            await run_in_threadpool(service.roll_back)
        except ValueError as error:
            raise HTTPException(404, str(error)) from None
        return described()

    async def hide(given: UnavailableIn) -> UnavailableOut:
        """Keeps items out of every list, also after a restart; they replace the earlier ones."""
        kind = service.live.item_type
        item_ids = [check_id("item_id", item, kind) for item in given.item_ids]
        await run_in_threadpool(service.hide, item_ids)
        return UnavailableOut(service.hidden)

    async def hidden() -> UnavailableOut:
        """Items that no list contains."""
        return UnavailableOut(service.hidden)

    return [
        Endpoint("GET", "/v1/model", "read", model),
        Endpoint("POST", "/v1/model", "admin", switch),
        Endpoint("POST", "/v1/model/rollback", "admin", roll_back),
        Endpoint("GET", "/v1/unavailable", "read", hidden),
        Endpoint("PUT", "/v1/unavailable", "admin", hide),
    ]
