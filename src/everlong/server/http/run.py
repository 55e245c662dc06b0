"""The service as a process: its requirements, its address, its end.

The server is uvicorn under Starlette. Measured on one core with the engine in the same process
(``benchmarks/http_frameworks.py``), Granian needs 90 to 120 microseconds more CPU for a request by
ASGI and 25 to 80 more by RSGI: its threads hand every request to the thread of the interpreter.
"""

from __future__ import annotations

import gc
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from everlong.server.engine.served_model import ServedModel
from everlong.server.engine.service import Service

log = logging.getLogger(__name__)

DRAIN_S = 20
"""Seconds that requests in flight may take after the signal to end."""

TURN_S = 0.001
"""Seconds that a thread holds the interpreter's lock while others wait for it."""

MAX_CONNECTIONS = 4_096
MAX_WAITING = 1 << 30
"""Bytes of a write-ahead log up to which the log is read as a whole beside the writer."""

DAMAGED = 3
"""Exit code of ``everlong verify`` for a log that is not what was written."""


def run_service(
    model: Path,
    data_dir: Path,
    *,
    host: str,
    port: int,
    keys: Path | None,
    shards: int,
    drain: float = 0.0,
    verify: bool = True,
    say: Callable[[str], None],
) -> None:
    """Serves until SIGTERM or Ctrl-C; then answers requests in flight and writes all states.

    Args:
        model: the model folder.
        data_dir: folder of events and states.
        host: address to listen on.
        port: 0 takes a free port; the first line names it.
        keys: file of API keys.
        shards: number of shards of a new data folder.
        drain: seconds from SIGTERM, when ``/readyz`` begins to refuse, until new requests are
            refused, so that a load balancer has time to notice.
        verify: whether another process verifies the whole log after the start.
        say: takes lines for the user.

    Raises:
        ImportError: without the extra ``serve``.
        ValueError: if other machines can reach the service and there are no keys, or the model or
            the data are damaged.
        OSError: if the address is taken or the data cannot be opened.
    """
    try:
        import uvicorn

        from everlong.server.http.app import make_app
        from everlong.server.http.keys import Keys
    except ImportError as error:
        raise ImportError('serving takes more: pip install "everlong[serve]"') from error
    known = Keys() if keys is None else Keys.read(keys)
    if not len(known) and not is_loopback(host):
        raise ValueError(
            f"other machines can reach {host}: expected --keys with a file of API keys, received "
            "none; or listen on 127.0.0.1"
        )
    # one thread a product: further threads would wait for the writer's core
    torch.set_num_threads(1)
    # a request takes the interpreter's lock several times, so waits for it must be short
    sys.setswitchinterval(TURN_S)
    served_model = ServedModel.read(model)
    with socket.create_server((host, port), family=family_of(host)) as listener:
        service = Service(data_dir, served_model, shards=shards)
        try:
            app = make_app(service, known)
            config = uvicorn.Config(
                app,
                access_log=False,
                log_level="warning",
                lifespan="on",
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=DRAIN_S,
                timeout_keep_alive=30,
                server_header=False,
                # keys decide on access, never an address that a proxy reports
                proxy_headers=False,
            )
            bound = listener.getsockname()
            name = service.live.recommender.origin.model
            say(f"serving {name} on http://{bound[0]}:{bound[1]}")
            say(
                f"{service.num_users:,} users, {service.bytes_per_user:,} bytes each, in {data_dir}"
            )
            # objects made until now stay alive, so the collector need not visit them again
            gc.collect()
            gc.freeze()
            # uvicorn raises the signal again after its end
            signal.signal(signal.SIGTERM, lambda *_: None)
            with _verified(service) if verify else nullcontext():
                _server(uvicorn.Server, config, service, drain).run(sockets=[listener])
        finally:
            # also where the application did not reach its end
            service.close()


def _server(kind: Any, config: Any, service: Service, drain: float) -> Any:
    """A server whose readiness probe fails before the server refuses requests."""

    class Server(kind):  # type: ignore[misc]
        def handle_exit(self, sig: int, frame: Any) -> None:
            first, service.draining = not service.draining, True
            if first and drain > 0:
                threading.Timer(drain, super().handle_exit, [sig, frame]).start()
            else:
                super().handle_exit(sig, frame)

    return Server(config)


@contextmanager
def _verified(service: Service) -> Iterator[None]:
    """Verifies the whole log in another process; a damaged log makes the service not ready."""
    command = [sys.executable, "-m", "everlong", "verify", str(service.folder)]
    process = subprocess.Popen(  # noqa: S603 - this program, and a folder that it has open
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    # lowest priority: it runs when the service is idle
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
    watching = threading.Thread(target=_watch, args=[process, service], name="verify")
    watching.start()
    try:
        yield
    finally:
        process.terminate()
        watching.join()


def _watch(process: subprocess.Popen[bytes], service: Service) -> None:
    told = b""
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            told = process.communicate(timeout=1.0)[1]
        # a reader of the whole log keeps the write-ahead log from being moved into the file
        if any(shard.log.backlog > MAX_WAITING for shard in service.shards):
            process.terminate()
            log.warning("verification was given up, too much was written: verify a copy")
    if process.returncode == DAMAGED:
        log.error("the log is damaged: %s", told.decode(errors="replace").strip())
        service.damage = "the log is damaged: see what `everlong verify` says"
    elif process.returncode > 0:
        log.warning("the log could not be verified: %s", told.decode(errors="replace").strip())


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def family_of(host: str) -> socket.AddressFamily:
    """IPv6 for its addresses, else IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET
