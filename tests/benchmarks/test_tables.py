"""The script that turns benchmark records into tables."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "tables.py"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_record(folder: Path, model: str, seed: int, value: float) -> None:
    metrics = {name: {"mean": value} for name in ("NDCG@10", "Recall@10")}
    record = {
        "data": "log",
        "model": model,
        "seed": seed,
        "state_bytes": 2304,
        "test": {"protocol": {"name": "paper"}, "metrics": metrics},
    }
    (folder / f"log-paper-{model}-{seed}.json").write_text(json.dumps(record))


def test_records_are_summarised_by_mean_and_deviation(tables: ModuleType, tmp_path: Path) -> None:
    write_record(tmp_path, "lru", 0, 0.10)
    write_record(tmp_path, "lru", 1, 0.20)
    write_record(tmp_path, "markov", 0, 0.05)
    runs = tables.read_records(tmp_path)
    row = tables.short_table(runs).splitlines()[2]
    assert row == "| log | paper | - | - | 0.0500 | - | - | 0.1500 |"
    assert tables.long_table(runs).splitlines()[2:] == [
        "| log | paper | markov | 0.0500 | 0.0500 | 1 | 2,304 |",
        "| log | paper | lru | 0.1500 ± 0.0707 | 0.1500 ± 0.0707 | 2 | 2,304 |",
    ]


def test_a_table_replaces_the_one_between_the_markers(tables: ModuleType) -> None:
    text = "a\n<!-- results -->\nold\n<!-- /results -->\nb\n"
    new = tables.insert(text, "new")
    assert new == "a\n<!-- results -->\nnew\n<!-- /results -->\nb\n"
    assert tables.insert(new, "new") == new
    with pytest.raises(ValueError, match="once each"):
        tables.insert("no markers", "new")
