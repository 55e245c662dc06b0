"""The load generator: a stall of the server is in the latency of every request due in it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

STALL_S = 0.3
RATE = 200.0
REQUEST = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}"


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import open_loop

    return open_loop


@contextmanager
def server(stall_at: int = -1, status: bytes = b"200 OK") -> Iterator[int]:
    """A server on a thread that answers at once, but stands still before one of its answers."""
    loop, answered = asyncio.new_event_loop(), 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        while await reader.read(1_000):
            answered += 1
            if answered == stall_at:
                time.sleep(STALL_S)  # the whole server, not this connection alone
            # in two parts, as a large answer may come
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\n\r\n{")
            await asyncio.sleep(0)
            writer.write(b"  }")
        writer.close()

    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    started = loop.run_until_complete(asyncio.start_server(serve, sock=listener))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        started.close()
        # handlers of connections that the generator has closed end now
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()


def load(generator: Any, seconds: float = 1.0) -> Any:
    due = generator.arrivals(np.random.default_rng(0), (RATE, seconds))
    return generator.Load(due, [REQUEST] * len(due))


def test_a_stall_is_in_the_latency_of_every_request_due_in_it(generator: Any) -> None:
    with server(stall_at=50) as port:
        answers = generator.send(port, load(generator), ready=4)
    assert answers.good.all()
    # 60 requests were due while nothing moved: a client that waits would have sent one a connection
    waited = answers.latency[answers.latency > 0.1]
    assert len(waited) >= 0.5 * (STALL_S - 0.1) * RATE
    assert generator.summary(answers)["latency_ms"]["p99"] >= 1e3 * 0.8 * STALL_S


def test_latencies_count_from_when_a_request_is_due(generator: Any) -> None:
    with server() as port:
        answers = generator.send(port, load(generator))
    found = generator.summary(answers)
    assert found["requests"] == found["status"]["200"] == len(answers.due)
    np.testing.assert_array_equal(answers.latency, answers.done - answers.due)
    assert found["latency_ms"]["p50"] == pytest.approx(1e3 * np.median(answers.latency), rel=0.01)
    assert (answers.begun >= answers.due).all()
    assert (answers.done >= answers.begun).all()


def test_refusals_are_counted_separately(generator: Any) -> None:
    with server(status=b"429 Too Many Requests") as port:
        answers = generator.send(port, load(generator, seconds=0.2))
    found = generator.summary(answers)
    assert found["errors"] == found["status"]["429"] == len(answers.due)
    assert found["latency_ms"] == {}
    assert found["latency_of_errors_ms"]["p50"] > 0


def test_requests_without_a_response_time_out(generator: Any) -> None:
    # the system takes the connections, and no process reads them
    with socket.create_server(("127.0.0.1", 0), backlog=256) as deaf:
        answers = generator.send(
            deaf.getsockname()[1], load(generator, seconds=0.2), timeout=0.3, connections=8, ready=2
        )
    assert (answers.status == 0).all()
    assert (answers.latency >= 0.3).all()


def test_without_a_server_every_request_fails(generator: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
    answers = generator.send(port, load(generator, seconds=0.2), ready=0)
    assert len(answers.due) > 0
    assert (answers.status == 0).all()


def test_arrivals_are_poisson_in_every_phase(generator: Any) -> None:
    due = generator.arrivals(np.random.default_rng(1), (1_000.0, 20.0), (100.0, 50.0))
    assert (np.diff(due) >= 0).all()
    first, second = np.diff(due[due < 20.0]), np.diff(due[due >= 20.0])
    for gaps, rate in ((first, 1_000.0), (second, 100.0)):
        assert gaps.mean() == pytest.approx(1 / rate, rel=0.05)
        # the deviation of an exponential distribution is its mean
        assert gaps.std() == pytest.approx(1 / rate, rel=0.1)
