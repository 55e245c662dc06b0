"""A retriever and a ranker over one log: one record, one stream of events, one folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import everlong
from everlong.data.events import read_events
from everlong.data.ids import IdMap
from everlong.data.synthetic import exposures
from everlong.models.state import field_names
from everlong.models.two_stage import TwoStage
from everlong.recommender.fit_ranker import evaluate_ranker

FIELDS = ["label", "outcome"]
SHAPE = {"dim": 16, "heads": 2, "layers": 1, "window": 4, "fields": (("outcome", 2),)}


@pytest.fixture(scope="module")
def log() -> pl.DataFrame:
    return exposures(num_users=60, num_items=40, seed=3).frame


@pytest.fixture(scope="module")
def retriever(log: pl.DataFrame) -> everlong.Recommender:
    return everlong.fit(
        read_events(log, fields=FIELDS, time_unit="s"),
        "lru",
        architecture={"dim": 16, "channels": 8, "layers": 1},
        training={"epochs": 1},
    )


@pytest.fixture(scope="module")
def both(log: pl.DataFrame, retriever: everlong.Recommender) -> everlong.Recommender:
    events = read_events(log, fields=FIELDS, time_unit="s")
    training = {"epochs": 2, "batch_size": 1_024}
    return everlong.fit_ranker(
        retriever, events, architecture=SHAPE, training=training, candidates=12
    )


def test_what_is_recommended_was_retrieved_and_then_ranked(
    retriever: everlong.Recommender, both: everlong.Recommender
) -> None:
    at = 1_700_000_000
    named = retriever.recommend([3, 5], k=12, filter_seen=False, at=at)
    found = both.recommend([3, 5], k=4, filter_seen=False, at=at)
    assert found["rank"].to_list() == [1, 2, 3, 4] * 2
    for user in (3, 5):
        items = named.filter(user_id=user)["item_id"].to_list()
        ranked = both.rank([user], [items], at=at)
        assert ranked["score"].to_list() == sorted(ranked["score"].to_list(), reverse=True)
        mine = found.filter(user_id=user)
        assert mine["item_id"].to_list() == ranked["item_id"].to_list()[:4]
        np.testing.assert_allclose(mine["score"], ranked["score"][:4], rtol=1e-5)
    # of more than are retrieved, as many as are asked for
    assert both.recommend([3], k=20, filter_seen=False).height == 20
    assert both.recommend([3], k=40).height < 40


def test_candidates_are_a_set(both: everlong.Recommender) -> None:
    a = both.rank([1], [[4, 9, 9, 2]], at=1_700_000_000)
    b = both.rank([1], [[2, 4, 9]], at=1_700_000_000)
    assert a["item_id"].to_list() == b["item_id"].to_list()
    np.testing.assert_allclose(a["score"], b["score"], rtol=1e-5)
    assert both.rank([1, 2], [[4], []])["user_id"].to_list() == [1]
    with pytest.raises(ValueError, match="received 1 lists for 2 users"):
        both.rank([1, 2], [[4]])
    with pytest.raises(ValueError, match="users are unknown"):
        both.rank([-1], [[4]])
    assert both.rank([1], [[4_000]]).rows() == [(1, 4_000, None, None)]


def test_a_retriever_alone_ranks_by_its_scores(retriever: everlong.Recommender) -> None:
    order = retriever.recommend([1], k=40, filter_seen=False)["item_id"].to_list()
    ranked = retriever.rank([1], [[7, 3, 30]])["item_id"].to_list()
    assert ranked == [item for item in order if item in (7, 3, 30)]


def test_updates_keep_both_states(
    log: pl.DataFrame, both: everlong.Recommender, tmp_path: Path
) -> None:
    both.save(tmp_path / "model")
    loaded, whole = everlong.load(tmp_path / "model"), everlong.load(tmp_path / "model")
    rows: dict[str, Any] = {"user_id": [3, 3, 99], "item_id": [1, 2, 3], "outcome": [1, 0, 1]}
    new = pl.DataFrame({**rows, "timestamp": [1_690_000_000, 1_690_000_100, 1_690_000_200]})
    report = loaded.update(new, time_unit="s")
    assert (report.events, report.new_users) == (3, 1)
    for row in new.iter_slices(1):  # one by one is the same
        whole.update(row, time_unit="s")
    assert isinstance(loaded.model, TwoStage)
    for name, a, b in zip(field_names(loaded.users.states), loaded.users.states, whole.users.states, strict=True):  # noqa: E501  # fmt: skip
        assert torch.allclose(a[: len(loaded.users)], b[: len(whole.users)], atol=1e-5), name
    assert any(name.startswith("retriever_") for name in field_names(loaded.users.states))
    assert any(name.startswith("ranker_") for name in field_names(loaded.users.states))
    with pytest.raises(ValueError, match="no column 'outcome'"):
        loaded.update(new.drop("outcome"), time_unit="s")
    with pytest.raises(ValueError, match="reads the fields outcome of events"):
        loaded.recommend({"new": [1, 2]})


def test_comes_back_from_its_folder(both: everlong.Recommender, tmp_path: Path) -> None:
    both.save(tmp_path / "model")
    loaded = everlong.load(tmp_path / "model")
    a, b = (r.recommend([3, 5], at=1_700_000_000) for r in (both, loaded))
    assert_frame_equal(a, b)
    assert loaded.origin.metrics["ranking"]["metrics"]["AUC"]["mean"] > 0
    assert "ranking" in (tmp_path / "model" / "README.md").read_text()
    loaded.save(tmp_path / "model")  # over itself


def test_bad_input_is_named(
    log: pl.DataFrame, retriever: everlong.Recommender, both: everlong.Recommender
) -> None:
    events = read_events(log, fields=FIELDS, time_unit="s")
    with pytest.raises(ValueError, match="has a ranker already"):
        everlong.fit_ranker(both, events)
    with pytest.raises(ValueError, match="unknown model 'din': Valid names: ifa"):
        everlong.fit_ranker(retriever, events, "din")
    with pytest.raises(ValueError, match="expected events with a field 'click'"):
        everlong.fit_ranker(retriever, events, label="click")
    with pytest.raises(ValueError, match="ranks candidates of requests"):
        everlong.fit(events, "ifa")
    with pytest.raises(ValueError, match="windows"):
        everlong.fit_ranker(retriever, events, architecture={"windows": 3})


def test_a_retriever_may_know_items_by_their_vectors(log: pl.DataFrame, tmp_path: Path) -> None:
    def items(first: int, count: int) -> everlong.ItemTable:
        ids = np.arange(first, first + count)
        vectors = np.random.default_rng(abs(first)).normal(size=(count, 3)).tolist()
        frame = pl.DataFrame({"item_id": ids, "text": vectors})
        return everlong.read_items(frame, IdMap.from_values(ids), vectors=["text"])

    events = read_events(log, fields=FIELDS, time_unit="s")
    retriever = everlong.fit(
        events,
        "lru",
        items=items(0, 40),
        architecture={"dim": 16, "channels": 8, "layers": 1, "ids": False},
        training={"epochs": 1},
    )
    # one that comes before those of the log
    assert retriever.add_items(items(-1, 1)) == 1
    found = everlong.fit_ranker(
        retriever, events, architecture=SHAPE, training={"epochs": 1}, candidates=12
    )
    found.save(tmp_path / "model")
    loaded = everlong.load(tmp_path / "model")
    asked = {"users": [3, 5], "k": 50, "filter_seen": False, "at": 1_700_000_000}
    assert_frame_equal(loaded.recommend(**asked), found.recommend(**asked))  # type: ignore[arg-type]
    assert -1 in found.recommend(**asked)["item_id"]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="add the items before fit_ranker"):
        found.add_items(items(50, 1))


def test_the_ranker_is_evaluated_on_its_log(
    log: pl.DataFrame, both: everlong.Recommender, tmp_path: Path
) -> None:
    events = read_events(log, fields=FIELDS, time_unit="s")
    both.save(tmp_path / "model")
    loaded = everlong.load(tmp_path / "model")
    found = evaluate_ranker(loaded, events).as_dict()
    stored = both.origin.metrics["ranking"]
    assert found == {name: stored[name] for name in found}
    assert evaluate_ranker(loaded, events, part="validation").as_dict() != found
    with pytest.raises(ValueError, match="not the one that the ranker was trained on"):
        evaluate_ranker(loaded, read_events(log.head(-1), fields=FIELDS, time_unit="s"))
    with pytest.raises(ValueError, match="expected part 'test'"):
        evaluate_ranker(loaded, events, part="train")


def test_a_loss_is_monitored_for_its_smallest_value(
    log: pl.DataFrame, retriever: everlong.Recommender, tmp_path: Path
) -> None:
    events = read_events(log, fields=FIELDS, time_unit="s")
    training = {"epochs": 6, "batch_size": 1_024, "lr": 0.05, "monitor": "LogLoss"}
    found = everlong.fit_ranker(
        retriever, events, architecture=SHAPE, training=training, folder=tmp_path
    )
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    losses = [json.loads(line)["LogLoss"] for line in lines]
    assert found.origin.metrics["ranking"]["best_epoch"] == 1 + int(np.argmin(losses))
    for monitor, reason in (("Calibration", "1 is best"), ("NDCG", "did you mean 'NDCG@10'")):
        with pytest.raises(ValueError, match=reason):
            everlong.fit_ranker(retriever, events, training={"monitor": monitor})
