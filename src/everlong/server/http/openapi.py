"""The description of the API by OpenAPI 3.1, from the endpoints and the schemas of msgspec."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from everlong import __version__
from everlong.server.http.endpoint import Endpoint
from everlong.server.http.messages import MAX_ID, ErrorOut

ERRORS = {
    400: "malformed request, or a host name of another site",
    401: "unknown key",
    403: "key without the scope, or a page of another site",
    404: "not found",
    413: "body too large",
    422: "not the expected message",
    429: "a queue is full; try again after Retry-After seconds",
    503: "the service cannot answer now; try again after Retry-After seconds",
}


def describe(endpoints: Sequence[Endpoint], *, secured: bool) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        endpoints: of the API.
        secured: whether the service has keys.
    """
    kinds = [kind for one in endpoints for kind in (one.given, one.gives) if kind is not None]
    schemas, components = msgspec.json.schema_components(
        [*kinds, ErrorOut], ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip([*kinds, ErrorOut], schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for one in endpoints:
        operation = _operation(one, schema_of, components)
        if secured and one.scope is not None:
            operation["security"] = [{"key": []}]
        path = re.sub(r"{(\w+):\w+}", r"{\1}", one.path)
        paths.setdefault(path, {})[one.method.lower()] = operation
    for kind in {one.given for one in endpoints if one.given is not None and one.in_query}:
        del components[kind.__name__]
    found: dict[str, Any] = {"schemas": components}
    if secured:
        found["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "everlong",
            "version": __version__,
            "description": "Durable events in, recommendations out.",
        },
        "paths": paths,
        "components": found,
    }


def _operation(
    one: Endpoint, schema_of: dict[Any, dict[str, Any]], components: dict[str, Any]
) -> dict[str, Any]:
    summary, _, more = one.about.partition("\n")
    scope = "" if one.scope is None else f"\n\nScope of the key: `{one.scope}`."
    found: dict[str, Any] = {
        "operationId": one.answer.__name__,
        "tags": ["probes" if one.scope is None else one.path.split("/")[2]],
        "summary": summary,
        "description": (more + scope).strip(),
        "responses": {
            "200": {"description": "done", "content": _json(schema_of[one.gives])},
            **{
                str(status): {"description": about, "content": _json(schema_of[ErrorOut])}
                for status, about in ERRORS.items()
            },
        },
    }
    parameters = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1, "maxLength": MAX_ID},
        }
        for name in re.findall(r"{(\w+)", one.path)
    ]
    if one.given is not None and one.in_query:
        whole = components[one.given.__name__]
        parameters += [
            {
                "name": name,
                "in": "query",
                "required": name in whole.get("required", ()),
                "schema": schema,
            }
            for name, schema in whole["properties"].items()
        ]
    elif one.given is not None:
        found["requestBody"] = {"required": True, "content": _json(schema_of[one.given])}
    if parameters:
        found["parameters"] = parameters
    return found


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
