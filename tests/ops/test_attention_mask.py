from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.ops.attention_mask import MaskRuns, block_mask, split_runs


def test_runs_are_cut_into_pieces() -> None:
    run, begin, length = split_runs(torch.tensor([5, 0, 2, 3]), most=2)
    assert run.tolist() == [0, 0, 0, 2, 3, 3]
    assert begin.tolist() == [0, 2, 4, 0, 0, 2]
    assert length.tolist() == [2, 2, 1, 2, 2, 1]


spans_of = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 60), st.integers(0, 60)), min_size=0, max_size=12
)


@settings(max_examples=60)
@given(spans_of, st.none() | st.integers(1, 20))
def test_plans_hold_every_query_once_with_its_columns(
    parts: list[tuple[int, int, int]], window: int | None
) -> None:
    """Keys are numbered ``1000 * owner + column``, so that each block can be read back."""
    queries = torch.tensor([q for q, _, _ in parts], dtype=torch.int64)
    prefix = torch.tensor([p for _, p, _ in parts], dtype=torch.int64)
    first = torch.tensor([min(f, p) for _, p, f in parts], dtype=torch.int64)
    row = queries.cumsum(0) - queries
    owner = torch.arange(len(parts))
    mask = block_mask(
        MaskRuns(owner, row, queries, prefix, first), lambda o, c: 1000 * o + c, window=window
    )
    found: dict[int, list[int]] = {}
    for block in mask:
        for keys, rows, low, high, valid in zip(*(block[i] for i in (1, 0, 2, 3, 4)), strict=True):
            for query, a, b in zip(rows[valid], low[valid], high[valid], strict=True):
                assert int(query) not in found
                found[int(query)] = keys[a:b].tolist()
    expected = {}
    for number, (count, before, _) in enumerate(parts):
        for nth in range(count):
            stop = before + nth + 1
            low = int(first[number]) if window is None else max(int(first[number]), stop - window)
            expected[int(row[number]) + nth] = [1000 * number + c for c in range(low, stop)]
    assert found == expected


def test_spans_of_alike_widths_share_blocks() -> None:
    number = torch.arange(20, 220)
    zero = torch.zeros_like(number)
    spans = MaskRuns(zero, number.cumsum(0) - number, number, zero, zero)
    mask = block_mask(spans, lambda owner, column: owner + column)
    assert len(mask) < 16
    places = sum(block.keys.numel() for block in mask)
    assert places <= 1.25 * int(number.sum()) + 16
