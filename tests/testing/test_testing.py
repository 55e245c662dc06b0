from __future__ import annotations

import logging
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from everlong.models.batch import Batch
from everlong.models.state import State
from everlong.models.user_model import ItemEmbeddings, UserModel
from everlong.testing import LAWS, LawBroken, check_model


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class TinyState(NamedTuple):
    hidden: Tensor  # [B, D]
    user: Tensor  # [B, D]


class Tiny(UserModel):
    """A linear recurrence, one event after the other: slow and plainly right."""

    def __init__(self, num_items: int = 11, dim: int = 3) -> None:
        super().__init__(num_items)
        random = torch.Generator().manual_seed(1)
        self.items = nn.Parameter(torch.randn(num_items, dim, generator=random))
        self.decay = nn.Parameter(torch.tensor([0.5, 0.9, 0.99][:dim]))
        self.mix = nn.Parameter(torch.randn(dim, dim, generator=random))
        self.bias = nn.Parameter(torch.randn(num_items, generator=random))

    def initial_state(self, num_users: int) -> State:
        zero = self.items.new_zeros(num_users, self.items.shape[1])
        return TinyState(zero, torch.tanh(zero @ self.mix))

    def read_event(self, hidden: Tensor, item: Tensor) -> Tensor:
        return self.decay * hidden + self.items[item]

    def first_hidden(self, state: State, user: int, hiddens: list[Tensor]) -> Tensor:
        return state.hidden[user]

    def encode(self, events: Batch, state: State | None = None) -> tuple[Tensor, State]:
        if state is None:
            state = self.initial_state(events.num_users)
        hiddens: list[Tensor] = []
        finals = []
        for user in range(events.num_users):
            hidden = self.first_hidden(state, user, hiddens)
            for item in events.items[events.offsets[user] : events.offsets[user + 1]]:
                hidden = self.read_event(hidden, item)
                hiddens.append(hidden)
            finals.append(hidden)
        stacked = torch.stack(hiddens) if hiddens else state.hidden[:0]
        return torch.tanh(stacked @ self.mix), self.remember(torch.stack(finals))

    def step(self, events: Batch, state: State) -> State:
        return self.remember(self.read_event(state.hidden, events.items))

    def remember(self, hidden: Tensor) -> State:
        return TinyState(hidden, torch.tanh(hidden @ self.mix))

    def item_embeddings(self) -> ItemEmbeddings:
        return ItemEmbeddings(self.items, self.bias)


class MutatesState(Tiny):
    def step(self, events, state):
        state.hidden.mul_(self.decay).add_(self.items[events.items])
        return self.remember(state.hidden)


class ScoreMutatesState(Tiny):
    def score(self, state, items=None, at=None):
        return self.score_vectors(state.user.add_(1.0), items)


class MutatesBatch(Tiny):
    def encode(self, events, state=None):
        events.times.sub_(events.times.min()) if events.num_events else None
        return super().encode(events, state)


class LeaksFuture(Tiny):
    def encode(self, events, state=None):
        outputs, final = super().encode(events, state)
        same = events.user_rows[1:] == events.user_rows[:-1]
        following = self.items[events.items[1:]] * same[:, None]
        return outputs + torch.cat([following, torch.zeros_like(outputs[:1])])[
            : len(outputs)
        ], final


class LeaksLength(Tiny):
    def encode(self, events, state=None):
        outputs, final = super().encode(events, state)
        return outputs / events.lengths.repeat_interleave(events.lengths)[:, None], final


class LeaksNeighbour(Tiny):
    """The recurrence runs on over the border between two users."""

    def first_hidden(self, state, user, hiddens):
        return state.hidden[user] + (hiddens[-1] if hiddens else 0.0)


class CentresBatch(Tiny):
    def step(self, events, state):
        return self.remember(super().step(events, state).hidden)

    def encode(self, events, state=None):
        outputs, final = super().encode(events, state)
        return outputs - (outputs.mean(0) if len(outputs) else 0.0), final


class ScoresOthers(Tiny):
    def score(self, state, items=None, at=None):
        return super().score(state, items, at) + state.user.sum()


class IgnoresState(Tiny):
    def encode(self, events, state=None):
        return super().encode(events, None)


class ForgetsEmptyUsers(Tiny):
    def encode(self, events, state=None):
        outputs, final = super().encode(events, state)
        return outputs, self.remember(final.hidden * (events.lengths > 0)[:, None])


class DriftsToNarrow(Tiny):
    def step(self, events, state):
        after = super().step(events, state)
        return TinyState(after.hidden.to(torch.bfloat16), after.user)


class KeepsFloat32(Tiny):
    def initial_state(self, num_users):
        state = super().initial_state(num_users)
        return TinyState(state.hidden.half(), state.user)


class Grows(Tiny):
    def encode(self, events, state=None):
        outputs, final = super().encode(events, state)
        hidden = final.hidden
        return outputs, TinyState(torch.cat([hidden, hidden[:, -1:]], 1), final.user)


class OneStateForAll(Tiny):
    """A field without a user axis."""

    def initial_state(self, num_users):
        state = super().initial_state(num_users)
        return TinyState(state.hidden, self.items.new_zeros(4, 3))


class DropsOutputs(Tiny):
    def encode(self, events, state=None):
        outputs, final = super().encode(events, state)
        return outputs[1:], final


class SeesTarget(Tiny):
    def forward(self, events, state=None):
        return self.encode(events, state)[0]


class PeeksAtTarget(Tiny):
    """Nearly right: the target moves the training output by a millionth."""

    def forward(self, events, state=None):
        vectors = super().forward(events, state)
        return vectors + 1e-6 * self.items[events.items]


class TrainsFromBlank(Tiny):
    """The first event of a carried history is trained as if it were the first ever."""

    def forward(self, events, state=None):
        vectors = super().forward(events, state)
        busy = events.offsets[:-1][events.lengths > 0]
        blank = self.initial_state(1).user.expand(len(busy), -1)
        return vectors.index_copy(0, busy, blank)


class ServesTime(Tiny):
    """The time of the request counts in serving and not in training."""

    def score(self, state, items=None, at=None):
        scores = super().score(state, items)
        return scores if at is None else scores * (1 + at[:, None] % 7)


class HidesStateInStep(Tiny):
    def step(self, events, state):
        self.last = super().step(events, state)
        return self.last


class HidesStateInBuffer(Tiny):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def encode(self, events, state=None):
        self.calls += 1
        return super().encode(events, state)


class ContinuesFromModule(Tiny):
    """A call without a state goes on from where another one stopped."""

    kept: list[State] = []  # noqa: RUF012 - on the class, where no look at the module finds it

    def initial_state(self, num_users):
        blank = super().initial_state(num_users)
        if self.kept and self.kept[0].hidden.dtype == blank.hidden.dtype:
            return TinyState(*(v[:1].expand(num_users, -1).contiguous() for v in self.kept[0]))
        return blank

    def encode(self, events, state=None):
        outputs, final = super().encode(events, state)
        self.kept[:] = [final]
        return outputs, final


class StepForgetsDecay(Tiny):
    def step(self, events, state):
        return self.remember(state.hidden + self.items[events.items])


class StepForgetsUser(Tiny):
    def step(self, events, state):
        return TinyState(super().step(events, state).hidden, state.user)


class StepDetaches(Tiny):
    def step(self, events, state):
        return self.remember(self.read_event(state.hidden.detach(), events.items))


class CandidatesWithoutBias(Tiny):
    def score_vectors(self, user, items=None):
        if items is None:
            return super().score_vectors(user)
        return torch.einsum("bd,bcd->bc", user, self.items[items])


class GivesNan(Tiny):
    def step(self, events, state):
        hidden = super().step(events, state).hidden
        return TinyState(hidden, torch.tanh(hidden @ self.mix) * float("nan"))


FAULTS = [
    (DriftsToNarrow, 1),
    (KeepsFloat32, 1),
    (Grows, 1),
    (OneStateForAll, 1),
    (DropsOutputs, 1),
    (StepForgetsDecay, 2),
    (StepForgetsUser, 2),
    (StepDetaches, 2),
    (GivesNan, 2),
    (IgnoresState, 3),
    (ForgetsEmptyUsers, 3),
    (LeaksFuture, 4),
    (LeaksLength, 4),
    (LeaksNeighbour, 5),
    (CentresBatch, 5),
    (ScoresOthers, 5),
    (MutatesState, 6),
    (ScoreMutatesState, 6),
    (MutatesBatch, 6),
    (HidesStateInStep, 6),
    (HidesStateInBuffer, 6),
    (ContinuesFromModule, 6),
    (CandidatesWithoutBias, 6),
    (SeesTarget, 7),
    (PeeksAtTarget, 7),
    (TrainsFromBlank, 7),
    (ServesTime, 7),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("fault", "law"), FAULTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_fault_is_caught_by_its_law(fault: type[Tiny], law: int, seed: int) -> None:
    with pytest.raises(LawBroken) as caught:
        check_model(fault(), max_events=9, num_users=5, long_events=20, seed=seed)
    assert caught.value.law == law, str(caught.value)
    assert f"law {law} ({LAWS[law]})" in str(caught.value)
    assert fault.__name__ in str(caught.value)


@pytest.mark.parametrize("fault", [LeaksFuture, LeaksNeighbour, StepDetaches, SeesTarget])
def test_faults_are_caught_in_float32_too(fault: type[Tiny]) -> None:
    with pytest.raises(LawBroken):
        check_model(fault(), max_events=9, num_users=5, long_events=20, dtype=torch.float32)


def test_every_law_has_a_fault() -> None:
    assert {law for _, law in FAULTS} == set(LAWS)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    num_users=st.integers(2, 6),
    max_events=st.integers(1, 12),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_a_correct_model_passes(seed: int, num_users: int, max_events: int, dtype) -> None:
    report = check_model(
        Tiny(), num_users=num_users, max_events=max_events, long_events=20, seed=seed, dtype=dtype
    )
    assert set(report.kept) == set(LAWS)
    assert not report.exempt
    assert max(report.kept.values()) <= {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]


def test_the_model_itself_is_left_alone() -> None:
    model = Tiny().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    check_model(model, max_events=5, num_users=3, long_events=5)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_the_same_seed_finds_the_same_difference() -> None:
    messages = set()
    for _ in range(2):
        with pytest.raises(LawBroken) as caught:
            check_model(LeaksFuture(), max_events=9, num_users=5, long_events=20, seed=3)
        messages.add(str(caught.value))
    assert len(messages) == 1


class Exempt(SeesTarget):
    exemptions = {7: "it is a fault on purpose"}  # noqa: RUF012


def test_an_exemption_is_logged_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "everlong.testing"):
        report = check_model(Exempt(), max_events=5, num_users=3, long_events=5)
    assert "exempt from law 7 (trained = served): it is a fault on purpose" in caplog.text
    assert set(report.kept) == set(LAWS) - {7}
    assert "7 trained = served: exempt: it is a fault on purpose" in str(report)
    assert "2 encode = step: kept, largest difference" in str(report)


class WithFields(Tiny):
    """Reads an action code and a duration with every event."""

    def __init__(self) -> None:
        super().__init__()
        self.actions = nn.Parameter(torch.tensor([1.0, 2.0, -1.0]))

    def encode(self, events, state=None):
        if state is None:
            state = self.initial_state(events.num_users)
        gain = self.gain(events)
        outputs, finals = [], []
        for user in range(events.num_users):
            hidden = state.hidden[user]
            for n in range(int(events.offsets[user]), int(events.offsets[user + 1])):
                hidden = self.decay * hidden + gain[n] * self.items[events.items[n]]
                outputs.append(hidden)
            finals.append(hidden)
        stacked = torch.stack(outputs) if outputs else state.hidden[:0]
        return torch.tanh(stacked @ self.mix), self.remember(torch.stack(finals))

    def step(self, events, state):
        gain = self.gain(events)[:, None]
        return self.remember(self.decay * state.hidden + gain * self.items[events.items])

    def gain(self, events):
        return self.actions[events.fields["action"]] * events.fields["duration"].tanh()


class TargetsAction(WithFields):
    """Training sees the action of the event that it is to predict."""

    def forward(self, events, state=None):
        vectors = super().forward(events, state)
        return vectors * self.actions[events.fields["action"]][:, None]


def test_event_fields_are_drawn() -> None:
    fields = {"action": 3, "duration": None}
    report = check_model(WithFields(), num_users=4, max_events=8, long_events=5, fields=fields)
    assert set(report.kept) == set(LAWS)
    with pytest.raises(LawBroken) as caught:
        check_model(TargetsAction(), num_users=4, max_events=8, long_events=5, fields=fields)
    assert caught.value.law in {5, 7}


def test_sizes_that_check_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="num_users >= 2"):
        check_model(Tiny(), num_users=1)
    with pytest.raises(ValueError, match="float64 or float32"):
        check_model(Tiny(), dtype=torch.bfloat16)
