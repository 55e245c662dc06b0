"""Replay through a running service: the figures are the offline ones, and a fault shows."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest

pytest.importorskip("starlette")
import everlong
from everlong import TEMPORAL, Events, read_events
from everlong.client import Client
from everlong.server.http.messages import MAX_K, EventIn, ItemOut, ListOut, ReceiptOut, UnknownOut

PATH = Path(__file__).parents[2] / "examples" / "replay.py"
USERS, ITEMS, LENGTH = 30, 20, 12


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("replay_example", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # annotations of its NamedTuple are looked up there
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def events() -> Events:
    """Ties, repeated rows, users and items of the test part alone: all that could go wrong."""
    random = np.random.default_rng(0)
    count = USERS * LENGTH
    user, when = np.repeat(np.arange(USERS), LENGTH), random.integers(40, size=count)
    # every fifth user comes late
    when = np.where(user % 5 == 0, 35 + when // 8, when)
    item = (user + when + random.integers(3, size=count)) % ITEMS
    # one item is new in the last days
    item = np.where((when >= 38) & (item % 5 == 0), ITEMS, item)
    frame = pl.DataFrame(
        {
            "user_id": [f"u/{n}" for n in user],
            "item_id": [f"i {n}" for n in item],
            "timestamp": 1_700_000_000 + 86_400 * when,
        }
    )
    return read_events(pl.concat([frame, frame[::9]]), ties="random")


@pytest.fixture(scope="module")
def models(events: Events, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for seen in ("mask", "keep"):
        folders[seen] = tmp_path_factory.mktemp("replay") / seen
        everlong.fit(
            events,
            "lru",
            architecture={"dim": 16, "channels": 16},
            training={"epochs": 3, "batch_events": 64, "lr": 0.02},
            protocol=TEMPORAL.replace({"seen": seen, "test_share": 0.3}),
        ).save(folders[seen])
    return folders


class Forgetful(Client):
    """Loses one event of those that come alone."""

    lost = False

    def send(self, events: Iterable[EventIn | Mapping[str, Any]]) -> list[ReceiptOut]:
        given = list(events)
        if len(given) > 1 or self.lost:
            return super().send(given)
        self.lost = True
        return []


class Late(Client):
    """Sends every event that comes alone when the next one does."""

    held: tuple[EventIn | Mapping[str, Any], ...] = ()

    def send(self, events: Iterable[EventIn | Mapping[str, Any]]) -> list[ReceiptOut]:
        given = list(events)
        if len(given) > 1:
            return super().send(given)
        now, self.held = self.held, tuple(given)
        return super().send(now)


class Unfiltered(Client):
    """Asks for seen items too."""

    def recommend(self, user_id: int | str, **how: Any) -> ListOut:
        return super().recommend(user_id, **{**how, "filter_seen": False})


def test_online_metrics_equal_offline_metrics(
    example: ModuleType, events: Events, models: dict[str, Path], tmp_path: Path
) -> None:
    for seen, folder in models.items():
        with example.in_thread(folder, tmp_path / seen) as url, Client(url) as client:
            found = example.compare(client, folder, events)
        offline = found.offline
        np.testing.assert_array_equal(found.ranks, offline.ranks)
        assert found.differing == 0
        for name, value in offline.metrics.items():
            assert found.metrics[name] == pytest.approx(value, abs=1e-12)
        # the log has what it was made for
        facts = everlong.load(folder).origin.metrics["test"]["split"]
        assert offline.num_targets > 80
        assert facts["unknown_item_test_targets"] > 0
        assert facts["new_users_test"] > 0
        assert (offline.masked_targets > 0) == (seen == "mask")
        assert np.count_nonzero(np.diff(events.times) == 0) > 20


@pytest.mark.parametrize(
    ("seen", "mutant"), [("keep", Forgetful), ("keep", Late), ("mask", Unfiltered)]
)
def test_an_injected_fault_is_detected(
    example: ModuleType,
    events: Events,
    models: dict[str, Path],
    tmp_path: Path,
    seen: str,
    mutant: type[Client],
) -> None:
    folder = models[seen]
    with example.in_thread(folder, tmp_path / "data") as url, mutant(url) as client:
        found = example.compare(client, folder, events)
    assert found.differing > 0


def test_the_replay_works_with_a_server_process(
    example: ModuleType, events: Events, models: dict[str, Path], tmp_path: Path
) -> None:
    with example.process(models["mask"], tmp_path / "data") as url, Client(url) as client:
        found = example.compare(client, models["mask"], events)
    assert found.differing == 0


def test_equals_count_against_the_target_also_where_a_list_ends(example: ModuleType) -> None:
    def listed(*scores: float) -> ListOut:
        return ListOut(
            items=[ItemOut(item_id=n, score=score) for n, score in enumerate(scores)],
            model="x",
            known=True,
            stale=False,
            unknown=UnknownOut(count=0, item_ids=[]),
        )

    assert example.rank_in(listed(3.0, 2.0, 2.0, 1.0), 1, last=9) == 3
    assert example.rank_in(listed(3.0, 2.0), 7, last=9) == 9
    assert example.rank_in(listed(3.0, 2.0), 1, last=9) == 2
    full = listed(2.0, *[1.0] * (MAX_K - 1))
    assert example.rank_in(full, 0, last=MAX_K + 1) == 1
    assert example.rank_in(full, 1, last=MAX_K + 1) == MAX_K + 1
    assert example.rank_in(full, 1, last=MAX_K) == MAX_K
