"""Pages for people: a console at ``/`` and the description of the API at ``/docs``.

They are files of this package, load nothing from another site, and hold no data: what they show
comes from the routes, with the key that the reader entered. ``/docs`` is Swagger UI, unchanged, in
``pages/swagger-ui`` with its licence: the smallest viewer that needs neither inline styles nor
``eval``, which the Content-Security-Policy forbids.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = Path(__file__).with_name("pages")
PAGES = {
    "/": "console.html",
    "/console.js": "console.js",
    "/console.css": "console.css",
    "/docs": "docs.html",
    "/docs.js": "docs.js",
    "/swagger-ui-bundle.js": "swagger-ui/swagger-ui-bundle.js",
    "/swagger-ui.css": "swagger-ui/swagger-ui.css",
}
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # a newer service must not meet the pages of an older one
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """The pages and what they load, open to all.

    Raises:
        OSError: if a file of the package is missing.
    """
    return [_route(path, FILES / name) for path, name in PAGES.items()]


def _route(path: str, file: Path) -> Route:
    content = file.read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=KINDS[file.suffix], headers=HEADERS)

    return Route(path, page, include_in_schema=False)
