from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.data.audit import Audit, audit, span
from everlong.data.events import read_events

DATA = Path(__file__).parents[2] / "../shared/data"
T = 10**9


def audit_of(rows, **options) -> Audit:
    schema = {"user_id": pl.Int64, "item_id": pl.Int64, "timestamp": pl.Int64}
    return audit(read_events(pl.DataFrame(rows, schema=schema, orient="row"), **options))


def share(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(T, T + 3)),
        min_size=1,
        max_size=40,
    )
)
def test_statistics_equal_a_brute_force_count(rows):
    found = audit_of(rows)
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    users = {u: [row[1:] for row in rows if row[0] == u] for u, _, _ in rows}
    pairs = [pair for events in users.values() for pair in pairwise(events)]
    tied = [(a, b) for a, b in pairs if a[1] == b[1]]
    last = [list(pairwise(events))[-1] for events in users.values() if len(events) > 1]

    assert (found.users, found.events, found.pairs) == (len(users), len(rows), len(pairs))
    assert found.lengths.mean == pytest.approx(np.mean([len(e) for e in users.values()]))
    assert found.tied_pairs == pytest.approx(len(tied) / max(len(pairs), 1))
    together = Counter((u, t) for u, _, t in rows)
    assert found.tied_events == pytest.approx(share(together[u, t] > 1 for u, _, t in rows))
    assert found.repeats == len(rows) - len({row[:2] for row in rows})
    assert found.immediate_repeats == sum(a[0] == b[0] for a, b in pairs)
    assert found.duplicates == len(rows) - len(set(rows))
    for order, some in (
        (found.id_order, pairs),
        (found.id_order_in_ties, tied),
        (found.id_order_of_last_pairs, last),
    ):
        different = [(a, b) for a, b in some if a[0] != b[0]]
        assert order.pairs == len(different)
        assert order.ascending == pytest.approx(
            share(a[0] < b[0] for a, b in different), nan_ok=True
        )
    gaps = [b[1] - a[1] for a, b in pairs]
    assert (found.gaps is None) == (not gaps)
    if found.gaps:
        assert (found.gaps.min, found.gaps.max) == (min(gaps), max(gaps))
        assert found.gaps.p50 == pytest.approx(np.median(gaps))
    counts = Counter(item for _, item, _ in rows)
    assert found.top_items_share == pytest.approx(max(counts.values()) / len(rows))
    assert found.items_seen_once == sum(n == 1 for n in counts.values())
    assert all(isinstance(line, str) for line in found.lines())


def test_events_with_different_fields_are_no_duplicates():
    frame = pl.DataFrame(
        {"user_id": [1, 1, 1], "item_id": [2, 2, 2], "timestamp": [T] * 3, "label": [0, 1, 1]}
    )
    assert audit(read_events(frame)).duplicates == 2
    assert audit(read_events(frame, fields=["label"])).duplicates == 1


def test_ascending_ids_inside_ties_are_detected_and_random_ties_remove_them():
    # 300 users with four items at one time each, written in the order of the ids
    rng = np.random.default_rng(0)
    rows = [
        (u, i, T + u)
        for u in range(300)
        for i in sorted(rng.choice(100, 4, replace=False).tolist())
    ]
    found = audit_of(rows)
    assert found.id_order_in_ties.ascending == 1.0
    assert any("100.0% of 900 tied pairs ascend" in w for w in found.warnings)
    assert any('ties="random"' in w for w in found.warnings)
    cured = audit_of(rows, ties="random", seed=0)
    assert cured.id_order_in_ties.ascending == pytest.approx(0.5, abs=0.06)
    assert not any("item id" in w for w in cured.warnings)


def test_a_few_ascending_pairs_cause_no_warning():
    assert not any("item id" in w for w in audit_of([(1, i, T + i) for i in range(5)]).warnings)


def test_each_fault_of_a_log_causes_its_warning():
    positions = audit_of([(u, (7 * i) % 11, i) for u in range(3) for i in range(10)])
    assert positions.gaps is positions.first_time is None
    assert any("instead of timestamps" in w for w in positions.warnings)
    assert "positions only" in "\n".join(positions.lines())
    baskets = audit_of([(u, i, T + i // 5) for u in range(9) for i in (3, 1, 4, 1, 5)])
    assert any("basket" in w for w in baskets.warnings)
    assert any("use seen=" in w for w in baskets.warnings)
    assert any("short" in w for w in baskets.warnings)
    zero = audit_of([(1, 1, 0), (1, 2, T)])
    assert any("1970-01-01 00:00:00" in w for w in zero.warnings)
    assert any("single event" in w for w in zero.warnings)
    clean = audit_of([(u, (u + i * i) % 30, T + 60 * i) for u in range(40) for i in range(30)])
    assert not [w for w in clean.warnings if "repeat" not in w]


def test_skipped_rows_and_fractions_of_a_second_are_reported():
    frame = pl.DataFrame(
        {
            "user_id": [1, 1, 1, None],
            "item_id": [1, 2, 3, 4],
            "timestamp": [1.5e9, 1.5e9 + 0.1, 1.5e9 + 0.2, 1.5e9],
        }
    )
    found = audit(read_events(frame))
    assert any("1 of 4 rows were skipped: 1 with null user_id" in w for w in found.warnings)
    assert found.tied_pairs == 1.0
    # the order inside those seconds is known, so this is no basket data
    assert not any("basket" in w for w in found.warnings)
    assert "fractions of a second order 2" in "\n".join(found.lines())


def test_time_spans_are_formatted_with_units():
    spans = {0: "0 s", 59: "59 s", 90: "1.5 minutes", 7200: "2.0 hours", 86_400 * 3: "3.0 days"}
    assert {seconds: span(seconds) for seconds in spans} == spans
    assert span(365.25 * 86_400 * 2) == "2.0 years"


def read_shared(name: str, **options) -> Audit:
    path = DATA / name / "interactions.parquet"
    if not path.exists():
        pytest.skip(f"{name} is not beside the project")
    return audit(read_events(path, **options))


def test_events_of_ml_1m_follow_item_ids():
    found = read_shared("ml-1m", timestamp="order")
    assert (found.users, found.items, found.events) == (6_040, 3_416, 999_611)
    assert f"{found.id_order.ascending:.1%}" == "67.0%"
    assert (found.lengths.p50, found.lengths.max) == (96, 2_277)
    assert found.repeats == 0
    assert any("cannot be undone" in w for w in found.warnings)


def test_ties_of_ml_latest_small_follow_item_ids():
    found = read_shared("ml-latest-small")
    assert found.id_order_in_ties.pairs == 15_790
    assert found.id_order_in_ties.ascending == 1.0
    # 15,790 of 100,226 pairs
    assert found.tied_pairs == pytest.approx(0.157, abs=6e-4)
    assert f"{found.tied_events:.1%}" == "23.0%"
    shuffled = read_shared("ml-latest-small", ties="random")
    assert shuffled.id_order_in_ties.ascending == pytest.approx(0.5, abs=0.02)


def test_online_retail_has_baskets_and_repeats():
    found = read_shared("online-retail")
    assert f"{found.tied_pairs:.1%}" == "96.4%"
    assert f"{found.tied_events:.1%}" == "99.7%"
    assert found.repeats == 131_122
    assert any("basket" in w for w in found.warnings)
    assert any("use seen=" in w for w in found.warnings)
