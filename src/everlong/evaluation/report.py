"""Results as text for people: aligned columns, and tables of metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = ("NDCG@10", "HitRate@10", "MRR@10")


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header, the first column to the left and all others to the right."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[place]) for row in table) for place in range(len(header))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def interval(value: Mapping[str, float]) -> str:
    """A mean with its interval, ``0.1934 (0.1880-0.1987)``."""
    return f"{value['mean']:.4f} ({value['low']:.4f}-{value['high']:.4f})"


def metrics_text(result: Mapping[str, Any], metrics: Sequence[str] = SHOWN) -> str:
    """Metrics of one evaluation with their intervals, then by length of history.

    Args:
        result: what ``Evaluation.as_dict`` returns.
        metrics: which ones.
    """
    head = (
        f"{result['targets']:,} targets of {result['users']:,} users, ranked among all "
        f"{result['items']:,} items; seen items: {result['seen']}"
    )
    if result["masked_targets"]:
        head += f"; {result['masked_targets']:,} targets were seen before and rank last"
    whole = columns(
        ("metric", "mean (95 % interval)"),
        [(name, interval(result["metrics"][name])) for name in metrics],
    )
    cells: dict[str, dict[str, Any]] = {}
    for row in result["by_history_length"]:
        cells.setdefault(row["history"], {})[row["metric"]] = row
    parts = [
        (
            history,
            f"{found[metrics[0]]['users']:,}",
            f"{found[metrics[0]]['targets']:,}",
            *(interval(found[name]) for name in metrics),
        )
        for history, found in cells.items()
    ]
    by_length = columns(("history (events)", "users", "targets", *metrics), parts)
    return f"{head}\n\n{whole}\n\n{by_length}"


def comparison(
    results: Mapping[str, tuple[Mapping[str, float], str]], metrics: Sequence[str] = SHOWN
) -> str:
    """Several models side by side: metrics, then bytes per user.

    Args:
        results: name of each row to its metrics and its bytes per user as text.
        metrics: which ones; a dash where a row has no such metric.
    """
    rows = [
        (
            name,
            *(f"{values[metric]:.4f}" if metric in values else "-" for metric in metrics),
            size,
        )
        for name, (values, size) in results.items()
    ]
    return columns(("model", *metrics, "bytes per user"), rows)
