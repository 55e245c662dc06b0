"""The service on a real port, in a thread of the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from everlong.server.engine.service import Service
from everlong.server.http.app import make_app
from everlong.server.http.keys import Keys


@contextmanager
def running(service: Service, keys: Keys | None = None) -> Iterator[str]:
    """The address of a service, which ends with the block."""
    config = uvicorn.Config(make_app(service, keys), port=0, log_level="critical", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
