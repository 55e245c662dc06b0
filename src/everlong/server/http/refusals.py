"""Every error as one form of answer: ``{"detail": "..."}``, short, whatever the request held."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from everlong.server.engine.write_queue import FullError
from everlong.server.engine.writer import BehindError
from everlong.server.store.log import DamagedError

log = logging.getLogger(__name__)

LONGEST = 2_000
"""Characters of a detail."""


def refusal(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that says what was wrong."""
    # ASCII, because an error may quote text that UTF-8 cannot encode
    body = json.dumps({"detail": detail[:LONGEST]}).encode()
    return Response(body, status, headers, media_type="application/json")


async def http_error(request: Request, error: HTTPException) -> Response:
    """A refusal that a route raised, or Starlette itself (404, 405)."""
    return refusal(error.status_code, error.detail, error.headers)


async def malformed(request: Request, error: Exception) -> Response:
    """A body or parameters that are not the expected message."""
    # the name of an unknown field comes from the request and may be large
    return refusal(422, re.sub(r"unknown field `.*`", "an unknown field", str(error), flags=re.S))


async def overloaded(request: Request, error: Exception) -> Response:
    """A full queue (429), or states that lag behind the log (503)."""
    status = 429 if isinstance(error, FullError) else 503
    return refusal(status, str(error), {"Retry-After": "1"})


async def late(request: Request, error: Exception) -> Response:
    """No answer in time."""
    return refusal(503, "no answer in time; try again", {"Retry-After": "1"})


async def unusable(request: Request, error: Exception) -> Response:
    """A disk that refuses, or a damaged log."""
    log.error("the data folder cannot be used: %s", error)
    return refusal(503, "the log cannot be used now; try again", {"Retry-After": "5"})


async def failed(request: Request, error: Exception) -> Response:
    """An error of the service itself; the server logs it."""
    return refusal(500, "internal error; see the log of the service")


HANDLERS: dict[type[Exception], Any] = {
    HTTPException: http_error,
    msgspec.DecodeError: malformed,
    UnicodeDecodeError: malformed,
    RecursionError: malformed,
    FullError: overloaded,
    BehindError: overloaded,
    TimeoutError: late,
    OSError: unusable,
    DamagedError: unusable,
    Exception: failed,
}
