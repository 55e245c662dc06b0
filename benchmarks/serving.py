"""The cost of an event in serving, by batch size and by length of the history.

    python benchmarks/serving.py

One core. The limit: at the published sizes a step takes 131,072 multiply-adds of matrix products
per event, and reads and writes 2 x 2,304 bytes of state.
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Any

import numba
import numpy as np
import polars as pl
import torch

from everlong.data.events import read_events
from everlong.data.ids import IdMap
from everlong.models.batch import Batch
from everlong.models.device import serving
from everlong.models.lru import LRU, LRUConfig
from everlong.models.state import bytes_per_user
from everlong.recommender.users import UserTable, read_into
from record import write_result

ITEMS = 3_416
REPEATS = 400


def main() -> None:
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    torch.manual_seed(0)
    model = LRU(LRUConfig(num_items=ITEMS)).eval()
    figures: dict[str, Any] = {"threads": 1, "items": ITEMS}
    with serving(model):
        figures["state_bytes"] = bytes_per_user(model.initial_state(1))
        figures["events_per_second_by_batch"] = {
            size: round(size / step_seconds(model, size)) for size in (1, 16, 64, 256, 1024)
        }
        figures["by_history_length"] = by_history_length(model)
    figures["share_of_limit_at_256"] = share_of_limit(figures["events_per_second_by_batch"][256])
    print(json.dumps(figures, indent=2))
    print("written to", write_result("serving", figures))


def step_seconds(model: LRU, users: int) -> float:
    """Median seconds of one step of ``users`` users."""
    state = model.initial_state(users)
    items = torch.randint(0, ITEMS, (users,))
    events = Batch.one_event_each(items, items)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        state = model.step(events, state)
        seconds.append(time.perf_counter() - began)
    return median(seconds[REPEATS // 10 :])


def by_history_length(model: LRU) -> dict[str, Any]:
    """Bytes and time per event for users with 10 and 100,000 events, in alternation."""
    users, lengths = 256, (10, 100_000)
    tables = {length: table_after(model, length, users) for length in lengths}
    items = torch.randint(0, ITEMS, (users,))
    events = Batch.one_event_each(items, items)
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    rows = torch.arange(users)
    for _ in range(REPEATS):
        for length in lengths:
            began = time.perf_counter()
            tables[length].write_states(rows, model.step(events, tables[length].read_states(rows)))
            seconds[length].append(time.perf_counter() - began)
    found = {
        length: {
            "bytes_per_user": tables[length].bytes_per_user.total,
            "microseconds_per_event": 1e6 * median(seconds[length]) / users,
        }
        for length in lengths
    }
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {**found, "time_ratio_median": median(ratios)}


def table_after(model: LRU, length: int, users: int) -> UserTable:
    """A table of ``users`` users, every one with a history of ``length`` events."""
    table = UserTable(model.initial_state(1))
    random = np.random.default_rng(length)
    ids = IdMap(pl.Series(range(ITEMS)))
    # a few users' histories, read once and copied to the others: states are what matters here
    few = 8
    frame = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(few), length),
            "item_id": random.integers(0, ITEMS, few * length),
        }
    )
    events = read_events(frame, timestamp=None)
    known = events.__class__(
        items=ids.rows(events.item_ids.ids(events.items)).astype(np.int32),
        times=events.times,
        offsets=events.offsets,
        user_ids=events.user_ids,
        item_ids=ids,
    )
    table.add(pl.Series(range(users)))
    read_into(model, table, known)
    source = torch.arange(users) % few
    table.write_states(torch.arange(users), table.read_states(source))
    table.num_events[:] = length
    return table


def share_of_limit(rate: float) -> float:
    """The products' share of what one core multiplies per second."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    config = LRUConfig(num_items=ITEMS)
    per_block = 4 * config.dim * config.channels + 8 * config.dim**2
    return rate * 2 * config.layers * per_block / (2 * 1024**3 / best)


if __name__ == "__main__":
    main()
