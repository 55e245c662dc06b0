"""Pages for people: a console at ``/`` and the routes of the service at ``/docs``.

They are files of this package, load nothing from anywhere else, and hold no data: what they show
they ask of the routes, with the key that their reader gave.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request, Response

FILES = Path(__file__).with_name("pages")
PAGES = {
    "/": "console.html",
    "/console.js": "console.js",
    "/console.css": "console.css",
    "/docs": "docs.html",
    "/docs.js": "docs.js",
}
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # a service that was renewed must not meet the pages of the one before
    "Cache-Control": "no-cache",
}


def add_console(app: FastAPI) -> None:
    """Adds the pages, open to all, and what they load.

    Raises:
        OSError: if a file of the package is missing.
    """
    for path, name in PAGES.items():
        _add(app, path, FILES / name)


def _add(app: FastAPI, path: str, file: Path) -> None:
    content = file.read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=KINDS[file.suffix], headers=HEADERS)

    app.add_route(path, page, include_in_schema=False)
