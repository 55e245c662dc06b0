import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import everlong
from everlong.data.ids import IdMap
from everlong.data.synthetic import demo_log, long_dependency

ARCHITECTURE = {"dim": 8, "channels": 8, "layers": 1}
TRAINING = {"epochs": 2, "batch_events": 512, "precision": "float32"}


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return demo_log(0, num_users=30).frame


def fit(frame: pl.DataFrame, **changes: object) -> everlong.Recommender:
    settings = {"architecture": ARCHITECTURE, "training": TRAINING, "protocol": "paper"}
    return everlong.fit(frame, **{**settings, **changes})  # type: ignore[arg-type]


def test_the_same_seed_gives_the_same_bits(frame: pl.DataFrame) -> None:
    one, two = fit(frame), fit(frame)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = fit(frame, training={**TRAINING, "seed": 1})
    assert not torch.equal(
        next(one.model.parameters()).detach(), next(other.model.parameters()).detach()
    )


def test_the_caller_keeps_its_random_numbers(frame: pl.DataFrame) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(frame)
    assert torch.equal(torch.rand(3), expected)


def test_results_carry_what_they_came_from(frame: pl.DataFrame) -> None:
    origin = fit(frame).origin
    for part in ("validation", "test"):
        result = origin.metrics[part]
        assert result["users"] == 30
        assert result["protocol"]["name"] == "paper"
        assert set(result["versions"]) >= {"everlong", "torch", "python"}
        assert result["hardware"]["processor"]
        assert result["best_epoch"] in (1, 2)
    assert origin.data["events"] == frame.height
    assert origin.data["fingerprint"] == everlong.read_events(frame).fingerprint


def test_the_protocol_follows_from_the_times(frame: pl.DataFrame) -> None:
    assert (
        fit(frame, protocol=None, model="popularity", architecture={}).origin.protocol.name
        == "temporal"
    )
    places = frame.with_columns(timestamp=pl.int_range(pl.len()).over("user_id"))
    found = fit(places, protocol=None, model="popularity", architecture={})
    assert found.origin.protocol.name == "paper"
    assert found.origin.time_unit == "position"
    # positions go on in an update
    report = found.update(
        pl.DataFrame({"user_id": [0], "item_id": ["evening"], "timestamp": [999]})
    )
    assert (report.events, report.late) == (1, 0)


def test_items_after_the_cut_are_in_no_catalogue(frame: pl.DataFrame) -> None:
    late = pl.DataFrame(
        {
            "user_id": [0] * 5,
            "item_id": ["brand-new"] * 5,
            "timestamp": [2_000_000_000 + n for n in range(5)],
        }
    )
    log = pl.concat([frame.select("user_id", "item_id", "timestamp"), late])
    found = fit(log, protocol="temporal", model="markov", architecture={})
    assert found.item_ids.rows(["brand-new"]).tolist() == [-1]
    assert found.origin.metrics["test"]["split"]["unknown_item_test_targets"] >= 5


def test_a_log_too_short_to_hold_out_still_gives_a_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one = pl.DataFrame({"user_id": ["a"], "item_id": ["x"], "timestamp": [1_700_000_000]})
    with caplog.at_level(logging.WARNING):
        found = fit(one)
    assert "quality is not measured" in caplog.text
    assert found.origin.metrics == {}
    assert found.recommend(["a"], filter_seen=False)["item_id"].to_list() == ["x"]
    assert found.recommend(["a"]).height == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "lur"}, "unknown model 'lur': did you mean 'lru'"),
        ({"protocol": "papre"}, "unknown protocol 'papre'"),
        ({"architecture": {"dmi": 3}}, "unknown setting 'dmi' of LRUConfig: did you mean 'dim'"),
        ({"architecture": {"dim": "wide"}}, "LRUConfig: dim: "),
        ({"architecture": {"num_items": 3}}, "num_items follows from the log"),
        ({"training": {"epoch": 3}}, "did you mean 'epochs'"),
        ({"training": {"monitor": "NDCG@11"}}, "monitor"),
    ],
)
def test_mistakes_are_named(frame: pl.DataFrame, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(frame, **changes)


def test_an_empty_log_is_named(frame: pl.DataFrame) -> None:
    with pytest.raises(ValueError, match="no events"):
        fit(frame.head(0))


def test_an_interrupted_fit_resumes_to_the_same_bits(
    frame: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(frame, folder=tmp_path / "whole")

    # Ctrl-C in the middle of the second epoch
    real, calls = torch.nn.utils.clip_grad_norm_, []

    def press(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", press)
        with pytest.raises(everlong.Interrupted, match="stopped at epoch 2, batch"):
            fit(frame, folder=tmp_path / "cut")
    again = fit(frame, folder=tmp_path / "cut", resume=True)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert [r["NDCG@10"] for r in lines[0]] == [r["NDCG@10"] for r in lines[1]]


def test_a_checkpoint_of_other_settings_is_refused(frame: pl.DataFrame, tmp_path: Path) -> None:
    fit(frame, folder=tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another run: training\.lr"):
        fit(frame, folder=tmp_path, resume=True, training={**TRAINING, "lr": 0.5})


def test_sampled_softmax_and_long_histories_learn(tmp_path: Path) -> None:
    # histories longer than a batch: the state is carried from one to the next
    log = long_dependency(6, distances=(100,), num_fillers=10, num_cues=4)
    found = fit(
        log.frame,
        training={**TRAINING, "batch_events": 64, "loss": "sampled", "negatives": 8, "lr": 0.01},
        folder=tmp_path,
    )
    first, second = (
        json.loads(line)["loss"] for line in (tmp_path / "train.jsonl").read_text().splitlines()
    )
    assert second < first
    assert found.recommend([0], k=3, filter_seen=False).height == 3


def items_of(frame: pl.DataFrame, width: int = 3) -> everlong.ItemTable:
    """Random vectors of the items of a log, in an order of their own and with one more."""
    ids = [*frame["item_id"].unique().sort(descending=True), "brand-new"]
    vectors = np.random.default_rng(0).normal(size=(len(ids), width)).tolist()
    columns = {"item_id": ids, "text": vectors, "genre": ["x"] * len(ids)}
    item_ids = IdMap.in_order(ids)
    return everlong.read_items(
        pl.DataFrame(columns), item_ids, vectors=["text"], categorical=["genre"]
    )


@pytest.mark.parametrize("ids", [True, False])
def test_items_are_aligned_by_their_ids(frame: pl.DataFrame, tmp_path: Path, ids: bool) -> None:
    items = items_of(frame)
    found = fit(frame, items=items, architecture={**ARCHITECTURE, "ids": ids})
    assert found.model.config.vectors == 3
    assert found.origin.data["item_vectors"] == {"text": 3}
    inside = found.model.items
    assert (inside.ids is not None) == ids
    expected = items.joined_vectors(found.item_ids)
    restored = inside.vectors * inside.length + inside.center
    np.testing.assert_allclose(restored, expected, atol=1e-5)
    for item in ("evening", found.item_ids.ids([3])[0]):
        row, place = found.item_ids.rows([item])[0], items.item_ids.rows([item])[0]
        np.testing.assert_allclose(restored[row], items.vectors["text"][place], atol=1e-5)

    found.save(tmp_path / "model")
    loaded = everlong.load(tmp_path / "model")
    users = list(range(30))
    assert_frame_equal(loaded.recommend(users, k=5), found.recommend(users, k=5))
    assert loaded.origin.data == found.origin.data


def test_items_without_a_vector_are_counted(
    frame: pl.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    some = items_of(frame.filter(pl.col("item_id") != "evening"))
    with caplog.at_level(logging.WARNING):
        found = fit(frame, items=some, architecture={**ARCHITECTURE, "ids": False})
    assert f"1 of {len(found.item_ids)} items have no vector" in caplog.text
    row = found.item_ids.rows(["evening"])[0]
    assert not found.model.items.vectors[row].any()
    strangers = items_of(frame.head(0))
    with pytest.raises(ValueError, match="received some for none of them"):
        fit(frame, items=strangers)


def test_models_of_ids_alone_leave_vectors_alone(
    frame: pl.DataFrame, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = fit(frame, model="popularity", architecture={}, items=items_of(frame))
    assert "model popularity knows items by their ids" in caplog.text
    assert "item_vectors" not in found.origin.data


def test_vectors_and_architecture_must_fit(frame: pl.DataFrame) -> None:
    with pytest.raises(ValueError, match="pass items=, and leave vectors out"):
        fit(frame, architecture={**ARCHITECTURE, "vectors": 3})
    with pytest.raises(ValueError, match="set vectors= in the architecture to the width"):
        fit(frame, architecture={**ARCHITECTURE, "vectors": 4}, items=items_of(frame))
    with pytest.raises(ValueError, match="expected vectors >= 1 where ids=False"):
        fit(frame, architecture={**ARCHITECTURE, "ids": False})
