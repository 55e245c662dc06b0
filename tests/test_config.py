"""Settings load strictly, and errors name the nearest valid key."""

from __future__ import annotations

import pytest

from everlong.config import load_settings, unknown
from everlong.models.lru import LRUConfig
from everlong.train import TrainConfig


def test_text_from_a_command_line_is_read_as_its_type() -> None:
    config = load_settings(TrainConfig, {"epochs": "3", "lr": "1e-2", "decay_recurrence": "true"})
    assert (config.epochs, config.lr, config.decay_recurrence) == (3, 0.01, True)
    assert load_settings(LRUConfig, {"num_items": "5", "dim": "8"}).dim == 8


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            TrainConfig,
            {"epoch": 3},
            "unknown setting 'epoch' of TrainConfig: did you mean 'epochs'",
        ),
        (LRUConfig, {"num_items": 5, "dims": 3}, "did you mean 'dim'"),
        (TrainConfig, {"epochs": "many"}, "epochs: .*received 'many'"),
        (TrainConfig, {"epochs": 0}, "epochs: .*greater than 0, received 0"),
        (TrainConfig, {"schedule": "linear"}, "schedule: .*received 'linear'"),
        (TrainConfig, {"warmup": 2}, "warmup: .*received 2"),
        (LRUConfig, {}, "num_items"),
    ],
)
def test_wrong_settings_are_named(kind: type, values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings(kind, values)


def test_a_name_without_a_near_one_lists_all() -> None:
    assert unknown("model", "zzz", ["lru", "markov"]) == (
        "unknown model 'zzz': Valid names: lru, markov"
    )
