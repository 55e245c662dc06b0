"""Results as text for people: tables of metrics."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import Box
from rich.console import Console
from rich.table import Table

SHOWN = ("NDCG@10", "HitRate@10", "MRR@10")
SHOWN_OF_RANKERS = ("GAUC", "AUC", "NDCG@10", "MRR", "LogLoss", "ECE")

WIDEST = 100_000
"""Characters of a line that is not on a terminal, at most."""

PLAIN = Box("    \n    \n----\n    \n    \n    \n    \n    \n", ascii=True)
"""A line under the header and nothing else, in ASCII: it survives every pipe and file."""


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header, the first column to the left and all others to the right.

    As wide as its cells need, but on a terminal, where it fits the terminal and has a bold header.
    """
    table = Table(box=PLAIN, show_edge=False, pad_edge=False, header_style="bold")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    terminal = sys.stdout.isatty()
    console = Console(file=io.StringIO(), force_terminal=terminal, highlight=False, markup=False)
    if not terminal:
        wide = console.options.update(width=WIDEST)
        console.width = max(1, console.measure(table, options=wide).maximum)
    with console.capture() as text:
        console.print(table)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def interval(value: Mapping[str, float | None]) -> str:
    """A mean with its interval, ``0.1934 (0.1880-0.1987)``; a dash where it is not defined.

    Version 1 stored some metrics of rankers without an interval: the mean stands alone then.
    """
    if value["mean"] is None:
        return "-"
    if value["low"] is None:
        return f"{value['mean']:.4f}"
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
    return f"{head}\n\n{_with_intervals(result, metrics)}\n\n{by_length}"


def ranking_text(result: Mapping[str, Any], metrics: Sequence[str] = SHOWN_OF_RANKERS) -> str:
    """Metrics of a ranker with their intervals.

    Args:
        result: what ``RankingEvaluation.as_dict`` returns.
        metrics: which ones.
    """
    head = (
        f"{result['candidates']:,} labelled candidates in {result['requests']:,} requests of "
        f"{result['users']:,} users; {result['skipped_requests']:,} requests have one class alone"
    )
    return f"{head}\n\n{_with_intervals(result, metrics)}"


def _with_intervals(result: Mapping[str, Any], metrics: Sequence[str]) -> str:
    rows = [(name, interval(result["metrics"][name])) for name in metrics]
    return columns(("metric", "mean (95 % interval)"), rows)


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
