"""An open-loop HTTP load generator: arrival times are drawn in advance, independent of responses.

A closed-loop client, which waits for a response before it sends the next request, stops sending
while the server stalls, and so measures one slow request where many users would have waited
(coordinated omission). Here the latency of a request counts from its scheduled arrival.

The HTTP client is written by hand because a general client costs more CPU than the server that it
measures: requests are prepared bytes, and only status and length of a response are parsed.
"""

from __future__ import annotations

import asyncio
import gc
import select
import selectors
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LATE_S = 0.002
"""Maximum p99 delay of a request behind its schedule; above it the generator is too slow."""

SWEEP_S = 0.1


class Load(NamedTuple):
    """``N`` requests and their arrival times."""

    due: np.ndarray
    """Seconds from the start, increasing, ``[N]``."""
    requests: Sequence[bytes]


class Answers(NamedTuple):
    """The responses to ``N`` requests; times in seconds from the start, each ``[N]``."""

    due: np.ndarray
    begun: np.ndarray
    """When the generator processed the request: later than due if the generator is slow."""
    done: np.ndarray
    """When the last byte of the response arrived, or the request timed out."""
    status: np.ndarray
    """The HTTP status; 0 without a response."""

    @property
    def latency(self) -> np.ndarray:
        """Seconds from the arrival time of each request, ``[N]``."""
        return self.done - self.due

    @property
    def good(self) -> np.ndarray:
        """Whether the status is 2xx, ``[N]``."""
        return self.status // 100 == 2

    def where(self, chosen: np.ndarray) -> Answers:
        """A subset of the responses."""
        return Answers(*(values[chosen] for values in self))


def arrivals(draw: np.random.Generator, *phases: tuple[float, float]) -> np.ndarray:
    """Poisson arrivals in consecutive phases, each with a rate per second and a duration."""
    times, start = [np.zeros(0)], 0.0
    for rate, seconds in phases:
        # given their Poisson-distributed number, arrivals are uniform over the phase
        count = draw.poisson(rate * seconds)
        times.append(start + np.sort(draw.uniform(0.0, seconds, count)))
        start += seconds
    return np.concatenate(times)


def send(
    port: int, load: Load, *, timeout: float = 5.0, connections: int = 4_000, ready: int = 64
) -> Answers:
    """Sends a load to a local port and returns when all requests have a response or timed out.

    Args:
        port: the port of an HTTP/1.1 server with persistent connections.
        load: the requests and their arrival times.
        timeout: seconds from its arrival time after which a request times out.
        connections: maximum number of open connections; the wait for one counts as latency.
        ready: connections that are opened before the first request.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=_loop) as runner:
            return runner.run(_Sender(port, load, timeout, connections).run(ready))
    finally:
        if collecting:
            gc.enable()


def percentiles_ms(seconds: np.ndarray) -> dict[str, float]:
    """p50, p90, p99, p99.9 and the maximum of all samples, in milliseconds."""
    if not len(seconds):
        return {}
    points = np.percentile(seconds, (50, 90, 99, 99.9, 100))
    names = ("p50", "p90", "p99", "p99.9", "max")
    return {name: round(1e3 * float(point), 2) for name, point in zip(names, points, strict=True)}


def summary(answers: Answers) -> dict[str, object]:
    """Latencies of successes and of errors, and whether the generator kept up.

    Latencies count from the arrival times, so a slow generator increases them;
    ``generator_kept_up`` is True if they are those of the server.
    """
    good, lag = answers.good, answers.begun - answers.due
    seen, counts = np.unique(answers.status, return_counts=True)
    return {
        "requests": len(good),
        "errors": int((~good).sum()),
        "status": {str(code): int(n) for code, n in zip(seen, counts, strict=True)},
        "latency_ms": percentiles_ms(answers.latency[good]),
        "latency_of_errors_ms": percentiles_ms(answers.latency[~good]),
        "generator_late_ms": percentiles_ms(lag),
        "generator_kept_up": bool(np.percentile(lag, 99) <= LATE_S) if len(lag) else True,
    }


class _Microseconds(selectors.EpollSelector):
    """A selector with microsecond resolution: ``select`` on the epoll, which has milliseconds."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            select.select([self.fileno()], [], [], timeout)
        return super().select(0)


def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.SelectorEventLoop(_Microseconds())


class _Connection(asyncio.Protocol):
    """A connection with at most one request in flight."""

    transport: asyncio.Transport

    def __init__(self, sender: _Sender) -> None:
        self.sender, self.number, self.data = sender, -1, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found:
            return
        head = head.lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) >= length:
            self.data = b""
            self.sender.answered(self, int(head[9:12]), closes=b"connection: close" in head)

    def connection_lost(self, error: Exception | None) -> None:
        self.sender.lost(self)


class _Sender:
    """One run of a load."""

    def __init__(self, port: int, load: Load, timeout: float, connections: int) -> None:
        self.port, self.load, self.timeout, self.connections = port, load, timeout, connections
        count = len(load.due)
        self.due = load.due.tolist()
        self.begun, self.done = np.zeros(count), np.zeros(count)
        self.status = np.zeros(count, dtype=np.int64)
        self.next, self.left, self.open = 0, count, 0
        self.idle: list[_Connection] = []
        self.waiting: deque[int] = deque()
        self.flying: dict[int, _Connection] = {}
        self.opening: set[asyncio.Task[None]] = set()

    async def run(self, ready: int) -> Answers:
        self.loop = asyncio.get_running_loop()
        self.finished = self.loop.create_future()
        await asyncio.gather(*(self._connect() for _ in range(min(ready, self.connections))))
        self.start = self.loop.time() + 0.01
        if self.left:
            self._send_due()
            self._sweep()
            await self.finished
        for connection in self.idle:
            connection.transport.abort()
        return Answers(self.load.due, self.begun, self.done, self.status)

    def _send_due(self) -> None:
        """Starts all requests that are due, and schedules itself for the next one."""
        while self.next < len(self.due):
            now = self.loop.time() - self.start
            if self.due[self.next] > now:
                self.loop.call_at(self.start + self.due[self.next], self._send_due)
                return
            self.begun[self.next] = now
            if self.idle:
                self._send(self.idle.pop(), self.next)
            else:
                self.waiting.append(self.next)
                if self.open < self.connections:
                    task = self.loop.create_task(self._connect())
                    self.opening.add(task)
                    task.add_done_callback(self.opening.discard)
            self.next += 1

    def _send(self, connection: _Connection, number: int) -> None:
        connection.number = number
        self.flying[number] = connection
        connection.transport.write(self.load.requests[number])

    async def _connect(self) -> None:
        self.open += 1
        try:
            _, connection = await self.loop.create_connection(
                lambda: _Connection(self), "127.0.0.1", self.port
            )
        except OSError:
            self.open -= 1
            if self.waiting:
                self._finish(self.waiting.popleft(), 0)
            return
        self._free(connection)

    def _free(self, connection: _Connection) -> None:
        if self.waiting:
            self._send(connection, self.waiting.popleft())
        else:
            self.idle.append(connection)

    def answered(self, connection: _Connection, status: int, *, closes: bool) -> None:
        number, connection.number = connection.number, -1
        self.flying.pop(number, None)
        if number >= 0:
            self._finish(number, status)
        if not closes:
            self._free(connection)

    def lost(self, connection: _Connection) -> None:
        self.open -= 1
        if connection in self.idle:
            self.idle.remove(connection)
        number, connection.number = connection.number, -1
        if self.flying.pop(number, None):
            self._finish(number, 0)

    def _finish(self, number: int, status: int) -> None:
        self.done[number], self.status[number] = self.loop.time() - self.start, status
        self.left -= 1
        if not self.left:
            self.finished.set_result(None)

    def _sweep(self) -> None:
        """Times out overdue requests."""
        limit = self.loop.time() - self.start - self.timeout
        while self.waiting and self.due[self.waiting[0]] < limit:
            self._finish(self.waiting.popleft(), 0)
        for number, connection in list(self.flying.items()):
            if self.due[number] < limit:
                connection.transport.abort()
        if self.left:
            self.loop.call_later(SWEEP_S, self._sweep)
