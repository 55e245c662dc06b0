"""States in blocks are as in one tensor, and take memory as they are needed."""

from __future__ import annotations

import gc
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from everlong.server.store.state_blocks import StateBlocks
from everlong.system.memory import MemoryBudget


class Memory(NamedTuple):
    hidden: Tensor
    places: Tensor
    half: Tensor


INITIAL = Memory(
    torch.zeros(1, 2, 3),
    torch.zeros(1, 4, dtype=torch.int64),
    torch.zeros(1, 5, dtype=torch.bfloat16),
)
ROW = 24 + 32 + 10
ROWS = 300


def random_states(count: int, seed: int) -> Memory:
    draw = torch.Generator().manual_seed(seed)
    return Memory(
        torch.randn(count, 2, 3, generator=draw),
        torch.randint(0, 1 << 60, (count, 4), generator=draw),
        torch.randn(count, 5, generator=draw).bfloat16(),
    )


@given(
    steps=st.lists(st.lists(st.integers(0, ROWS - 1), unique=True, max_size=40), max_size=8),
    block_bytes=st.sampled_from([1, 64 * ROW, 150 * ROW, 1 << 20]),
)
def test_blocks_are_as_one_tensor(steps: list[list[int]], block_bytes: int) -> None:
    blocks = StateBlocks(INITIAL, MemoryBudget(1 << 30), block_bytes=block_bytes)
    blocks.grow(ROWS)
    whole = Memory(*(value.repeat(ROWS, *[1] * (value.ndim - 1)) for value in INITIAL))
    for seed, step in enumerate(steps):
        rows, new = np.array(step, dtype=np.int64), random_states(len(step), seed)
        blocks.put(rows, new)
        for stored, value in zip(whole, new, strict=True):
            stored[rows] = value
        asked = np.concatenate([rows, rows[:3], np.arange(0, ROWS, 7)])
        for a, b in zip(blocks.take(asked), whole, strict=True):
            assert torch.equal(a, b[asked])


def test_growth_stays_within_the_budget_and_is_given_back() -> None:
    budget = MemoryBudget(10 * 64 * ROW)
    blocks = StateBlocks(INITIAL, budget, block_bytes=64 * ROW)
    assert budget.free == budget.limit
    blocks.grow(1)
    assert budget.free == 9 * 64 * ROW
    blocks.grow(640)
    with pytest.raises(MemoryError, match="the states of 641 users"):
        blocks.grow(641)
    blocks.grow(640)
    del blocks
    gc.collect()
    assert budget.free == budget.limit
