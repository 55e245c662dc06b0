"""The script that measures how far back a model remembers."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


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
    script.USERS = {30: 1, 60: 1}
    return script.make_case(3)


def is_answer(script: ModuleType, case: object) -> np.ndarray:
    """``[N]`` whether each event is an answer, from the log's own column."""
    frame = case.log.frame.sort("user_id", "timestamp")
    return frame["is_answer"].to_numpy() == 1


def test_labels_are_answers_and_their_cues_are_read(script: ModuleType, case: object) -> None:
    stage = script.Stage((30, 60), users=50, epochs=1, lr=1e-3)
    segments = script.answers(case, stage, None, 5)
    truth = is_answer(script, case)
    assert len(segments.user) == 100
    first, distance = case.parts.events.offsets[segments.user], case.distance[segments.user]
    for user_first, back, start, stop, label_start in zip(
        first, distance, *segments[1:], strict=True
    ):
        assert stop - label_start == 2
        assert truth[label_start:stop].all()
        assert user_first <= start <= label_start - back


def test_half_of_the_segments_begin_anywhere(script: ModuleType, case: object) -> None:
    stage = script.Stage((30, 60), users=100, epochs=1, lr=1e-3)
    segments = script.answers(case, stage, None, 5)
    late = segments.start - case.parts.events.offsets[segments.user]
    assert (late[segments.user % 2 == 0] == 0).all()
    assert len(np.unique(late[segments.user % 2 == 1])) > 20


def test_a_window_bounds_what_is_read_and_keeps_the_labels(
    script: ModuleType, case: object
) -> None:
    stage = script.Stage((60,), users=5, epochs=1, lr=1e-3)
    whole, cut = (script.answers(case, stage, window, 5) for window in (None, 40))
    assert (cut.stop - cut.start == 40).all()
    assert (cut.label_start == whole.label_start).all()
    assert (cut.stop == whole.stop).all()


def test_the_test_events_are_answers_at_the_distance_of_their_user(
    script: ModuleType, case: object
) -> None:
    targets, truth = case.parts.test, is_answer(script, case)
    assert truth[targets.stop].all()
    lengths = case.parts.events.lengths[targets.user]
    assert (lengths == 3 * (case.distance[targets.user] + 2)).all()


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
