"""The service under load, in a short form: what is promised to all is kept for each.

Rates and latencies are for ``benchmarks/service_load.py``, on a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
if not hasattr(os, "sched_setaffinity"):
    pytest.skip("cores cannot be chosen here", allow_module_level=True)
from tests.forms import forms

from everlong.server.store.sqlite_log import SqliteReader

ITEMS, USERS, HISTORY = 2_000, 200, 1_000
OVERLOAD, SECONDS = 9_000.0, 1.5
"""Requests per second: several times what a core answers."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
        import service_load

        patch.setattr(service_load, "RUNS", tmp_path_factory.mktemp("load"))
        cores = os.sched_getaffinity(0)
        yield service_load
        # the generator takes a core for itself
        os.sched_setaffinity(0, cores)


def event_ids(requests: list[bytes]) -> list[str]:
    """The id of the event in each request; empty for those that have none."""
    bodies = [json.loads(request.partition(b"\r\n\r\n")[2]) for request in requests]
    return [body["events"][0]["event_id"] if "events" in body else "" for body in bodies]


def stored(data: Path, names: list[str]) -> list[bool]:
    """Which events are in a log, which is whole."""
    with closing(SqliteReader(data / "shard-0000.sqlite")) as log:
        log.verify()
        ask = "SELECT COUNT(*) FROM events WHERE event_key=?"
        return [
            log.file.connection.execute(ask, (log.key_of(name),)).fetchone()[0] == 1
            for name in names
        ]


@pytest.mark.parametrize("seconds", forms("LOAD_SECONDS", "1", "8"))
def test_a_load_is_answered_and_nothing_of_it_is_lost(bench: Any, seconds: str) -> None:
    due = bench.arrivals(np.random.default_rng(0), (100.0, float(seconds)))
    load, are_events = bench.mixture(due, USERS, ITEMS, 0.8, seed=0)
    with bench.copied(bench.states_folder(USERS, ITEMS, HISTORY)) as data:
        with bench.serving(bench.model_folder(ITEMS), data, first=False) as server:
            answers = bench.send(server.port, load)
        assert answers.good.all()
        names = [name for name in event_ids(load.requests) if name]
        assert len(names) == are_events.sum() > 40 * float(seconds)
        assert all(stored(data, names))
        with closing(SqliteReader(data / "shard-0000.sqlite")) as log:
            assert log.total.events == HISTORY + len(names)


@pytest.mark.slow
def test_what_is_too_much_is_refused_and_the_rest_is_kept(bench: Any) -> None:
    due = bench.arrivals(np.random.default_rng(1), (OVERLOAD, SECONDS))
    load, _ = bench.mixture(due, USERS, ITEMS, 0.8, seed=1)
    after, _ = bench.mixture(
        bench.arrivals(np.random.default_rng(2), (40.0, 2.0)), USERS, ITEMS, 0.8, seed=2
    )
    with bench.copied(bench.states_folder(USERS, ITEMS, HISTORY)) as data:
        with bench.serving(bench.model_folder(ITEMS), data, first=False) as server:
            answers = bench.send(server.port, load)
            again = bench.send(server.port, after)
        # every request has an answer, and nothing breaks
        assert set(answers.status.tolist()) <= {200, 429, 503}
        assert answers.good.sum() > 200
        assert (~answers.good).sum() > 0
        # and when it is over, all is as before
        assert again.good.all()
        names = event_ids(load.requests) + event_ids(after.requests)
        good = [*answers.good.tolist(), *again.good.tolist()]
        kept = [name for name, well in zip(names, good, strict=True) if name and well]
        assert all(stored(data, kept))
