"""What every request over HTTP passes: counting, and one form of refusal.

A refusal says what was expected and does not repeat values that came in, which may be large.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from everlong.server.engine.shard import BehindError, FullError
from everlong.server.http.keys import Keys
from everlong.server.http.metrics import Metrics

MAX_FAULTS = 8
"""Faults of a request that are told."""

Asgi = Callable[..., Awaitable[None]]


class Counted:
    """Counts requests and their times by route, never by what is in them."""

    def __init__(self, app: Asgi, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, told)
        finally:
            name = getattr(scope.get("route"), "path", "other")
            self.metrics.observe(name, status, time.perf_counter() - began)


class Shedding:
    """Refuses at once what could not be answered in time: the rest then is.

    Requests beyond what is answered in a fifth of a second would only wait, and so would all
    that come after them.
    """

    def __init__(self, app: Asgi, most: int) -> None:
        self.app, self.most, self.now = app, most, 0
        body = b'{"detail": "too many requests at once; try again"}'
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        headers.append((b"content-length", str(len(body)).encode()))
        # made once: to refuse has to cost next to nothing
        self.start = {"type": "http.response.start", "status": 503, "headers": headers}
        self.body = {"type": "http.response.body", "body": body}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        if self.now >= self.most:
            await send(self.start)
            await send(self.body)
            return
        self.now += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.now -= 1


class Bounded:
    """Refuses bodies that are too long, also those that do not say how long they are."""

    def __init__(self, app: Asgi, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size = 0

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                raise HTTPException(413, f"a body has at most {self.most} bytes; send less at once")
            return message

        await self.app(scope, counted, send)


class Guarded:
    """Refuses before a body is read: unknown keys, and without keys the pages of others."""

    def __init__(self, app: Asgi, keys: Keys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            headers = dict(scope["headers"])
            if len(self.keys):
                if self.keys.allow(secret_of(headers), "read") is None:
                    await refused(unknown_key())(scope, receive, send)
                    return
            elif (origin := headers.get(b"origin")) is not None:
                host = headers.get(b"host", b"").decode("latin-1")
                if urlsplit(origin.decode("latin-1")).netloc != host:
                    await refusal(403, "a page from elsewhere may not ask")(scope, receive, send)
                    return
        await self.app(scope, receive, send)


def secret_of(headers: Mapping[bytes, bytes]) -> str | None:
    """The key that comes with a request."""
    scheme, _, secret = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else None


def unknown_key() -> HTTPException:
    """The error for who has no key, or none that is known."""
    told = "expected a key: Authorization: Bearer ..."
    return HTTPException(401, told, {"WWW-Authenticate": "Bearer"})


def refusal(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that says what was wrong."""
    # ASCII, because texts that came in may hold what UTF-8 cannot
    body = json.dumps({"detail": detail[:2_000]}).encode()
    return Response(body, status, headers, media_type="application/json")


def faults(error: ValidationError | RequestValidationError) -> str:
    """What is wrong with a message, without what was in it."""
    found = error.errors()
    told = [f"{_place(fault)}: {fault['msg']}" for fault in found[:MAX_FAULTS]]
    return "; ".join(told + [f"and {len(found) - MAX_FAULTS} more"] * (len(found) > MAX_FAULTS))


def _place(fault: Mapping[str, Any]) -> str:
    """Where a fault is; the name of a field that nobody knows is not told."""
    parts = fault["loc"][: -1 if fault["type"] == "extra_forbidden" else None]
    return ".".join(str(part)[:64] for part in parts)


REFUSED = (ValidationError, RequestValidationError, HTTPException, FullError, BehindError)
"""Errors that are answers."""


def refused(error: Exception) -> Response:
    """The answer to one of ``REFUSED``."""
    if isinstance(error, ValidationError | RequestValidationError):
        return refusal(422, faults(error))
    if isinstance(error, HTTPException):
        return refusal(error.status_code, str(error.detail), error.headers)
    return refusal(429 if isinstance(error, FullError) else 503, str(error), {"Retry-After": "1"})


def refuse_in_one_form(app: FastAPI) -> None:
    """Has an application answer errors as ``refused`` does."""

    async def tell(request: Request, error: Exception) -> Response:
        return refused(error)

    for kind in REFUSED:
        app.exception_handler(kind)(tell)


class HotRoute(NamedTuple):
    """A route of one message that is asked for all the time."""

    path: str
    check: Callable[[str | None], None]
    """Refuses a key that may not."""
    message: type[BaseModel]
    answer: Callable[[Any], Awaitable[Response]]


class Hot:
    """Answers some routes before the application does, from the same functions.

    Of what an application does for a request these need little: most of its time is saved.
    """

    def __init__(self, app: Asgi, routes: Mapping[str, HotRoute]) -> None:
        self.app, self.routes = app, routes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        route = self.routes.get(scope["path"]) if scope["type"] == "http" else None
        if route is None or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        scope["route"] = route
        try:
            response = await self._answer(route, dict(scope["headers"]), receive)
        except REFUSED as error:
            response = refused(error)
        await response(scope, receive, send)

    async def _answer(self, route: HotRoute, headers: Mapping[bytes, bytes], receive: Any) -> Any:
        route.check(secret_of(headers))
        # what a foreign page may send unasked cannot have this type
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise HTTPException(422, "expected content-type: application/json")
        body, more = bytearray(), True
        while more:
            part = await receive()
            body.extend(part.get("body", b""))
            more = part.get("more_body", False)
        return await route.answer(route.message.model_validate_json(bytes(body)))
