"""The service without its protocol: events in, recommendations out, models that change places."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from tests.server_models import ITEMS, fitted

from everlong.models.batch import Batch
from everlong.server.engine.served_model import ServedModel, Wanted
from everlong.server.engine.service import Service
from everlong.server.store.log import DamagedError, Event


@pytest.fixture
def service(tmp_path: Path, models: list[Path]) -> Iterator[Service]:
    found = Service(tmp_path / "data", ServedModel.read(models[0]), shards=2)
    yield found
    found.close()


def steps(user: str, start: int, count: int, tag: str = "") -> list[Event]:
    return [
        Event(f"{user}-{tag}{n}", user, f"i{(start + n) % ITEMS:02d}", 1_700_000_000 + n)
        for n in range(count)
    ]


def sent(service: Service, events: list[Event]) -> None:
    for future in service.ingest(events):
        future.result()


def first(service: Service, user: str, **how: object) -> str:
    wanted = Wanted(k=1, **how)  # type: ignore[arg-type]
    return str(service.recommend(user, wanted, filter_seen=False).result().items[0])


def test_recommendations_follow_the_last_event(service: Service) -> None:
    for number in range(6):
        sent(service, steps(f"new-{number}", number, 5))
        assert first(service, f"new-{number}") == f"i{(number + 5) % ITEMS:02d}"
    assert service.num_users == 6


def test_answers_are_those_of_the_recommender(service: Service) -> None:
    log = pl.DataFrame(
        [
            {"user_id": e.user_id, "item_id": e.item_id, "timestamp": e.time}
            for user in range(9)
            for e in steps(f"v{user}", user, 3 + user)
        ]
    )
    for user in range(9):
        sent(service, steps(f"v{user}", user, 3 + user))
    other = ServedModel.read(service.live.folder).recommender
    other.users = type(other.users)(other.model.initial_state(1))
    other.update(log)
    expected = other.recommend([f"v{user}" for user in range(9)], k=4)
    for user in range(9):
        mine = expected.filter(pl.col("user_id") == f"v{user}")
        found = service.recommend(f"v{user}", Wanted(k=4)).result()
        assert found.items == mine["item_id"].to_list()
        np.testing.assert_allclose(found.scores, mine["score"].to_numpy(), rtol=1e-4, atol=1e-4)


def test_filters(service: Service) -> None:
    sent(service, steps("a", 0, 5))
    # the model was fitted with seen="keep"
    assert len(service.recommend("a", Wanted(k=ITEMS)).result().items) == ITEMS
    seen = {f"i{n:02d}" for n in range(5)}
    found = service.recommend("a", Wanted(k=ITEMS), filter_seen=True).result().items
    assert set(found) == {f"i{n:02d}" for n in range(ITEMS)} - seen
    found = service.recommend("a", Wanted(k=3, exclude=["i05", "no such item"])).result().items
    assert "i05" not in found
    among = Wanted(k=3, among=["i07", "i09", "unknown"])
    assert set(service.recommend("a", among).result().items) == {"i07", "i09"}
    ranked = service.rank("a", ["i09", "i05", "i07", "i05", "nothing"])
    assert ranked.items[0] == "i05"
    assert len(ranked.items) == 3
    assert service.rank("a", ["nothing"]).items == []
    assert service.recommend("a", Wanted(k=3, among=[])).result().items == []


def test_an_unknown_user_has_the_list_of_the_initial_state(service: Service) -> None:
    assert len(service.recommend("stranger", Wanted(k=3)).result().items) == 3
    assert service.info("stranger") is None


def test_a_restart_answers_the_same(tmp_path: Path, models: list[Path]) -> None:
    lists = []
    for turn in range(2):
        service = Service(tmp_path, ServedModel.read(models[0]), shards=3)
        if turn == 0:
            for user in range(10):
                sent(service, steps(f"x{user}", user, 7))
        lists.append([service.recommend(f"x{u}", Wanted(k=3)).result().items for u in range(10)])
        assert len(service.shards) == 3
        service.close()
    assert lists[0] == lists[1]


def test_a_model_is_switched_and_rolled_back_while_events_come(
    service: Service, models: list[Path]
) -> None:
    stop, number = threading.Event(), [0]

    def send() -> None:
        while not stop.is_set():
            number[0] += 1
            sent(service, steps(f"s{number[0] % 20}", number[0], 4, tag=f"{number[0]}-"))
            first(service, f"s{number[0] % 20}")

    sender = threading.Thread(target=send)
    sender.start()
    names = [service.live.name]
    for act in (lambda: service.switch(ServedModel.read(models[1])), service.roll_back):
        act()
        names.append(service.live.name)
    stop.set()
    sender.join()
    assert names[0] == names[2] != names[1]
    # both models have read the same events
    for user in range(20):
        shard = service.shard_of(f"s{user}")
        tables = service.shards[shard].tables.values()
        stands = {table.watermark(f"s{user}") for table in tables}
        assert len(stands) == 1
    with torch.no_grad():
        assert all(len(shard.tables) == 2 for shard in service.shards)


def test_an_erased_user_is_gone(service: Service) -> None:
    sent(service, steps("gone", 0, 5))
    sent(service, steps("stays", 0, 5))
    assert service.erase("gone").result() == 5
    assert service.info("gone") is None
    sent(service, steps("gone", 0, 5))
    assert service.info("gone") is None
    assert service.info("stays") is not None


def at(user: str, item: int, time: int) -> Event:
    return Event(f"{user}-{time}", user, f"i{item % ITEMS:02d}", time)


def test_late_events_take_their_place_when_a_state_is_built_from_the_log(
    tmp_path: Path, models: list[Path]
) -> None:
    service = Service(tmp_path, ServedModel.read(models[0]))
    # 3 is the newest, but 7 came last
    sent(service, [at("u", n, 100 + n) for n in (0, 1, 3, 2)] + [at("u", 7, 50)])
    assert sum(shard.applied.late for shard in service.shards) == 2
    assert first(service, "u") == "i08"
    service.switch(ServedModel.read(models[1]))
    model = service.live.model
    with torch.no_grad():
        expected = model.final_state(Batch.from_histories([[7, 0, 1, 2, 3]]))
    (table,) = (shard.tables[service.live.name] for shard in service.shards)
    for a, b in zip(table.read(["u"]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert first(service, "u") == "i04"
    service.close()


def test_users_who_were_long_away_are_built_when_they_are_asked_for(
    tmp_path: Path, models: list[Path]
) -> None:
    service = Service(tmp_path, ServedModel.read(models[0]), shards=2)
    for number in range(20):
        sent(service, [at(f"u{number}", number + n, 1_000 * number + n) for n in range(4)])
    service.switch(ServedModel.read(models[1]), since=15_000)
    assert service.num_users == 5
    assert service.info("stranger") is None
    # by a request, by a look, by an event
    assert first(service, "u3") == "i07"
    found = service.info("u4")
    assert found is not None
    assert found.watermark.events == 4
    sent(service, [at("u5", 9, 90_000)])
    assert first(service, "u5") == "i10"
    assert service.num_users == 8
    service.close()
    # states that were built are there after a restart, the others are still to be built
    service = Service(tmp_path, ServedModel.read(models[0]), shards=2)
    assert service.live.name == ServedModel.read(models[1]).name
    assert service.num_users == 8
    assert first(service, "u6") == f"i{10:02d}"
    for number in range(20):
        assert first(service, f"u{number}") == (
            "i10" if number == 5 else f"i{(number + 4) % 12:02d}"
        )
    assert service.num_users == 20
    service.close()


def test_a_user_who_is_being_built_is_waited_for(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(tmp_path, ServedModel.read(models[0]))
    sent(service, steps("u", 0, 5))
    service.switch(ServedModel.read(models[1]), since=1 << 40)
    (table,) = (shard.tables[service.live.name] for shard in service.shards)
    begun, go = threading.Event(), threading.Event()
    final_state = table.model.final_state

    def slowly(*given: Any) -> Any:
        begun.set()
        assert go.wait(10)
        return final_state(*given)

    monkeypatch.setattr(table.model, "final_state", slowly)
    futures = [service.recommend("u", Wanted(k=1), filter_seen=False) for _ in range(2)]
    assert begun.wait(10)
    assert "u" not in table
    looker = threading.Thread(target=lambda: infos.append(service.info("u")))
    infos: list[Any] = []
    looker.start()
    go.set()
    assert {future.result().items[0] for future in futures} == {"i05"}
    looker.join()
    assert infos[0].watermark.events == 5
    service.close()


def test_what_is_missing_is_damage(tmp_path: Path, models: list[Path]) -> None:
    service = Service(tmp_path, ServedModel.read(models[0]), shards=2)
    for number in range(9):
        sent(service, steps(f"u{number}", number, 3))
    with pytest.raises(OSError, match="in use by another process"):
        Service(tmp_path, ServedModel.read(models[0]))
    service.close()
    service.close()
    for name in ("service.json", "shard-0001.sqlite"):
        kept = (tmp_path / name).rename(tmp_path / "kept")
        with pytest.raises(DamagedError, match="restore it from a copy"):
            Service(tmp_path, ServedModel.read(models[0]))
        kept.rename(tmp_path / name)
    service = Service(tmp_path, ServedModel.read(models[0]))
    assert service.num_users == 9
    service.close()


def test_a_switch_outlives_a_restart_and_is_never_undone_by_chance(
    tmp_path: Path, models: list[Path]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(models[1], other)
    service = Service(tmp_path / "data", ServedModel.read(models[0]))
    service.switch(ServedModel.read(other))
    names = [ServedModel.read(folder).name for folder in models]
    service.close()
    with pytest.raises(OSError, match="the service is ending"):
        service.ingest(steps("u", 0, 1))
    service = Service(tmp_path / "data", ServedModel.read(models[0]))
    assert service.live.name == names[1]
    assert service.previous is not None
    assert service.previous.name == names[0]
    service.close()
    away = other.rename(tmp_path / "away")
    with pytest.raises(ValueError, match="put it back"):
        Service(tmp_path / "data", ServedModel.read(models[0]))
    away.rename(other)
    # another wish is a switch, from which there is a way back
    third = tmp_path / "third"
    fitted(2).save(third)
    service = Service(tmp_path / "data", ServedModel.read(third))
    assert service.roll_back().name == names[1]
    service.close()


def test_hidden_items_are_in_no_list_of_any_model(tmp_path: Path, models: list[Path]) -> None:
    service = Service(tmp_path, ServedModel.read(models[0]))
    sent(service, steps("u", 0, 5))
    assert first(service, "u") == "i05"
    service.hide(["i05", "i05", "unknown"])
    assert first(service, "u") != "i05"
    service.switch(ServedModel.read(models[1]))
    assert first(service, "u") != "i05"
    service.close()
    service = Service(tmp_path, ServedModel.read(models[0]))
    assert service.hidden == ["i05", "unknown"]
    assert first(service, "u") != "i05"
    service.hide([])
    assert first(service, "u") == "i05"
    service.close()
