"""Buckets of history lengths."""

import numpy as np

from everlong.evaluation.history import bucket_label, history_bucket


def test_history_buckets() -> None:
    lengths = np.array([0, 1, 4, 5, 19, 20, 49, 50, 199, 200, 499, 500, 999, 1000, 10**9])
    labels = [bucket_label(int(bucket)) for bucket in history_bucket(lengths)]
    assert labels[0] == "0"
    expected = ["1-4", "5-19", "20-49", "50-199", "200-499", "500-999", "1000+"]
    assert labels[1:] == [label for label in expected for _ in range(2)]
