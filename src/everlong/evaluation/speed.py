"""What this machine can do: events per second of a fresh LRU, read one by one and all at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from everlong.evaluation.report import columns
from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.device import serving
from everlong.models.lru import LRU, LRUConfig
from everlong.models.user_model import UserModel
from everlong.system.provenance import hardware, versions
from everlong.system.threads import limited, yielding
from everlong.training.next_item_losses import full_softmax

STEP_BATCHES = (1, 64, 256)
SCAN_EVENTS = 8_192
SCAN_USERS = 64


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One measurement.

    Attributes:
        work: what was done.
        batch: users (``step``) or events (``encode``, ``train``) of one call.
        threads: threads that were allowed.
        events_per_second: events of the median call by its time.
        milliseconds: the median call.
    """

    work: str
    batch: int
    threads: int
    events_per_second: float
    milliseconds: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All measurements, and where they were made."""

    num_items: int
    bytes_per_user: int
    speeds: tuple[Speed, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with versions and hardware."""
        return {**asdict(self), "versions": versions(), "hardware": hardware()}

    def text(self) -> str:
        """A table for people."""
        rows = [
            (
                speed.work,
                f"{speed.batch:,}",
                str(speed.threads),
                f"{speed.milliseconds:.3f}",
                f"{speed.events_per_second:,.0f}",
            )
            for speed in self.speeds
        ]
        table = columns(("work", "batch", "threads", "ms per call", "events/s"), rows)
        return (
            f"{table}\n\nstate: {self.bytes_per_user:,} bytes per user; "
            f"catalogue: {self.num_items:,} items"
        )


@yielding()
def bench(*, num_items: int = 10_000, seconds: float = 1.0, seed: int = 0) -> Bench:
    """Speeds of an untrained LRU of default size on this machine.

    ``step`` reads one event a user on one thread, as a server does; ``encode`` reads histories and
    ``train`` also updates the gradients of the full softmax, on all threads.

    Args:
        num_items: size of the catalogue.
        seconds: how long each measurement takes, about.
        seed: of weights and events.

    Raises:
        ValueError: if a size is not possible.
    """
    if num_items < 1 or not seconds > 0:
        raise ValueError(
            f"expected num_items >= 1 and seconds > 0, received {num_items} and {seconds}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LRU(LRUConfig(num_items=num_items))
        threads = torch.get_num_threads()
        with limited(1):
            speeds = [_step_speed(model, users, seconds) for users in STEP_BATCHES]
        speeds.append(_encode_speed(model, threads, seconds))
        speeds.append(_train_speed(model, threads, seconds))
        with serving(model):
            size = states.bytes_per_user(model.initial_state(1))
    return Bench(num_items=num_items, bytes_per_user=size, speeds=tuple(speeds))


def _step_speed(model: UserModel, users: int, seconds: float) -> Speed:
    items = torch.randint(model.num_items, (users,))
    events = Batch.one_event_each(items, torch.zeros_like(items))
    with serving(model):
        state = model.initial_state(users)
        taken = _median_seconds(lambda: model.step(events, state), seconds)
    return _speed("step", users, users, 1, taken)


def _encode_speed(model: UserModel, threads: int, seconds: float) -> Speed:
    events = _histories(model.num_items)
    with serving(model):
        taken = _median_seconds(lambda: model.encode(events), seconds)
    return _speed("encode", SCAN_EVENTS, SCAN_EVENTS, threads, taken)


def _train_speed(model: UserModel, threads: int, seconds: float) -> Speed:
    events = _histories(model.num_items)

    def update() -> None:
        vectors = model(events)
        full_softmax(vectors, model.item_embeddings(), events.items).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    model.train()
    taken = _median_seconds(update, seconds)
    return _speed("train", SCAN_EVENTS, SCAN_EVENTS, threads, taken)


def _histories(num_items: int) -> Batch:
    items = torch.randint(num_items, (SCAN_EVENTS,))
    offsets = torch.arange(0, SCAN_EVENTS + 1, SCAN_EVENTS // SCAN_USERS)
    return Batch(items=items, times=torch.arange(SCAN_EVENTS), offsets=offsets)


def _median_seconds(work: Callable[[], object], seconds: float) -> float:
    """The median time of calls made for about so many seconds, after two that warm up."""
    work()
    work()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while not times or time.perf_counter() < stop:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _speed(work: str, batch: int, events: int, threads: int, seconds: float) -> Speed:
    return Speed(
        work=work,
        batch=batch,
        threads=threads,
        events_per_second=events / seconds,
        milliseconds=1000 * seconds,
    )
