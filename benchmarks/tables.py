"""The results tables of README.md and docs/results.md, from the records in results/quality.

python benchmarks/tables.py            # writes the tables between their markers
python benchmarks/tables.py --check    # fails if a table differs from the records
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "quality"
MODELS = ("popularity", "recent_popularity", "markov", "gru4rec", "sasrec", "lru")
METRICS = ("NDCG@10", "Recall@10")

Runs = Mapping[tuple[str, str], Mapping[str, Sequence[Mapping[str, Any]]]]
"""By log and protocol, then by model: the records of all seeds."""


def read_records(folder: Path) -> Runs:
    """All test results of a folder; searches are in folders below it and are left out."""
    runs: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        key = (record["data"], record["test"]["protocol"]["name"])
        runs.setdefault(key, {}).setdefault(record["model"], []).append(record)
    return runs


def means(records: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """The metric of each seed."""
    return [record["test"]["metrics"][metric]["mean"] for record in records]


def short_table(runs: Runs, metric: str = "NDCG@10") -> str:
    """One row a log and protocol, one column a model, the mean over seeds."""
    lines = [_row(("log", "protocol", *MODELS)), _row(["---"] * (2 + len(MODELS)))]
    for (data, protocol), models in runs.items():
        cells = [
            f"{statistics.mean(means(models[name], metric)):.4f}" if name in models else "-"
            for name in MODELS
        ]
        lines.append(_row((data, protocol, *cells)))
    return "\n".join(lines)


def long_table(runs: Runs) -> str:
    """One row a log, protocol and model: metrics with their spread, seeds and state."""
    header = ("log", "protocol", "model", *METRICS, "seeds", "state, bytes per user")
    lines = [_row(header), _row(["---"] * len(header))]
    for (data, protocol), models in runs.items():
        for name in (name for name in MODELS if name in models):
            records = models[name]
            lines.append(
                _row(
                    (
                        data,
                        protocol,
                        name,
                        *(spread(means(records, metric)) for metric in METRICS),
                        str(len(records)),
                        f"{records[0]['state_bytes']:,}",
                    )
                )
            )
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds; of one seed the value alone."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"


def insert(text: str, table: str, name: str = "results") -> str:
    """A text with the table between the markers of a name.

    Raises:
        ValueError: if the markers are not there once each, in order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and then {end}, once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if different")
    check = parser.parse_args().check
    runs = read_records(RECORDS)
    different = []
    for path, table in (
        (ROOT / "README.md", short_table(runs)),
        (ROOT / "docs" / "results.md", long_table(runs)),
    ):
        old = path.read_text()
        new = insert(old, table)
        if new != old:
            different.append(path.name)
            if not check:
                path.write_text(new)
    if different:
        print(("out of date: " if check else "written: ") + ", ".join(different))
    return int(check and bool(different))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
