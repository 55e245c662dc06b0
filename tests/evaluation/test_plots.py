import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from everlong.evaluation.plots import plot_cost, plot_learning_curve, plot_quality

HISTORY = [{"epoch": 1, "loss": 5.0}, {"epoch": 2, "loss": 4.0, "NDCG@10": 0.1}]
ROW = {"metric": "NDCG@10", "mean": 0.2, "low": 0.1, "high": 0.4}
RESULT = {"by_history_length": [{"history": h, **ROW} for h in ("1-4", "0", "1000+")]}

DRAWINGS: dict[str, Callable[[Path], None]] = {
    "learning curve": lambda path: plot_learning_curve(HISTORY, path),
    "quality": lambda path: plot_quality({"a": RESULT, "b": RESULT}, path),
    "cost": lambda path: plot_cost({"a": [(10, 0.5), (1000, 0.6)]}, path),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_picture_is_written(name: str, tmp_path: Path) -> None:
    DRAWINGS[name](tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 5_000


@pytest.mark.parametrize("name", DRAWINGS)
def test_without_matplotlib_the_extra_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"everlong\[plot\]"):
        DRAWINGS[name](tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_draw_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one epoch"):
        plot_learning_curve([], tmp_path / "picture.png")
    with pytest.raises(ValueError, match="'NDCG@11'"):
        plot_quality({"a": RESULT}, tmp_path / "picture.png", metric="NDCG@11")
    with pytest.raises(ValueError, match="above 0"):
        plot_cost({"a": [(0, 1.0)]}, tmp_path / "picture.png")
