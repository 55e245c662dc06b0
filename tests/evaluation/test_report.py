import re
import sys

import pytest

from everlong.evaluation.report import columns, comparison, interval, metrics_text, ranking_text


def test_columns_are_aligned() -> None:
    assert columns(("name", "n"), [("a", "1,000"), ("long [b]", "2")]).splitlines() == [
        "name           n",
        "----------------",
        "a          1,000",
        "long [b]       2",
    ]
    assert columns(("name", "n"), []).splitlines() == ["name   n", "--------"]


def test_no_cell_is_cut_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    header, line, row = columns(("name", "n"), [("a" * 300, "b" * 300)]).splitlines()
    assert row.split() == ["a" * 300, "b" * 300]
    assert line == "-" * len(row)


def test_a_terminal_has_tables_of_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    text = columns(("name", "n"), [("a" * 30, "1")])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert plain != text
    assert max(map(len, plain.splitlines())) <= 20
    assert plain.count("a") == 31


def test_metrics_are_shown_with_intervals_and_by_length() -> None:
    value = {"mean": 0.25, "low": 0.125, "high": 0.5}
    result = {
        "targets": 1234,
        "users": 1200,
        "items": 50,
        "seen": "mask",
        "masked_targets": 7,
        "metrics": {"NDCG@10": value},
        "by_history_length": [
            {"history": "1-4", "users": 3, "targets": 4, "metric": "NDCG@10", **value}
        ],
    }
    text = metrics_text(result, ["NDCG@10"])
    assert "1,234 targets of 1,200 users" in text
    assert "7 targets were seen before" in text
    assert "NDCG@10   0.2500 (0.1250-0.5000)" in re.sub(r" {3,}", "   ", text)
    assert text.splitlines()[-1].split() == ["1-4", "3", "4", "0.2500", "(0.1250-0.5000)"]


def test_models_are_compared_side_by_side() -> None:
    text = comparison({"a": ({"NDCG@10": 0.1}, "8"), "best": ({}, "")}, ["NDCG@10"])
    assert [line.split() for line in text.splitlines()[2:]] == [["a", "0.1000", "8"], ["best", "-"]]


def test_metrics_of_rankers_are_shown_and_what_is_not_defined_is_a_dash() -> None:
    value = {"mean": 0.25, "low": 0.125, "high": 0.5}
    none = dict.fromkeys(value)
    result = {
        "candidates": 4321,
        "requests": 12,
        "users": 3,
        "skipped_requests": 7,
        "metrics": {"GAUC": value, "AUC": none},
    }
    lines = ranking_text(result, ["GAUC", "AUC"]).splitlines()
    assert lines[0].startswith("4,321 labelled candidates in 12 requests of 3 users; 7 requests")
    assert lines[-2].split() == ["GAUC", "0.2500", "(0.1250-0.5000)"]
    assert lines[-1].split() == ["AUC", "-"]


def test_a_mean_without_an_interval_stands_alone() -> None:
    assert interval({"mean": 0.5, "low": None, "high": None}) == "0.5000"
