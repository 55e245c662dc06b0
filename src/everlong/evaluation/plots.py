"""Pictures where people would look rather than read; matplotlib is the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LOSS_COLOUR, SCORE_COLOUR = "#8a8a8a", "#1f5fa8"
SIZE_INCHES = (6.4, 3.8)


def plot_learning_curve(
    history: Sequence[Mapping[str, Any]], path: str | Path, *, metric: str = "NDCG@10"
) -> None:
    """Writes a PNG of the loss and a validation metric against the epoch.

    Args:
        history: the lines of ``train.jsonl``.
        path: where the picture goes.
        metric: the validation metric.

    Raises:
        ValueError: if there is no epoch to show.
        ImportError: if matplotlib is not installed.
    """
    if not history:
        raise ValueError("a learning curve needs at least one epoch, received none")
    figure, axes = _figure()
    epochs = [record["epoch"] for record in history]
    axes.plot(epochs, [record["loss"] for record in history], color=LOSS_COLOUR, label="loss")
    axes.set(xlabel="epoch", ylabel="training loss", title="Learning curve")
    measured = [record for record in history if metric in record]
    if measured:
        right = axes.twinx()
        right.plot(
            [record["epoch"] for record in measured],
            [record[metric] for record in measured],
            color=SCORE_COLOUR,
            marker=".",
        )
        right.set_ylabel(f"validation {metric}", color=SCORE_COLOUR)
        right.set_ylim(bottom=0)
    _save(figure, path)


def plot_quality(
    results: Mapping[str, Mapping[str, Any]], path: str | Path, *, metric: str = "NDCG@10"
) -> None:
    """Writes a PNG of a metric against the length of history, a line with intervals a model.

    Args:
        results: name of each model to what ``Evaluation.as_dict`` returns.
        path: where the picture goes.
        metric: which one.

    Raises:
        ValueError: if no result has that metric.
        ImportError: if matplotlib is not installed.
    """
    lines = {
        name: [row for row in result["by_history_length"] if row["metric"] == metric]
        for name, result in results.items()
    }
    # buckets in the order of their lengths, those of all models together
    labels = sorted(
        {row["history"] for rows in lines.values() for row in rows},
        key=lambda label: int(label.rstrip("+").split("-")[0]),
    )
    if not labels:
        raise ValueError(f"no result has the metric {metric!r}; evaluate with it first")
    figure, axes = _figure()
    for name, rows in lines.items():
        means = [row["mean"] for row in rows]
        below = [row["mean"] - row["low"] for row in rows]
        above = [row["high"] - row["mean"] for row in rows]
        places = [labels.index(row["history"]) for row in rows]
        axes.errorbar(places, means, yerr=[below, above], marker="o", capsize=3, label=name)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="events in the history", ylabel=metric, title="Quality by history length")
    axes.legend()
    _save(figure, path)


def plot_cost(
    costs: Mapping[str, Sequence[tuple[int, float]]],
    path: str | Path,
    *,
    label: str = "microseconds per event",
) -> None:
    """Writes a PNG of a cost against the length of history, both on logarithmic axes.

    Args:
        costs: name of each line to its points ``(events of history, cost)``.
        path: where the picture goes.
        label: what the cost is, with its unit.

    Raises:
        ValueError: if there is no point, or one is not above zero.
        ImportError: if matplotlib is not installed.
    """
    points = [point for line in costs.values() for point in line]
    if not points or min(min(point) for point in points) <= 0:
        raise ValueError(
            "logarithmic axes need lengths and costs above 0: "
            f"received {points[:3] if points else 'no points'}"
        )
    figure, axes = _figure()
    for name, line in costs.items():
        axes.plot([length for length, _ in line], [cost for _, cost in line], "o-", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="events in the history", ylabel=label, title="Cost by history length")
    axes.legend()
    _save(figure, path)


def _figure() -> tuple[Any, Any]:
    """A figure that needs no screen, and its axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib, which is not installed: pip install 'everlong[plot]'"
        ) from error
    # not pyplot, which would choose a backend for the whole process
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: str | Path) -> None:
    figure.savefig(Path(path), dpi=120, format="png")
