"""Speed and peak memory of reading 10 million events from Parquet into an event cache.

python benchmarks/reading.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer

from everlong.data.event_cache import open_events
from record import peak_mib, write_result

EVENTS, USERS, ITEMS = 10_000_000, 500_000, 100_000


def main(
    read: Annotated[str, typer.Option(help="internal: the file to read and measure")] = "",
) -> None:
    """Writes a log in random order, reads it in a new process, and opens its event cache."""
    if read:
        print(json.dumps(measure(Path(read))))
        return
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.parquet"
        write_log(log)
        done = subprocess.run(
            [sys.executable, __file__, "--read", str(log)],
            check=True,
            capture_output=True,
            text=True,
        )
    figures = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(figures, indent=2))
    print("written to", write_result("reading", figures))


def write_log(path: Path) -> None:
    random = np.random.default_rng(0)
    pl.DataFrame(
        {
            "user_id": random.integers(0, USERS, EVENTS),
            "item_id": random.integers(0, ITEMS, EVENTS),
            "timestamp": 1_600_000_000 + random.integers(0, 10**8, EVENTS),
        }
    ).write_parquet(path)


def measure(path: Path) -> dict[str, float | int]:
    cache = path.parent / "cache"
    began = time.perf_counter()
    events = open_events(path, cache_dir=cache)
    first = time.perf_counter() - began
    began = time.perf_counter()
    again = open_events(path, cache_dir=cache)
    second = time.perf_counter() - began
    return {
        "events": events.num_events,
        "users": events.num_users,
        "items": again.num_items,
        "seconds_to_read_and_index": round(first, 2),
        "seconds_to_open_the_index": round(second, 3),
        "peak_memory_mib": round(peak_mib()),
    }


if __name__ == "__main__":
    typer.run(main)
