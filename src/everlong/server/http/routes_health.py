"""Routes for machines: probes, and metrics for Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from everlong.server.engine.service import Service
from everlong.server.http.access import check_access
from everlong.server.http.endpoint import Endpoint
from everlong.server.http.keys import Keys
from everlong.server.http.messages import StatusOut
from everlong.server.http.metrics import Metrics


def probe_endpoints(service: Service) -> list[Endpoint]:
    """The probes, open to all."""

    async def livez() -> StatusOut:
        """Liveness probe: returns 200 while the event loop runs."""
        return StatusOut("ok")

    async def readyz() -> StatusOut:
        """Readiness probe: returns 200 while the service can take requests.

        The states are built, the log can be written, and the service is not ending.
        """
        if (trouble := service.trouble()) is not None:
            raise HTTPException(503, trouble)
        return StatusOut("ready")

    return [
        Endpoint("GET", "/livez", None, livez),
        Endpoint("GET", "/readyz", None, readyz),
    ]


def metrics_route(metrics: Metrics, keys: Keys) -> Route:
    """``/metrics`` in the text format of Prometheus."""

    async def answer(request: Request) -> Response:
        check_access(request.headers, keys, "admin")
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return Route("/metrics", answer, include_in_schema=False)
