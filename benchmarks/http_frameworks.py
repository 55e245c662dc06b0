"""What HTTP costs: servers and frameworks side by side on the real engine.

    pip install granian litestar fastapi                            # beside everlong[dev]
    python benchmarks/http_frameworks.py compare                    # all that are installed
    python benchmarks/http_frameworks.py compare --only everlong --only starlette-uvicorn

Every candidate serves ``POST /v1/events`` (one durable event) and ``POST /v1/recommend`` from the
same engine, and ``POST /echo``, which sends the body back. Each gets the same load: four events to
one request for ten items, open-loop, then echo alone. The server has one core and the generator
another. CPU is user and system time of the server's process, from ``/proc``.

The candidates check types and bounds of messages and answer errors; keys, counting and limits are
in ``everlong`` alone, which is the service as it is.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import importlib.util
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
import torch
import typer

from everlong.server.engine.served_model import ServedModel, Wanted
from everlong.server.engine.service import Service
from everlong.server.store.log import Event
from open_loop import Load, arrivals, send, summary
from record import write_result
from service_load import (
    Server,
    Usage,
    copied,
    http,
    mixture,
    model_folder,
    prompt,
    serving,
    setting,
    states_folder,
)

ITEMS, USERS, HISTORY, SHARE = 100_000, 20_000, 400_000, 0.8
PACKAGES = ("fastapi", "granian", "litestar", "msgspec", "pydantic", "starlette", "uvicorn")
ECHO = {"user_id": "u0000001", "k": 10}
T = TypeVar("T")
app = typer.Typer(help=__doc__, add_completion=False)

Id = (
    Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)]
    | Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
)


class EventIn(msgspec.Struct, forbid_unknown_fields=True):
    user_id: Id
    item_id: Id
    timestamp: Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
    event_id: Annotated[str, msgspec.Meta(max_length=128)] = ""


class EventsIn(msgspec.Struct, forbid_unknown_fields=True):
    events: Annotated[list[EventIn], msgspec.Meta(min_length=1, max_length=1_000)]


class RecommendIn(msgspec.Struct, forbid_unknown_fields=True):
    user_id: Id
    k: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 10


class Receipt(msgspec.Struct):
    shard: int
    offset: int
    new: bool


class EventsOut(msgspec.Struct):
    receipts: list[Receipt]


class Item(msgspec.Struct):
    item_id: Id
    score: float


class ListOut(msgspec.Struct):
    items: list[Item]
    model: str
    known: bool


class Engine:
    """The service, with a message in and a message out."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def events(self, given: EventsIn) -> EventsOut:
        events = [Event(e.event_id, e.user_id, e.item_id, e.timestamp, {}) for e in given.events]
        (future,) = self.service.ingest(events)
        receipts = await self.answer(future)
        return EventsOut([Receipt(0, one.offset, one.new) for one in receipts])

    async def recommend(self, given: RecommendIn) -> ListOut:
        found = await self.answer(self.service.recommend(given.user_id, Wanted(k=given.k)))
        items = [Item(*pair) for pair in zip(found.items, found.scores, strict=True)]
        return ListOut(items, self.service.live.name, self.service.knows(given.user_id))

    async def answer(self, future: Future[T]) -> T:
        return await asyncio.wait_for(asyncio.wrap_future(future), 2.0)


EVENTS, RECOMMEND = msgspec.json.Decoder(EventsIn), msgspec.json.Decoder(RecommendIn)
encode = msgspec.json.encode
BAD = b'{"detail":"expected another message"}'


async def answered(engine: Engine, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of an answer: for the candidates without a framework."""
    try:
        if path == "/v1/events":
            return 200, encode(await engine.events(EVENTS.decode(body)))
        if path == "/v1/recommend":
            return 200, encode(await engine.recommend(RECOMMEND.decode(body)))
    except msgspec.ValidationError:
        return 422, BAD
    if path == "/echo":
        return 200, body
    return (200, b"{}") if path == "/readyz" else (404, BAD)


# applications


def fastapi_app(service: Service) -> Any:
    """The service on FastAPI with pydantic messages, without a router in front of it."""
    from fastapi import FastAPI, Request, Response
    from pydantic import BaseModel, ConfigDict, Field

    engine, made = Engine(service), FastAPI()

    class Event(BaseModel):
        model_config = ConfigDict(extra="forbid")
        user_id: str | int
        item_id: str | int
        timestamp: int = Field(ge=0, le=1 << 40)
        event_id: str = Field(default="", max_length=128)

    class Events(BaseModel):
        model_config = ConfigDict(extra="forbid")
        events: list[Event] = Field(min_length=1, max_length=1_000)

    class Asked(BaseModel):
        model_config = ConfigDict(extra="forbid")
        user_id: str | int
        k: int = Field(default=10, ge=1, le=1_000)

    async def events(given: Events) -> Response:
        return Response(encode(await engine.events(msgspec.convert(given.model_dump(), EventsIn))))

    async def recommend(given: Asked) -> Response:
        asked = RecommendIn(given.user_id, given.k)
        return Response(encode(await engine.recommend(asked)))

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    # names of local classes are not found by their text
    events.__annotations__["given"], recommend.__annotations__["given"] = Events, Asked
    echo.__annotations__["request"] = Request
    made.post("/v1/events", response_model=None)(events)
    made.post("/v1/recommend", response_model=None)(recommend)
    made.post("/echo", response_model=None)(echo)
    made.get("/readyz", response_model=None)(lambda: Response(b"{}"))
    return made


def starlette_app(service: Service) -> Any:
    """Starlette with msgspec."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    engine = Engine(service)

    async def invalid(request: Request, error: Exception) -> Response:
        return Response(BAD, 422)

    async def events(request: Request) -> Response:
        return Response(encode(await engine.events(EVENTS.decode(await request.body()))))

    async def recommend(request: Request) -> Response:
        return Response(encode(await engine.recommend(RECOMMEND.decode(await request.body()))))

    async def echo(request: Request) -> Response:
        return Response(await request.body())

    async def ready(request: Request) -> Response:
        return Response(b"{}")

    routes = [
        Route("/v1/events", events, methods=["POST"]),
        Route("/v1/recommend", recommend, methods=["POST"]),
        Route("/echo", echo, methods=["POST"]),
        Route("/readyz", ready),
    ]
    return Starlette(routes=routes, exception_handlers={msgspec.ValidationError: invalid})


def litestar_app(service: Service) -> Any:
    """Litestar, whose own messages are msgspec's."""
    from litestar import Litestar, Request, get, post

    engine = Engine(service)

    @post("/v1/events", status_code=200)
    async def events(data: EventsIn) -> EventsOut:
        return await engine.events(data)

    @post("/v1/recommend", status_code=200)
    async def recommend(data: RecommendIn) -> ListOut:
        return await engine.recommend(data)

    @post("/echo", status_code=200)
    async def echo(request: Request[Any, Any, Any]) -> bytes:
        return await request.body()

    @get("/readyz")
    async def ready() -> dict[str, str]:
        return {}

    return Litestar([events, recommend, echo, ready])


def asgi_app(service: Service) -> Any:
    """ASGI without a framework, with msgspec."""
    engine = Engine(service)

    async def made(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            part = await receive()
            body += part.get("body", b"")
            more = part.get("more_body", False)
        status, content = await answered(engine, scope["path"], body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return made


def rsgi_app(service: Service) -> Any:
    """RSGI, the protocol of Granian, with msgspec."""
    engine = Engine(service)
    headers = [("content-type", "application/json")]

    async def made(scope: Any, protocol: Any) -> None:
        status, content = await answered(engine, scope.path, await protocol())
        protocol.response_bytes(status, headers, content)

    return made


# servers


def on_uvicorn(made: Any, port: int, name: str) -> None:
    import uvicorn

    uvicorn.run(made, port=port, access_log=False, log_level="warning")


def on_granian(made: Any, port: int, name: str) -> None:
    import uvloop
    from granian.constants import HTTPModes, Interfaces
    from granian.server.embed import Server as Granian

    async def run() -> None:
        interface = Interfaces.RSGI if name.startswith("rsgi") else Interfaces.ASGINL
        server = Granian(
            made,
            port=port,
            interface=interface,
            http=HTTPModes.http1,
            websockets=False,
            backlog=1_024,
            backpressure=4_096,
            log_enabled=False,
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
        await server.serve()

    uvloop.run(run())


CANDIDATES: dict[str, tuple[Callable[[Service], Any], Callable[[Any, int, str], None]]] = {
    "fastapi-uvicorn": (fastapi_app, on_uvicorn),
    "starlette-uvicorn": (starlette_app, on_uvicorn),
    "asgi-uvicorn": (asgi_app, on_uvicorn),
    "starlette-granian": (starlette_app, on_granian),
    "litestar-granian": (litestar_app, on_granian),
    "asgi-granian": (asgi_app, on_granian),
    "rsgi-granian": (rsgi_app, on_granian),
}
NAMES = ["everlong", *CANDIDATES]
"""``everlong`` is the service with keys, counting and limits."""


@app.command()
def serve(
    name: str,
    model: Path,
    data_dir: Annotated[Path, typer.Option()],
    port: Annotated[int, typer.Option()],
) -> None:
    """Serves one candidate, as `everlong serve` does."""
    torch.set_num_threads(1)
    sys.setswitchinterval(0.001)
    make, run = CANDIDATES[name]
    service = Service(data_dir, ServedModel.read(model))
    gc.collect()
    gc.freeze()
    try:
        run(make(service), port, name)
    finally:
        service.close()


@app.command()
def compare(
    only: Annotated[list[str] | None, typer.Option(help="Of the candidates, repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Through all candidates, every second back.")] = 2,
    rate: Annotated[float, typer.Option(help="Requests per second.")] = 1_000.0,
    seconds: Annotated[float, typer.Option(help="Of the mix, with those not counted.")] = 13.0,
    uncounted: Annotated[float, typer.Option(help="First seconds, not counted.")] = 3.0,
    record: Annotated[str, typer.Option(help="Name of the record; empty for none.")] = "",
) -> None:
    """CPU a request and latencies of every candidate at one rate."""
    names = only or [name for name in NAMES if is_installed(name)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    source, model = states_folder(USERS, ITEMS, HISTORY), model_folder(ITEMS)
    for number in range(rounds):
        for name in names[:: -1 if number % 2 else 1]:
            with copied(source) as data:
                found[name].append(measured(name, model, data, rate, seconds, uncounted))
            typer.echo(f"{name}: {found[name][-1]}", err=True)
    figures = {
        **setting(ITEMS, USERS, HISTORY, False),
        "rate": rate,
        "events_share": SHARE,
        "k": 10,
        "seconds": seconds,
        "uncounted_seconds": uncounted,
        "packages": {name: importlib.metadata.version(name) for name in there()},
        "candidates": found,
    }
    if record:
        typer.echo(f"written to {write_result(record, figures)}")


def is_installed(candidate: str) -> bool:
    """Whether the packages are there that a candidate is named after."""
    return not set(PACKAGES).difference(there()) & set(candidate.split("-"))


def there() -> list[str]:
    """The packages of ``PACKAGES`` that are installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name)]


def measured(
    name: str, model: Path, data: Path, rate: float, seconds: float, uncounted: float
) -> dict[str, Any]:
    """One candidate under the mix and under echo alone."""
    program = None if name == "everlong" else [__file__, "serve", name]
    with serving(model, data, first=False, program=program) as server, prompt():
        draw = np.random.default_rng(2)
        send(server.port, mixture(arrivals(draw, (rate, uncounted)), USERS, ITEMS, SHARE, 4)[0])
        due = arrivals(draw, (rate, seconds - uncounted))
        mix = used(server, mixture(due, USERS, ITEMS, SHARE, 5)[0])
        if program is None:
            return {"mix": mix}
        due = arrivals(draw, (rate, (seconds - uncounted) / 2))
        echo = used(server, Load(due, [http("/echo", ECHO)] * len(due)))
    ratio = mix["cpu_us_per_request"] / echo["cpu_us_per_request"]
    return {"mix": mix, "echo": echo, "mix_of_echo": round(ratio, 2)}


def used(server: Server, load: Load) -> dict[str, Any]:
    """CPU a request and latencies of a load."""
    usage, before = Usage(server), server.cpu_s
    answers = send(server.port, load)
    cpu = 1e6 * (server.cpu_s - before) / len(load.due)
    return {
        "cpu_us_per_request": round(cpu, 1),
        "used": usage.shares(),
        **summary(answers),
    }


if __name__ == "__main__":
    app()
