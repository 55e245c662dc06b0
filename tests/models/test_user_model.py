from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from everlong.models.batch import Batch
from everlong.models.user_model import ItemEmbeddings, UserModel, shift
from everlong.testing import check_model


class SumState(NamedTuple):
    user: Tensor  # [B, D]


class Sum(UserModel[SumState]):
    """The smallest model of the contract: a user is the sum of the items' vectors."""

    state_kind = "additive"

    def __init__(self, num_items: int, dim: int = 3) -> None:
        super().__init__(num_items)
        self.config = None
        self.items = nn.Embedding(num_items, dim)

    def initial_state(self, num_users: int) -> SumState:
        return SumState(self.items.weight.new_zeros(num_users, self.items.embedding_dim))

    def encode(self, events: Batch, state: SumState | None = None) -> tuple[Tensor, SumState]:
        state = state or self.initial_state(events.num_users)
        outputs, finals = [], []
        for before, low, high in zip(
            state.user, events.offsets[:-1].tolist(), events.offsets[1:].tolist(), strict=True
        ):
            sums = before + self.items(events.items[low:high]).cumsum(0)
            outputs.append(sums)
            finals.append(sums[-1] if high > low else before)
        return torch.cat(outputs), SumState(torch.stack(finals))

    def item_embeddings(self) -> ItemEmbeddings:
        return ItemEmbeddings(self.items.weight, self.items.weight[:, 0])


def test_a_model_of_three_methods_keeps_the_laws() -> None:
    torch.manual_seed(0)
    report = check_model(Sum(7), num_users=5, max_events=9, long_events=30)
    assert report.exempt == {}


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_shift_moves_one_event_later(lengths: list[int]) -> None:
    events = sum(lengths)
    outputs = torch.arange(1.0, events + 1)[:, None]
    before = -torch.arange(1.0, len(lengths) + 1)[:, None]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    expected: list[float] = []
    for user, length in enumerate(lengths):
        own = outputs[offsets[user] : offsets[user + 1], 0].tolist()
        expected += [float(before[user, 0]), *own][:length]
    assert shift(outputs, before, offsets).flatten().tolist() == expected


def test_shift_lets_no_gradient_reach_a_neighbour() -> None:
    outputs = torch.randn(5, 2, requires_grad=True)
    before = torch.randn(3, 2, requires_grad=True)
    moved = shift(outputs, before, torch.tensor([0, 2, 2, 5]))
    slope = torch.randn(5, 2)
    grads = torch.autograd.grad(moved, (outputs, before), slope)
    nothing = torch.zeros(2)
    assert torch.equal(grads[0], torch.stack([slope[1], nothing, slope[3], slope[4], nothing]))
    assert torch.equal(grads[1], torch.stack([slope[0], nothing, slope[2]]))


def test_scores_of_candidates_are_those_of_the_catalogue() -> None:
    torch.manual_seed(0)
    model = Sum(7)
    _, state = model.encode(Batch.from_histories([[1, 2], [3]]))
    items = torch.tensor([[6, 0, 0], [1, 5, 2]])
    every = model.score(state)
    torch.testing.assert_close(model.score(state, items), every.gather(1, items))
    narrow = model.user_embedding(state).bfloat16()
    assert (
        model.score_vectors(narrow).dtype
        == model.score_vectors(narrow, items).dtype
        == torch.bfloat16
    )


def test_one_step_is_the_encoding_of_one_event() -> None:
    model = Sum(4)
    state = model.initial_state(2)
    events = Batch.one_event_each(torch.tensor([1, 3]), torch.tensor([0, 0]))
    assert torch.equal(model.step(events, state).user, model.encode(events)[1].user)


def test_what_a_model_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match="num_items >= 1, received 0"):
        Sum(0)

    class NoHead(Sum):
        item_embeddings = UserModel.item_embeddings

    with pytest.raises(
        TypeError, match=r"NoHead does not score by dot products; use score_vectors\(\)"
    ):
        NoHead(3).score(NoHead(3).initial_state(1))
