"""The service over HTTP."""

# annotations are read when routes are made, so they are not left for later in this module

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Query, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.middleware.trustedhost import TrustedHostMiddleware

from everlong import __version__
from everlong.server.engine.served_model import Listed, ServedModel, Wanted
from everlong.server.engine.service import Placed, Service
from everlong.server.http.answers import Answers
from everlong.server.http.console import add_console
from everlong.server.http.gate import (
    Asgi,
    Bounded,
    Counted,
    Guarded,
    Hot,
    HotRoute,
    Shedding,
    refuse_in_one_form,
    unknown_key,
)
from everlong.server.http.keys import Keys, Scope
from everlong.server.http.messages import (
    MAX_INT,
    MAX_K,
    ErasedOut,
    ErrorOut,
    EventIn,
    EventOut,
    EventsIn,
    EventsOut,
    ItemOut,
    ListOut,
    ModelIn,
    ModelOut,
    RankIn,
    ReceiptOut,
    RecommendIn,
    UnavailableIn,
    UnavailableOut,
    UserOut,
)
from everlong.server.http.metrics import Metrics
from everlong.server.store.log import DamagedError, Event, Id

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BODY = 1 << 20
MAX_AT_ONCE = 256
"""Requests in work; more are told to come again."""

LOCAL_HOSTS = ["localhost", "127.0.0.1", "::1", "[::1]"]
ANSWER_S = 2.0
"""A request that takes longer is given up."""

STALE_S = 0.05
"""How long a request waits for the event that it wants to be in the state."""

HISTORY = 100
"""Events of a user that are told."""

WRONG: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorOut} for code in (400, 401, 403, 404, 413, 422, 429, 503)
}


def make_app(service: Service, keys: Keys | None = None) -> FastAPI:
    """The application around a service, which it closes when it ends.

    Args:
        service: open, with its states.
        keys: who may do what; without any, everybody may do everything.
    """
    state = _State(service, keys or Keys())

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = _Gated(
        title="everlong",
        version=__version__,
        description="Events in, recommendations out, nothing lost.",
        lifespan=life,
        # their pages load scripts from elsewhere; the console has its own
        docs_url=None,
        redoc_url=None,
        responses=WRONG,
    )
    gates = Guarded(Bounded(Hot(app.enter, state.hot), MAX_BODY), state.keys)
    app.gates = Counted(Shedding(gates, MAX_AT_ONCE), state.metrics)
    if not len(state.keys):
        # without keys a page from elsewhere must not reach the service under a name of its own
        app.gates = TrustedHostMiddleware(app.gates, allowed_hosts=LOCAL_HOSTS)
    refuse_in_one_form(app)
    _add_events(app, state)
    _add_reads(app, state)
    _add_models(app, state)
    _add_health(app, state)
    add_console(app)
    return app


class _Gated(FastAPI):
    """An application behind gates: what they answer or refuse it does not see.

    As its middleware they would stand behind others, which take as long as all of them.
    """

    gates: Asgi

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.gates(scope, receive, send)

    async def enter(self, scope: Any, receive: Any, send: Any) -> None:
        """What is behind the gates."""
        await super().__call__(scope, receive, send)


class _State:
    """What the routes share."""

    def __init__(self, service: Service, keys: Keys) -> None:
        self.service, self.keys = service, keys
        self.metrics = Metrics(service)
        self.hot: dict[str, HotRoute] = {}
        self._answers = Answers()
        self._bearer = HTTPBearer(auto_error=False)

    def needs(self, scope: Scope) -> Any:
        """A dependency that lets through who may do something."""

        async def check(
            given: Annotated[HTTPAuthorizationCredentials | None, Depends(self._bearer)],
        ) -> None:
            self.check(given.credentials if given else None, scope)

        return Depends(check)

    def check(self, secret: str | None, scope: Scope) -> None:
        """Lets through who may do something.

        Raises:
            HTTPException: 401 for a key that is not known, 403 for one that may not.
        """
        allowed = self.keys.allow(secret, scope)
        if allowed is None:
            raise unknown_key()
        if not allowed:
            raise HTTPException(403, f"this key may not do that: expected scope {scope}")

    async def answer(self, future: Future[T]) -> T:
        """What a thread of the service answers in time."""
        return await _told(self._answers.of(future, ANSWER_S))

    def heat(self, path: str, scope: Scope, answer: Callable[..., Awaitable[Response]]) -> None:
        """Has a route of one message answered before the application is asked."""

        def check(secret: str | None) -> None:
            self.check(secret, scope)

        (message,) = (kind for name, kind in answer.__annotations__.items() if name != "return")
        self.hot[path] = HotRoute(path, check, message, answer)

    def user(self, user_id: Id) -> Id:
        """A user id of the type that the log has.

        Raises:
            HTTPException: 422 if it is of another.
        """
        return _typed("user_id", user_id, self.service.live.user_type)

    def item(self, item_id: Id) -> Id:
        """An item id of the type that the catalogue has."""
        return _typed("item_id", item_id, self.service.live.item_type)

    def event(self, given: EventIn) -> Event:
        """An event as the log takes it."""
        for name, codes in self.service.live.model.field_codes.items():
            value = given.fields.get(name)
            if not (isinstance(value, int) and 0 <= value < codes):
                raise HTTPException(
                    422, f"fields.{name}: expected a code 0 .. {codes - 1}, received something else"
                )
        user_id, item_id = self.user(given.user_id), self.item(given.item_id)
        name = given.event_id or str(
            uuid.uuid5(uuid.NAMESPACE_OID, repr((user_id, item_id, given.timestamp)))
        )
        return Event(name, user_id, item_id, given.timestamp, given.fields)

    def listed(self, found: Listed, user_id: Id, *, stale: bool = False) -> ListOut:
        """A list as it is told."""
        return ListOut(
            items=_items(found),
            model=self.service.live.name,
            known=self.service.knows(user_id),
            stale=stale,
        )


def _items(found: Listed) -> list[ItemOut]:
    return [
        ItemOut(item_id=item, score=score)
        for item, score in zip(found.items, found.scores, strict=True)
    ]


def _typed(name: str, value: Id, kind: type[Any]) -> Id:
    # clients fold these two away where they stand in a path, so that nobody could be erased
    if value in (".", ".."):
        raise HTTPException(422, f"{name}: expected an id that can stand in a path, received dots")
    if type(value) is kind:
        return value
    raise HTTPException(
        422, f"{name}: expected {kind.__name__} as in the log, received {type(value).__name__}"
    )


def _sent(message: BaseModel) -> Response:
    """A message as it goes out, without a second look at it: the routes that are hot."""
    return Response(message.model_dump_json(), media_type="application/json")


def _not_written(error: OSError) -> HTTPException:
    log.error("the disk refuses: %s", error)
    return HTTPException(503, "it cannot be written now; try again", {"Retry-After": "5"})


async def _within(awaited: Awaitable[T]) -> T:
    return await _told(asyncio.wait_for(awaited, ANSWER_S))


async def _told(awaited: Awaitable[T]) -> T:
    """A result, or why there is none."""
    try:
        return await awaited
    except TimeoutError:
        raise HTTPException(503, "no answer in time; try again", {"Retry-After": "1"}) from None
    except (OSError, DamagedError) as error:
        log.error("the log cannot be used: %s", error)
        raise HTTPException(
            503, "the log cannot be used now; try again", {"Retry-After": "5"}
        ) from None


def _add_events(app: FastAPI, state: _State) -> None:
    service = state.service

    @app.post("/v1/events", dependencies=[state.needs("ingest")], response_model=EventsOut)
    async def post_events(given: EventsIn) -> Response:
        """Takes events; the answer comes when they are on disk and in the states."""
        events = [state.event(event) for event in given.events]
        placed = await _placed(state, events)
        return _sent(
            EventsOut(
                receipts=[
                    ReceiptOut(shard=one.shard, offset=one.receipt.offset, new=one.receipt.new)
                    for one in placed
                ]
            )
        )

    state.heat("/v1/events", "ingest", post_events)

    @app.delete("/v1/users/{user_id:path}", dependencies=[state.needs("admin")])
    async def erase_user(user_id: str) -> ErasedOut:
        """Overwrites a user's events and states."""
        name = _from_path(user_id, service.live.user_type)
        count = await state.answer(service.erase(name))
        return ErasedOut(events=count)


async def _placed(state: _State, events: list[Event]) -> list[Placed]:
    """Receipts in the order of the events."""
    service = state.service
    if len(service.shards) == 1:
        (future,) = service.ingest(events)
        return [Placed(0, receipt) for receipt in await state.answer(future)]
    order = service.by_shard(events)
    answers = await asyncio.gather(*map(state.answer, service.ingest(events)))
    receipts = {number: iter(some) for number, some in zip(order, answers, strict=True)}
    shards = (service.shard_of(event.user_id) for event in events)
    return [Placed(number, next(receipts[number])) for number in shards]


def _add_reads(app: FastAPI, state: _State) -> None:
    service = state.service

    @app.post("/v1/recommend", dependencies=[state.needs("read")], response_model=ListOut)
    async def recommend(given: RecommendIn) -> Response:
        """The best items for a user; their own items, which are left out, come from the log."""
        user_id = state.user(given.user_id)
        wanted = Wanted(
            k=given.k,
            at=given.at,
            leave_out=[state.item(item) for item in given.leave_out],
            among=None if given.among is None else [state.item(item) for item in given.among],
        )
        fresh = await _reached(service, user_id, given.min_offset)
        future = service.recommend(user_id, wanted, filter_seen=given.filter_seen)
        found = await state.answer(future)
        return _sent(state.listed(found, user_id, stale=not fresh))

    state.heat("/v1/recommend", "read", recommend)

    @app.post("/v1/rank", dependencies=[state.needs("read")])
    async def rank(given: RankIn) -> ListOut:
        """Candidates in order; those that are not in the catalogue are left out."""
        user_id = state.user(given.user_id)
        candidates = [state.item(item) for item in given.candidates]
        found = await _within(run_in_threadpool(service.rank, user_id, candidates, given.at))
        return state.listed(found, user_id)

    @app.get("/v1/items/{item_id:path}/similar", dependencies=[state.needs("read")])
    async def similar(item_id: str, k: Annotated[int, Query(ge=1, le=MAX_K)] = 10) -> ListOut:
        """The items nearest to one."""
        name = _from_path(item_id, service.live.item_type)
        try:
            found = await run_in_threadpool(service.live.similar, name, k)
        except TypeError as error:
            raise HTTPException(404, str(error)) from None
        if found is None:
            raise HTTPException(404, "no such item in the catalogue")
        return ListOut(items=_items(found), model=service.live.name)

    @app.get("/v1/users/{user_id:path}", dependencies=[state.needs("read")])
    async def user(user_id: str) -> UserOut:
        """What is known of a user."""
        name = _from_path(user_id, service.live.user_type)
        info = await _within(run_in_threadpool(service.info, name))
        if info is None:
            raise HTTPException(404, "no such user")
        events = await run_in_threadpool(service.history, name, HISTORY)
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
                    known=event.item_id in service.live.item_ids.row_of,
                )
                for event in events
            ],
        )


async def _reached(service: Service, user_id: Id, offset: int) -> bool:
    """Whether the states of a user's shard have an event, after a moment at most."""
    until = time.monotonic() + STALE_S
    while service.offset_of(user_id) < offset:
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.002)
    return True


def _from_path(value: str, kind: type[Any]) -> Id:
    """An id from a path, of the type that the log has."""
    if kind is str:
        return value
    # one way to write a number, so that one user has one address
    if re.fullmatch("0|-?[1-9][0-9]{0,18}", value, re.ASCII) and abs(int(value)) <= MAX_INT:
        return int(value)
    raise HTTPException(422, "expected an integer id, received something else")


def _add_models(app: FastAPI, state: _State) -> None:
    service = state.service

    def told() -> ModelOut:
        live, previous = service.live, service.previous
        return ModelOut(
            name=live.recommender.origin.model,
            digest=live.name,
            items=len(live.item_ids),
            users=service.num_users,
            bytes_per_user=service.bytes_per_user,
            previous=None if previous is None else previous.name,
            user_type="integer" if live.user_type is int else "text",
            item_type="integer" if live.item_type is int else "text",
            event_fields=dict(live.model.field_codes),
            exact=live.catalogue is None or live.catalogue.index is None,
            recall=None if live.catalogue is None else live.catalogue.recall,
        )

    @app.get("/v1/model", dependencies=[state.needs("read")])
    async def model() -> ModelOut:
        """The model that answers."""
        return told()

    @app.post("/v1/model", dependencies=[state.needs("admin")])
    async def switch(given: ModelIn) -> ModelOut:
        """Builds the states of another model while serving, and makes it live."""
        try:
            served_model = await run_in_threadpool(ServedModel.read, given.folder)
        # a folder may hold anything
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            log.warning("%s cannot be live_model: %s", given.folder, error)
            raise HTTPException(422, f"this model cannot be live_model: {error}") from None
        try:
            await run_in_threadpool(service.switch, served_model, since=given.since)
        except ValueError as error:
            raise HTTPException(422, f"this model cannot be live_model: {error}") from None
        except OSError as error:
            raise _not_written(error) from None
        return told()

    @app.post("/v1/model/rollback", dependencies=[state.needs("admin")])
    async def roll_back() -> ModelOut:
        """Makes the model live again that was live before."""
        try:
            await run_in_threadpool(service.roll_back)
        except ValueError as error:
            raise HTTPException(404, str(error)) from None
        except OSError as error:
            raise _not_written(error) from None
        return told()


def _add_health(app: FastAPI, state: _State) -> None:
    service = state.service

    @app.put("/v1/unavailable", dependencies=[state.needs("admin")])
    async def hide(given: UnavailableIn) -> UnavailableOut:
        """Keeps items out of every list; they replace those before, and outlive a restart."""
        try:
            await run_in_threadpool(service.hide, [state.item(item) for item in given.item_ids])
        except OSError as error:
            raise _not_written(error) from None
        return UnavailableOut(item_ids=service.hidden)

    @app.get("/v1/unavailable", dependencies=[state.needs("read")])
    async def hidden() -> UnavailableOut:
        """Items that are kept out of every list."""
        return UnavailableOut(item_ids=service.hidden)

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """The process turns."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Requests may come: states are there, the log can be written, nothing is ending."""
        if (why := service.trouble()) is not None:
            raise HTTPException(503, why)
        return {"status": "ready"}

    @app.get("/metrics", dependencies=[state.needs("admin")], include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
