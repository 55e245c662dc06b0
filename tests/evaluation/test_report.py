from everlong.evaluation.report import columns, comparison, metrics_text


def test_columns_are_aligned() -> None:
    assert columns(("name", "n"), [("a", "1,000"), ("long name", "2")]).splitlines() == [
        "name           n",
        "---------  -----",
        "a          1,000",
        "long name      2",
    ]
    assert columns(("name", "n"), []).splitlines() == ["name  n", "----  -"]


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
    assert "NDCG@10  0.2500 (0.1250-0.5000)" in text
    assert text.splitlines()[-1].split() == ["1-4", "3", "4", "0.2500", "(0.1250-0.5000)"]


def test_models_are_compared_side_by_side() -> None:
    text = comparison({"a": ({"NDCG@10": 0.1}, "8"), "best": ({}, "")}, ["NDCG@10"])
    assert [line.split() for line in text.splitlines()[2:]] == [["a", "0.1000", "8"], ["best", "-"]]
