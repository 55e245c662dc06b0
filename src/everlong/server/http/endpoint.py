"""A route of the API: its messages and its function, for Starlette and for OpenAPI alike."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import msgspec
from msgspec import Struct
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from everlong.server.http.access import check_access
from everlong.server.http.keys import Keys, Scope
from everlong.server.http.limits import read_body

Answer = Callable[..., Awaitable[Struct]]


@dataclass(frozen=True)
class Endpoint:
    """A route that takes and gives messages.

    Attributes:
        method: of HTTP.
        path: with parameters in braces, as Starlette writes them.
        scope: what a key has to allow; None for a route that is open to all.
        answer: the function. It takes the parameters of the path by name, and as ``given`` the
            message of the request: the JSON body of POST and PUT, the query of GET. Its docstring
            describes the route, its annotations are the messages.
    """

    method: str
    path: str
    scope: Scope | None
    answer: Answer

    @property
    def given(self) -> type[Struct] | None:
        """The message of the request."""
        found: type[Struct] | None = get_type_hints(self.answer).get("given")
        return found

    @property
    def gives(self) -> type[Struct]:
        """The message of the answer."""
        found: type[Struct] = get_type_hints(self.answer)["return"]
        return found

    @property
    def about(self) -> str:
        """What the route does."""
        return inspect.cleandoc(self.answer.__doc__ or "")

    @property
    def in_query(self) -> bool:
        """Whether the request's message is its query."""
        return self.method == "GET"

    def route(self, keys: Keys) -> Route:
        """The route of Starlette.

        A key is checked before the body is read.
        """
        scope, answer = self.scope, self.answer
        read = self._reader()

        async def respond(request: Request) -> Response:
            if scope is not None:
                check_access(request.headers, keys, scope)
            given = await read(request)
            found = await answer(**given, **request.path_params)
            return Response(msgspec.json.encode(found), media_type="application/json")

        return Route(self.path, respond, methods=[self.method], name=self.answer.__name__)

    def _reader(self) -> Callable[[Request], Awaitable[Mapping[str, Any]]]:
        """A function that reads the message of a request."""
        kind = self.given
        if kind is None:
            return _nothing
        if self.in_query:

            async def read(request: Request) -> Mapping[str, Any]:
                return {"given": msgspec.convert(dict(request.query_params), kind, strict=False)}

            return read
        decoder = msgspec.json.Decoder(kind)

        async def read_json(request: Request) -> Mapping[str, Any]:
            # a browser cannot send this type to another site without asking first
            media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media != "application/json":
                raise HTTPException(422, "expected content-type: application/json")
            return {"given": decoder.decode(await read_body(request))}

        return read_json


async def _nothing(request: Request) -> Mapping[str, Any]:
    return {}
