"""Load tests of the server: latency, peak rate, overload, recovery, memory.

    python benchmarks/service_load.py mixed                # 1,000 requests/s, events and reads
    python benchmarks/service_load.py peak                 # the highest sustainable rate
    python benchmarks/service_load.py bulk                 # events/s in requests of 1,000
    python benchmarks/service_load.py overload             # three times the peak, and recovery
    python benchmarks/service_load.py recovery             # a start with a log but without states
    python benchmarks/service_load.py backfill             # states of a new model from the log
    python benchmarks/service_load.py memory               # resident bytes per user

``everlong serve`` runs on one core and the load generator on another, over the loopback interface.
Requests arrive open-loop (``open_loop.py``). The method follows ETUDE: power laws for the
popularity of items and the activity of users, latencies of all scheduled requests. The model has
random parameters, which do not affect the cost. Models and logs are generated once and stored in
``runs/service_load``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer

from everlong.data.ids import IdMap
from everlong.data.split import PAPER
from everlong.models.lru import LRU, LRUConfig
from everlong.recommender.origin import Origin
from everlong.recommender.recommender import Recommender
from everlong.server.engine.served_model import ServedModel
from everlong.server.engine.service import Service
from everlong.server.store import checksum, log, sqlite_log
from everlong.server.store.log import Event
from everlong.server.store.service_file import About, write_about
from everlong.server.store.sqlite_log import SqliteLog
from everlong.training.settings import TrainConfig
from open_loop import Answers, Load, arrivals, percentiles_ms, send, summary
from record import RESULTS, write_result

RUNS = Path(__file__).parents[1] / "runs" / "service_load"
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
SERVER_CORE, GENERATOR_CORE = CORES[0], CORES[-1]
DIM = 64
ITEM_POWER, USER_POWER = 1.0, 0.7
"""Popularity falls with rank to this power, activity likewise: densities of power -2 and -2.4."""

EVENTS_SHARE = 0.8
K = 10
LIMIT_P99_S = 0.05
"""Maximum p99 latency of a sustainable rate."""

IN_TIME_S = (0.1, 0.5, 2.0)
"""Deadlines of goodput; the first is that of the headline figure."""

STOP_S = 600
START = 1_700_000_000
app = typer.Typer(help=__doc__, add_completion=False)

Rate = Annotated[float, typer.Option(help="Requests per second.")]
Items = Annotated[int, typer.Option(help="Size of the catalogue.")]
Users = Annotated[int, typer.Option(help="Users with a history.")]
First = Annotated[
    bool,
    typer.Option(
        "--first", help="Server before others on its core (real time; root): as on a quiet machine."
    ),
]
Write = Annotated[bool, typer.Option(help="Write the record into results.")]


# what is served


def model_folder(items: int, seed: int = 0) -> Path:
    """An LRU with random parameters and a catalogue of ids ``i0000000``, ..."""
    folder = RUNS / f"model-{items}-{seed}"
    if not folder.exists():
        torch.manual_seed(seed)
        model = LRU(LRUConfig(num_items=items, dim=DIM)).eval()
        ids = IdMap(pl.Series(names("i", np.arange(items))))
        facts = {"events": 0, "users": 0, "fingerprint": "random parameters"}
        origin = Origin(
            model="lru",
            train=TrainConfig(),
            protocol=PAPER,
            time_unit="s",
            data=facts,
            metrics={},
        )
        Recommender(model, ids, origin).save(folder)
    return folder


def names(prefix: str, numbers: np.ndarray) -> list[str]:
    """Ids whose order is that of their numbers."""
    return [f"{prefix}{number:07d}" for number in numbers.tolist()]


class Traffic:
    """Users and items, drawn by power laws."""

    def __init__(self, users: int, items: int, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        # the popularity of users and items must not depend on the seed of the draws
        order = np.random.default_rng(0)
        self._users = order.permutation(users), _cumulated(users, USER_POWER)
        self._items = order.permutation(items), _cumulated(items, ITEM_POWER)

    def users(self, count: int) -> list[str]:
        return names("u", self._drawn(*self._users, count))

    def items(self, count: int) -> list[str]:
        return names("i", self._drawn(*self._items, count))

    def _drawn(self, numbers: np.ndarray, cumulated: np.ndarray, count: int) -> np.ndarray:
        return numbers[np.searchsorted(cumulated, self.draw.random(count))]

    def pairs(self, count: int) -> Iterator[tuple[str, str]]:
        """Users and items of events."""
        return zip(self.users(count), self.items(count), strict=True)


def _cumulated(count: int, power: float) -> np.ndarray:
    weights = np.cumsum(np.arange(1, count + 1) ** -power)
    return weights / weights[-1:]


def log_folder(users: int, items: int, events: int) -> Path:
    """A data folder with a log but without states; every user has at least one event."""
    # a folder of other code is generated again
    sources = (Path(module.__file__ or "").read_bytes() for module in (log, sqlite_log, checksum))
    code = hashlib.sha256(b"".join(sources)).hexdigest()[:8]
    folder = RUNS / f"log-{users}-{items}-{events}-{code}"
    if folder.exists():
        return folder
    making = folder.with_suffix(".part")
    shutil.rmtree(making, ignore_errors=True)
    written = SqliteLog(making / "shard-0000.sqlite")
    traffic = Traffic(users, items, seed=1)
    owners = names("u", np.arange(users)) + traffic.users(events - users)
    group: list[Event] = []
    for number, (user, item) in enumerate(zip(owners, traffic.items(events), strict=True)):
        group.append(Event(f"w{number}", user, item, START + number))
        if len(group) == 50_000 or number == events - 1:
            written.append(group)
            group = []
    written.checkpoint()
    written.close()
    write_about(making, About(shards=1))
    making.rename(folder)
    return folder


def states_folder(users: int, items: int, events: int) -> Path:
    """A data folder after an orderly shutdown of the server: with all states."""
    source = log_folder(users, items, events)
    folder = source.with_name(source.name + "-states")
    if not folder.exists():
        with copied(source) as data:
            with serving(model_folder(items), data, first=False):
                pass
            shutil.copytree(data, making := folder.with_suffix(".part"), dirs_exist_ok=True)
        making.rename(folder)
    return folder


@contextmanager
def copied(source: Path) -> Iterator[Path]:
    """A temporary copy of a data folder on the same disk."""
    with tempfile.TemporaryDirectory(dir=RUNS, prefix="data-") as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        yield Path(folder)


# the server


class Server:
    """``everlong serve`` on a core of its own.

    Args:
        model: folder of the model.
        data: folder of the log and the states.
        first: run it with real-time priority on its core.
        program: arguments of Python instead of ``everlong serve``.
    """

    def __init__(
        self, model: Path, data: Path, *, first: bool, program: Sequence[str] | None = None
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        command = [sys.executable, *(program or ("-m", "everlong", "serve", "--no-verify"))]
        command += [str(model), "--data-dir", str(data), "--port", str(self.port)]

        def alone() -> None:
            os.sched_setaffinity(0, {SERVER_CORE})
            if first:
                os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))

        one = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        began = time.perf_counter()
        self.process = subprocess.Popen(
            command, env={**os.environ, **one}, preexec_fn=alone, stdout=subprocess.DEVNULL
        )
        self._wait()
        self.ready_s = time.perf_counter() - began

    def _wait(self) -> None:
        url = f"http://127.0.0.1:{self.port}/readyz"
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(url, timeout=3_600):
                    return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"the server ended with {self.process.returncode} before it was ready")

    def ask(self, path: str) -> Any:
        """The JSON response to a GET request."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
            return json.load(answer)

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the server process."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident_bytes(self) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise OSError("no VmRSS in /proc: resident memory can be read on Linux only")

    def stop(self) -> None:
        """Shuts the server down in order: it answers pending requests and writes all states.

        Raises:
            RuntimeError: if it does not end.
        """
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise RuntimeError(f"the server did not end within {STOP_S} s") from None


@contextmanager
def serving(
    model: Path, data: Path, *, first: bool, program: Sequence[str] | None = None
) -> Iterator[Server]:
    """A ready server; pins the generator to another core."""
    os.sched_setaffinity(0, {GENERATOR_CORE})
    server = Server(model, data, first=first, program=program)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def prompt() -> Iterator[None]:
    """Runs the generator with real-time priority, if permitted, so that it sends on schedule."""
    before = os.sched_getscheduler(0)
    try:
        # threads and processes that begin meanwhile do not inherit it
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))


@contextmanager
def warm(items: int, users: int, events: int, *, first: bool) -> Iterator[Server]:
    """A server whose users have histories and states."""
    source, model = states_folder(users, items, events), model_folder(items)
    with copied(source) as data, serving(model, data, first=first) as server:
        yield server


class Usage:
    """CPU usage of the server, the generator and other processes since its creation."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.before = self._now()

    def _now(self) -> dict[str, float]:
        tick, found = os.sysconf("SC_CLK_TCK"), {"time": time.perf_counter()}
        found |= {"server": self.server.cpu_s, "generator": time.process_time()}
        for line in Path("/proc/stat").read_text().splitlines():
            name, *values = line.split()
            if name in (f"cpu{SERVER_CORE}", f"cpu{GENERATOR_CORE}"):
                user, nice, system, _, _, irq, soft, steal = (int(v) / tick for v in values[:8])
                found[name] = user + nice + system + irq + soft
                found[f"steal {name}"] = steal
        return found

    def shares(self) -> dict[str, float]:
        """Shares of a core, from 0 to 1."""
        now = self._now()
        passed = {name: now[name] - value for name, value in self.before.items()}
        used = {name: value / passed["time"] for name, value in passed.items()}
        server, generator = used["server"], used["generator"]
        cores = f"cpu{SERVER_CORE}", f"cpu{GENERATOR_CORE}"
        return {
            "server": round(server, 3),
            "generator": round(generator, 3),
            "others_on_server_core": round(max(0.0, used[cores[0]] - server), 3),
            "others_on_generator_core": round(max(0.0, used[cores[1]] - generator), 3),
            "steal": round(used[f"steal {cores[0]}"] + used[f"steal {cores[1]}"], 3),
        }


# requests


def http(path: str, body: object) -> bytes:
    """The bytes of a POST request."""
    data = json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def mixture(
    due: np.ndarray, users: int, items: int, share: float, seed: int
) -> tuple[Load, np.ndarray]:
    """A load of single events and recommendation requests, and a mask of the events ``[N]``."""
    traffic, count, now = Traffic(users, items, seed), len(due), int(time.time())
    are_events = traffic.draw.random(count) < share
    # ids that no run before has used
    mark = f"{time.time_ns():x}"
    requests = [
        http("/v1/events", {"events": [event_in(f"{mark}-{n}", user, item, now + int(due[n]))]})
        if are_events[n]
        else http("/v1/recommend", {"user_id": user, "k": K})
        for n, (user, item) in enumerate(traffic.pairs(count))
    ]
    return Load(due, requests), are_events


def event_in(event_id: str, user: str, item: str, timestamp: int) -> dict[str, object]:
    return {"event_id": event_id, "user_id": user, "item_id": item, "timestamp": timestamp}


def by_kind(answers: Answers, are_events: np.ndarray) -> dict[str, Any]:
    """Figures of both kinds, and of all together."""
    return {
        "all": summary(answers),
        "events": summary(answers.where(are_events)),
        "recommend": summary(answers.where(~are_events)),
    }


def setting(items: int, users: int, events: int, first: bool) -> dict[str, Any]:
    """The hardware and settings of a measurement."""
    return {
        "cores": {"server": 1, "generator": 1, "machine": os.cpu_count()},
        "server_before_others": first,
        "items": items,
        "dim": DIM,
        "users": users,
        "history_events": events,
        "history_mean_length": round(events / max(1, users), 1),
        "power_laws": {"items": ITEM_POWER, "users": USER_POWER},
        "load_average": os.getloadavg()[0],
    }


def tell(name: str, figures: dict[str, Any], write: bool) -> None:
    typer.echo(json.dumps(figures, indent=2))
    if write:
        typer.echo(f"written to {write_result(name, figures)}")


# commands


@app.command()
def mixed(
    rate: Rate = 1_000.0,
    seconds: Annotated[float, typer.Option(help="With those that do not count.")] = 80.0,
    # until the write-ahead log has its size, and is overwritten from then on
    uncounted: Annotated[float, typer.Option(help="First seconds, which do not count.")] = 20.0,
    share: Annotated[float, typer.Option(help="Of events among the requests.")] = EVENTS_SHARE,
    items: Items = 100_000,
    users: Users = 20_000,
    history: Annotated[int, typer.Option(help="Events before the load.")] = 400_000,
    first: First = False,
    write: Write = True,
) -> None:
    """Single events and reads at a rate, open-loop: p90 < 7 ms, p99 <= 25 ms, no errors."""
    with warm(items, users, history, first=first) as server:
        due = arrivals(np.random.default_rng(2), (rate, seconds))
        load, are_events = mixture(due, users, items, share, seed=3)
        usage = Usage(server)
        with prompt():
            answers = send(server.port, load)
        counted = answers.due >= uncounted
        figures = {
            **setting(items, users, history, first),
            "rate": rate,
            "events_share": share,
            "k": K,
            "seconds": seconds,
            "uncounted_seconds": uncounted,
            "used": usage.shares(),
            **by_kind(answers.where(counted), are_events[counted]),
        }
    tell("service_mixed", figures, write)


@app.command()
def peak(
    start: Rate = 400.0,
    factor: Annotated[float, typer.Option(help="From one step to the next.")] = 1.2,
    seconds: Annotated[float, typer.Option(help="Of a step.")] = 10.0,
    items: Items = 100_000,
    users: Users = 20_000,
    history: Annotated[int, typer.Option(help="Events before the load.")] = 400_000,
    first: First = False,
    write: Write = True,
) -> None:
    """The highest rate of the same mix at which p99 stays within 50 ms and nothing fails."""
    steps: list[dict[str, Any]] = []
    with warm(items, users, history, first=first) as server:
        warm_up, _ = mixture(arrivals(np.random.default_rng(4), (start, 5.0)), users, items, 0.8, 4)
        send(server.port, warm_up)
        rate, failed = start, 0
        # one step may have met with something else on the machine
        while failed < 2:
            due = arrivals(np.random.default_rng(len(steps)), (rate, seconds))
            load, _ = mixture(due, users, items, EVENTS_SHARE, seed=len(steps))
            usage = Usage(server)
            with prompt():
                answers = send(server.port, load)
            slow = float(np.percentile(answers.latency, 99))
            holds = slow <= LIMIT_P99_S and bool(answers.good.all())
            step = {"rate": round(rate), "holds": holds, "used": usage.shares(), **summary(answers)}
            typer.echo(f"{rate:.0f}/s: p99 {1e3 * slow:.1f} ms, {step['status']}", err=True)
            steps.append(step)
            failed = 0 if holds else failed + 1
            rate *= factor
            time.sleep(2.0)
    held = [step["rate"] for step in steps if step["holds"]]
    figures = {
        **setting(items, users, history, first),
        "events_share": EVENTS_SHARE,
        "k": K,
        "seconds_of_a_step": seconds,
        "limit_p99_ms": 1e3 * LIMIT_P99_S,
        "peak_rate": max(held, default=0),
        "steps": steps,
    }
    tell("service_peak", figures, write)


@app.command()
def bulk(
    seconds: Annotated[float, typer.Option(help="Until the last call is sent.")] = 30.0,
    calls: Annotated[int, typer.Option(help="On their way at once.")] = 4,
    events: Annotated[int, typer.Option(help="Of a call.")] = 1_000,
    items: Items = 100_000,
    users: Users = 20_000,
    first: First = False,
    write: Write = True,
) -> None:
    """Durable events per second in calls of 1,000: at least 10,000."""
    with warm(items, users, users, first=first) as server:
        # as many as the fastest service could take
        count = int(seconds * 40_000 / events)
        traffic, mark = Traffic(users, items, seed=5), f"{time.time_ns():x}"
        requests = []
        for number in range(count):
            some = enumerate(traffic.pairs(events))
            made = [event_in(f"{mark}-{number}-{n}", *pair, START + number) for n, pair in some]
            requests.append(http("/v1/events", {"events": made}))
        # all are due at once, over a few connections, so that the next goes when one is answered
        usage = Usage(server)
        load = Load(np.zeros(count), requests)
        answers = send(server.port, load, timeout=seconds, connections=calls, ready=calls)
        used = usage.shares()
    good = np.sort(answers.done[answers.good])
    took = good[-1] if len(good) else float("nan")
    figures = {
        **setting(items, users, users, first),
        "events_of_a_call": events,
        "calls_at_once": calls,
        "seconds": round(float(took), 2),
        "durable_events_per_second": round(events * len(good) / took),
        # of the calls that were on their way at any time, each waits for its turn
        "call_mean_ms": round(1e3 * calls * took / max(1, len(good)), 1),
        "refused": int(((answers.status != 0) & ~answers.good).sum()),
        "used": used,
    }
    tell("service_bulk", figures, write)


@app.command()
def overload(
    peak_rate: Annotated[
        float | None, typer.Option(help="Requests per second; without it that of `peak`.")
    ] = None,
    times: Annotated[float, typer.Option(help="The peak, that many times.")] = 3.0,
    seconds: Annotated[float, typer.Option(help="Of overload.")] = 60.0,
    items: Items = 100_000,
    users: Users = 20_000,
    history: Annotated[int, typer.Option(help="Events before the load.")] = 400_000,
    first: First = False,
    write: Write = True,
) -> None:
    """Half the peak, then three times, then half: goodput >= 80 % of it, recovery <= 5 s."""
    if peak_rate is None:
        peak_rate = float(json.loads((RESULTS / "service_peak.json").read_text())["peak_rate"])
    calm = 10.0
    with warm(items, users, history, first=first) as server:
        phases = (peak_rate / 2, calm), (times * peak_rate, seconds), (peak_rate / 2, 3 * calm)
        due = arrivals(np.random.default_rng(6), *phases)
        load, _ = mixture(due, users, items, EVENTS_SHARE, seed=6)
        usage = Usage(server)
        with prompt():
            answers = send(server.port, load)
        used = usage.shares()
    end = calm + seconds
    # what is due in the last moment may be answered after it
    heavy = answers.where((answers.due >= calm) & (answers.due < end))
    shed = heavy.where(np.isin(heavy.status, (429, 503)))
    within = {limit: heavy.good & (heavy.latency <= limit) for limit in IN_TIME_S}
    goodput = {
        f"{limit:g} s": round(int(good.sum()) / seconds / peak_rate, 3)
        for limit, good in within.items()
    }
    figures = {
        **setting(items, users, history, first),
        "events_share": EVENTS_SHARE,
        "k": K,
        "peak_rate": peak_rate,
        "times": times,
        "seconds": seconds,
        "goodput_of_peak": goodput[f"{IN_TIME_S[0]:g} s"],
        "goodput_of_peak_by_deadline": goodput,
        "shed": len(shed.due),
        "shed_ms": percentiles_ms(shed.latency),
        "recovery_s": recovery_s(answers, calm, end),
        "used": used,
        "before": summary(answers.where(answers.due < calm)),
        "overload": summary(heavy),
        "after": summary(answers.where(answers.due >= end)),
    }
    tell("service_overload", figures, write)


def recovery_s(answers: Answers, begin: float, end: float, window: float = 0.5) -> float | None:
    """Seconds from the end of the overload to recovery; None without recovery.

    After recovery no request fails, and the mean latency of every window is at most the maximum of
    the windows before the overload.
    """

    def windows(first: float, last: float) -> list[Answers]:
        starts = np.arange(first, last - window, window)
        found = [answers.where((answers.due >= t) & (answers.due < t + window)) for t in starts]
        return [some for some in found if len(some.due)]

    normal = max(float(some.latency.mean()) for some in windows(0.0, begin))
    recovered = None
    for some in windows(end, float(answers.due[-1])):
        if not some.good.all() or some.latency.mean() > max(normal, LIMIT_P99_S):
            recovered = None
        elif recovered is None:
            recovered = round(float(some.due[0] - end), 1)
    return recovered


@app.command()
def recovery(
    events: Annotated[int, typer.Option(help="Of the log.")] = 1_000_000,
    items: Items = 100_000,
    users: Users = 50_000,
    first: First = False,
    write: Write = True,
) -> None:
    """From the start of the process to readiness, with a log and no states: <= 15 s a million."""
    model, empty = model_folder(items), log_folder(0, items, 0)
    with copied(empty) as data, serving(model, data, first=first) as server:
        empty_s = server.ready_s
    with (
        copied(log_folder(users, items, events)) as data,
        serving(model, data, first=first) as server,
    ):
        took = server.ready_s
    figures = {
        **setting(items, users, events, first),
        "seconds_to_ready": round(took, 2),
        "seconds_to_ready_of_an_empty_log": round(empty_s, 2),
        "seconds_per_million_events": round(1e6 * took / events, 2),
    }
    tell("service_recovery", figures, write)


@app.command()
def backfill(
    events: Annotated[int, typer.Option(help="Of the log.")] = 1_000_000,
    items: Items = 100_000,
    users: Users = 50_000,
    first: First = False,
    write: Write = True,
) -> None:
    """Events per second in building the states of another model from the log: >= 200,000."""
    os.sched_setaffinity(0, {SERVER_CORE})
    if first:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    torch.set_num_threads(1)
    live, other = (ServedModel.read(model_folder(items, seed)) for seed in (0, 1))
    with copied(log_folder(users, items, events)) as data:
        service = Service(data, live)
        try:
            used, began = time.process_time(), time.perf_counter()
            service.switch(other)
            took, used = time.perf_counter() - began, time.process_time() - used
        finally:
            service.close()
    figures = {
        **setting(items, users, events, first),
        "seconds": round(took, 2),
        "processor_seconds": round(used, 2),
        "events_per_second": round(events / took),
        "events_per_processor_second": round(events / used),
    }
    tell("service_backfill", figures, write)


@app.command()
def memory(
    sizes: Annotated[list[int] | None, typer.Option(help="Users, repeatable.")] = None,
    items: Items = 100_000,
    first: First = False,
    write: Write = True,
) -> None:
    """Resident bytes a user beyond a process without users: at most the state and a quarter."""
    model = model_folder(items)
    with copied(log_folder(0, items, 0)) as data, serving(model, data, first=first) as server:
        empty = server.resident_bytes
        state = server.ask("/v1/model")["bytes_per_user"]
    found: dict[str, Any] = {}
    for users in sizes or [100_000, 1_000_000]:
        with warm(items, users, users, first=first) as server:
            each = (server.resident_bytes - empty) / users
        found[str(users)] = {"bytes_per_user": round(each), "of_state": round(each / state, 3)}
    figures = {
        **setting(items, 0, 0, first),
        "users": list(found),
        "empty_process_bytes": empty,
        "state_bytes": state,
        "resident": found,
    }
    tell("service_memory", figures, write)


if __name__ == "__main__":
    app()
