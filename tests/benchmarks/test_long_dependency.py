"""The script that measures how far back a model remembers."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("long_dependency", FOLDER / "long_dependency.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    try:
        # dataclasses look their module up by its name
        sys.modules["long_dependency"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
        del sys.modules["long_dependency"]
    return module


@pytest.fixture(scope="module")
def case(script: ModuleType) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "USERS", {30: 1, 60: 1})
        return script.make_case(3)


def is_answer(script: ModuleType, case: object) -> np.ndarray:
    """``[N]`` whether each event is an answer, from the log's own column."""
    frame = case.log.frame.sort("user_id", "timestamp")
    return frame["is_answer"].to_numpy() == 1


def test_labels_are_all_answers_and_their_cues_are_read(script: ModuleType, case: object) -> None:
    stage = script.Stage((30, 60), users=50, epochs=1, lr=1e-3)
    segments = script.answers(case, stage, None)
    truth, offsets = is_answer(script, case), case.parts.events.offsets
    labels = np.zeros(len(truth), dtype=np.int64)
    for user, start, stop, label_start in zip(*segments, strict=True):
        labels[label_start:stop] += 1
        assert start == offsets[user] <= label_start - case.distance[user]
    trained = np.isin(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), segments.user)
    assert len(np.unique(segments.user)) == 100
    assert (labels == (truth & trained)).all()


def test_a_window_limits_the_history_and_keeps_the_labels(script: ModuleType, case: object) -> None:
    stage = script.Stage((60,), users=5, epochs=1, lr=1e-3)
    whole, cut = (script.answers(case, stage, window) for window in (None, 40))
    assert (cut.stop - cut.start == 40).all()
    assert (cut.label_start == whole.label_start).all()
    assert (cut.stop == whole.stop).all()


def test_no_user_is_in_training_and_in_test(script: ModuleType) -> None:
    most = {
        d: max(s.users for s in script.STAGES if d in s.distances) for d in (30, 100, 300, 1000)
    }
    for distance, users in most.items():
        assert users + script.TEST_USERS <= 100 * script.USERS[distance]
    trained = {distance for stage in script.STAGES for distance in stage.distances}
    assert trained.isdisjoint(script.UNTRAINED)


def test_the_test_events_are_answers_at_the_distance_of_their_user(
    script: ModuleType, case: object
) -> None:
    targets, truth = case.parts.test, is_answer(script, case)
    assert truth[targets.stop].all()
    lengths = case.parts.events.lengths[targets.user]
    assert (lengths == 2 * (case.distance[targets.user] + 2)).all()


def test_summary_is_the_mean_over_seeds(script: ModuleType, case: object) -> None:
    runs = [
        {
            "model": "lru",
            "seconds": seconds,
            "bytes_per_user": 8,
            "by_distance": [
                {"distance": 30, "HitRate@1": score},
                {"distance": 60, "HitRate@1": 0.5},
            ],
        }
        for seconds, score in ((1.0, 0.8), (2.0, 1.0))
    ]
    (row,) = script.summary(runs)
    assert row["HitRate@1"] == {"30": 0.9, "60": 0.5}
    assert row["lowest"] == {"30": 0.8, "60": 0.5}
    assert row["seconds"] == 1.5
