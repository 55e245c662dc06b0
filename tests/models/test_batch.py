from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.models.batch import Batch

HISTORIES = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6)


@settings(max_examples=30)
@given(HISTORIES)
def test_histories_come_back_from_a_batch(histories: list[list[int]]) -> None:
    batch = Batch.from_histories(histories)
    assert batch.num_users == len(histories)
    assert batch.num_events == sum(map(len, histories))
    assert batch.lengths.tolist() == list(map(len, histories))
    rows = [row for row, history in enumerate(histories) for _ in history]
    assert batch.user_rows.tolist() == rows
    cuts = batch.offsets.tolist()
    found = [batch.items[a:b].tolist() for a, b in pairwise(cuts)]
    assert found == histories
    assert batch.times.tolist() == [place for h in histories for place in range(len(h))]


def test_times_come_with_the_items() -> None:
    batch = Batch.from_histories([[1, 2], [], [3]], [[10, 20], [], [5]])
    assert batch.times.tolist() == [10, 20, 5]
    with pytest.raises(ValueError, match=r"expected lengths \[2, 0\], received \[1, 0\]"):
        Batch.from_histories([[1, 2], []], [[10], []])


def test_one_event_each() -> None:
    items, times = torch.tensor([4, 5]), torch.tensor([7, 8])
    batch = Batch.one_event_each(items, times, {"label": torch.tensor([0.5, 1.0])})
    assert batch.offsets.tolist() == [0, 1, 2]
    assert batch.fields["label"].tolist() == [0.5, 1.0]
    assert Batch.one_event_each(items[:0], times[:0]).num_users == 0


def test_select_takes_events_and_their_fields() -> None:
    batch = Batch(
        items=torch.tensor([1, 2, 3]),
        times=torch.tensor([4, 5, 6]),
        offsets=torch.tensor([0, 2, 3]),
        fields={"label": torch.tensor([7, 8, 9])},
    )
    part = batch.select(torch.tensor([2, 0]), torch.tensor([0, 1, 1, 2]))
    assert part.items.tolist() == [3, 1]
    assert part.times.tolist() == [6, 4]
    assert part.fields["label"].tolist() == [9, 7]
    assert part.lengths.tolist() == [1, 0, 1]
    assert batch.items.tolist() == [1, 2, 3]


def test_another_device_has_every_tensor() -> None:
    batch = Batch.from_histories([[1, 2]]).to("meta")
    assert {t.device.type for t in (batch.items, batch.times, batch.offsets)} == {"meta"}
