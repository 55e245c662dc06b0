"""Which requests are allowed: by key, and without keys by where they come from."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from everlong.server.http.keys import Keys, Scope

LOCAL_HOSTS = ["localhost", "127.0.0.1", "::1", "[::1]"]
"""Host names of a service without keys: a page of another site cannot reach it by a name of its own
(DNS rebinding)."""


def check_access(headers: Headers, keys: Keys, scope: Scope) -> None:
    """Refuses a request that may not use a scope; reads the headers alone.

    Raises:
        HTTPException: 401 for an unknown key, 403 for a key without the scope, and where the
            service has no keys 403 for a page of another site.
    """
    if not len(keys):
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise HTTPException(403, "requests from pages of other sites are refused")
        return
    allowed = keys.allow(_secret(headers), scope)
    if allowed is None:
        raise HTTPException(
            401, "expected a key: Authorization: Bearer ...", {"WWW-Authenticate": "Bearer"}
        )
    if not allowed:
        raise HTTPException(403, f"expected a key with scope {scope}, received one without it")


def _secret(headers: Headers) -> str | None:
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else None
