"""The service as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from everlong.server.engine.service import Service
from everlong.server.http.access import LOCAL_HOSTS
from everlong.server.http.console import page_routes
from everlong.server.http.keys import Keys
from everlong.server.http.limits import MAX_AT_ONCE, Shedding
from everlong.server.http.metrics import Counting, Metrics
from everlong.server.http.openapi import describe
from everlong.server.http.refusals import HANDLERS
from everlong.server.http.routes_events import event_endpoints
from everlong.server.http.routes_health import metrics_route, probe_endpoints
from everlong.server.http.routes_lists import list_endpoints
from everlong.server.http.routes_models import model_endpoints
from everlong.server.http.routes_users import user_endpoints


def make_app(
    service: Service, keys: Keys | None = None, *, max_at_once: int = MAX_AT_ONCE
) -> Starlette:
    """The application around a service, which it closes at its end.

    Args:
        service: open, with its states.
        keys: API keys; without any, all scopes are open, to this machine alone.
        max_at_once: requests in work; more are refused.
    """
    keys = keys or Keys()
    metrics = Metrics(service)
    # the first match answers, so the routes of most requests come first
    endpoints = [
        *event_endpoints(service),
        *list_endpoints(service),
        *user_endpoints(service),
        *model_endpoints(service),
        *probe_endpoints(service),
    ]
    document = msgspec.json.encode(describe(endpoints, secured=bool(len(keys))))

    async def openapi(request: Request) -> Response:
        return Response(document, media_type="application/json")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    middleware = [Middleware(Counting, metrics), Middleware(Shedding, max_at_once)]
    if not len(keys):
        middleware.insert(1, Middleware(TrustedHostMiddleware, LOCAL_HOSTS))
    return Starlette(
        routes=[
            *(one.route(keys) for one in endpoints),
            metrics_route(metrics, keys),
            Route("/openapi.json", openapi, include_in_schema=False),
            *page_routes(),
        ],
        middleware=middleware,
        exception_handlers=HANDLERS,
        lifespan=lifespan,
    )
