"""Evaluation against loops over users and items, and against what chance must give."""

import json
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import everlong.evaluation.next_item
from everlong.data.events import Events, read_events
from everlong.data.split import PAPER, TEMPORAL, Protocol, Targets, split
from everlong.evaluation.metrics import Metric
from everlong.evaluation.next_item import Evaluation, Seen, evaluate
from everlong.inference.topk import top_k
from everlong.models.batch import Batch
from everlong.models.state import State
from everlong.models.user_model import UserModel

NONE = -1


class LastItemState(NamedTuple):
    last: Tensor


class LastItem(UserModel):
    """Scores from a table by last item, shifted by the parity of the time of the request."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(table.shape[1])
        # the last row is for users without events
        self.register_buffer("table", table)
        self.largest_scores = 0

    def initial_state(self, num_users: int) -> LastItemState:
        return LastItemState(torch.full((num_users,), NONE))

    def encode(
        self, events: Batch, state: LastItemState | None = None
    ) -> tuple[Tensor, LastItemState]:
        last = (self.initial_state(events.num_users) if state is None else state).last.clone()
        own = events.lengths > 0
        last[own] = events.items[events.offsets[1:][own] - 1]
        return events.items[:, None], LastItemState(last)

    def score(self, state: State, items: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        assert items is None
        assert at is not None
        assert not self.training
        scores = self.table[state[0]]
        self.largest_scores = max(self.largest_scores, scores.numel())
        return torch.where(at[:, None] % 2 == 0, scores, scores.roll(1, 1))


class Same(LastItem):
    """Scores that are one row of the table, seen through a view by all users."""

    def score(self, state: State, items: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        return self.table[0].expand(state[0].shape[0], -1)


def make_events(histories: list[list[int]]) -> Events:
    """Events of users 0, 1, ...; items are their own rows if all of 0 .. max appear."""
    lengths = [len(history) for history in histories]
    items = [item for history in histories for item in history]
    times = 1_600_000_000 + np.random.default_rng(0).integers(1, 9, len(items)).cumsum()
    return read_events(
        pl.DataFrame(
            {
                "user_id": np.repeat(np.arange(len(lengths)), lengths),
                "item_id": items,
                "timestamp": times,
            }
        )
    )


def last_out(events: Events, num_targets: int = 1) -> Targets:
    users = np.arange(events.num_users)
    end = events.offsets[1:]
    return Targets(users, events.offsets[:-1], end - num_targets, end)


def oracle(model: LastItem, events: Events, targets: Targets, seen: Seen) -> tuple[list[int], int]:
    """Ranks and masked targets, one user, target and item at a time."""
    ranks, masked = [], 0
    for _, start, stop, end in zip(*targets, strict=True):
        for position in range(stop, end):
            history = events.items[start:position].tolist()
            target, time = int(events.items[position]), int(events.times[position])
            row = model.table[history[-1] if history else NONE].tolist()
            scores = row if time % 2 == 0 else [row[-1], *row[:-1]]
            if seen == "mask":
                scores = [-np.inf if i in history else s for i, s in enumerate(scores)]
                masked += target in history
            order = sorted(range(len(scores)), key=lambda item: (-scores[item], item))
            listed = scores[target] > -np.inf
            ranks.append(order.index(target) + 1 if listed else len(scores))
    return ranks, masked


@st.composite
def problems(draw: st.DrawFn) -> tuple[Events, Targets, LastItem]:
    num_items = draw(st.integers(2, 12))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    histories = [list(range(num_items))]
    histories += [
        rng.integers(num_items, size=n).tolist()
        for n in draw(st.lists(st.integers(1, 25), max_size=8))
    ]
    events = make_events(histories)
    first, end = events.offsets[:-1], events.offsets[1:]
    # any window and any number of targets, users in any order, some left out
    start, stop = np.sort(rng.integers(first, end, size=(2, len(first))), axis=0)
    last = rng.integers(stop + 1, end + 1)
    rows = rng.permutation(len(first))[: draw(st.integers(1, len(first)))]
    targets = Targets(*(values[rows] for values in (np.arange(len(first)), start, stop, last)))
    # few distinct scores: ties everywhere
    table = torch.from_numpy(rng.integers(0, 4, size=(num_items + 1, num_items))).double()
    return events, targets, LastItem(table)


@settings(max_examples=60)
@given(
    problems(),
    st.sampled_from(["mask", "keep"]),
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(1, 100),
)
def test_equal_to_loops_whatever_the_blocks(
    problem: tuple[Events, Targets, LastItem],
    seen: Seen,
    events_per_batch: int,
    scores_per_batch: int,
    state_bytes: int,
) -> None:
    events, targets, model = problem
    told: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(everlong.evaluation.next_item, "STATE_BYTES", state_bytes)
        result = evaluate(
            model,
            events,
            targets,
            seen=seen,
            events_per_batch=events_per_batch,
            scores_per_batch=scores_per_batch,
            progress=lambda *at: told.append(at),
        )
    ranks, masked = oracle(model, events, targets, seen)
    assert result.ranks.tolist() == ranks
    assert result.masked_targets == masked
    assert model.largest_scores <= max(scores_per_batch, model.num_items)
    counts = targets.end - targets.stop
    assert result.users.tolist() == np.repeat(targets.user, counts).tolist()
    positions = np.concatenate([np.arange(a, b) for a, b in zip(*targets[2:], strict=True)])
    assert (result.history_lengths == positions - events.offsets[result.users]).all()
    total = int((targets.end - targets.start).sum())
    assert told[-1] == (total, total)
    assert told == sorted(told)


def test_model_views_are_not_written_to() -> None:
    events = make_events([[0, 1, 2], [2, 1, 0]])
    model = Same(torch.tensor([[3.0, 2.0, 1.0]]))
    result = evaluate(model, events, last_out(events))
    assert result.ranks.tolist() == [1, 1]
    assert model.table.tolist() == [[3.0, 2.0, 1.0]]


def test_the_lower_item_row_comes_first_among_equals() -> None:
    events = make_events([[0, 1, 3, 2]])
    model = Same(torch.zeros(1, 4))
    assert evaluate(model, events, last_out(events), seen="keep").ranks.tolist() == [3]
    # three items of the history are out of the way
    assert evaluate(model, events, last_out(events), seen="mask").ranks.tolist() == [1]


def test_masked_targets_rank_last_and_are_counted() -> None:
    events = make_events([[0, 1, 2, 0], [2, 1, 0]])
    model = Same(torch.tensor([[3.0, 2.0, 1.0]]))
    result = evaluate(model, events, last_out(events), seen="mask")
    assert (result.ranks.tolist(), result.masked_targets) == ([3, 1], 1)
    kept = evaluate(model, events, last_out(events), seen="keep")
    assert (kept.ranks.tolist(), kept.masked_targets) == ([1, 1], 0)


def test_revealed_targets_are_masked_and_read() -> None:
    events = make_events([[0, 1, 2, 1]])
    table = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    model = LastItem(torch.cat([table]))
    # no parity here: all times even
    events.times[:] = 2 * np.arange(4)
    result = evaluate(model, events, last_out(events, 3), seen="mask")
    assert result.ranks.tolist() == [1, 1, 3]
    assert result.masked_targets == 1
    assert evaluate(model, events, last_out(events, 3), seen="keep").ranks.tolist() == [1, 1, 1]


def test_a_random_scorer_hits_ten_in_the_catalogue() -> None:
    rng = np.random.default_rng(5)
    num_users, num_items = 4000, 100
    events = make_events(rng.integers(num_items, size=(num_users, 2)).tolist())
    table = torch.from_numpy(rng.random((num_items + 1, num_items)))
    # one random row per user and last item: a user is a fresh draw
    result = evaluate(LastItem(table), events, last_out(events), seen="keep", metrics=["HR@10"])
    hits = result.metrics["HitRate@10"]
    assert hits.mean == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / num_users))
    assert hits.low < 0.1 < hits.high


def test_a_short_last_block_weighs_no_more() -> None:
    # of 5 users in blocks of 4 and 1, the last alone hits
    events = make_events([[0, 1], [0, 1], [0, 1], [0, 1], [1, 2]])
    model = Same(torch.tensor([[2.0, 1.0, 3.0]]))
    result = evaluate(
        model, events, last_out(events), seen="keep", metrics=["HR@1"], scores_per_batch=16
    )
    assert result.metrics["HitRate@1"].mean == 0.2


def test_names_of_items_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    histories = [list(range(20)), *rng.integers(20, size=(50, 6)).tolist()]
    events = make_events(histories)
    table = torch.from_numpy(rng.random((21, 20)))
    # parity rolls items by their row, so all times are even here
    events.times[:] = 2 * np.arange(events.num_events)
    renamed = rng.permutation(20)
    other = make_events([renamed[history].tolist() for history in histories])
    other.times[:] = events.times
    moved = torch.empty_like(table)
    rows = torch.from_numpy(np.append(renamed, 20))
    moved[rows[:, None], rows[None, :20]] = table
    before = evaluate(LastItem(table), events, last_out(events, 3))
    after = evaluate(LastItem(moved), other, last_out(other, 3))
    assert before.metrics == after.metrics
    assert before.ranks.tolist() == after.ranks.tolist()


def test_ranks_are_places_in_the_served_list() -> None:
    rng = np.random.default_rng(3)
    events = make_events([list(range(30)), *rng.integers(30, size=(20, 4)).tolist()])
    events.times[:] = 2 * np.arange(events.num_events)
    model = LastItem(torch.from_numpy(rng.random((31, 30))))
    targets = last_out(events)
    result = evaluate(model, events, targets, seen="keep")
    state = LastItemState(torch.from_numpy(events.items[targets.stop - 1].astype(np.int64)))
    served = top_k(model.eval().score(state, at=torch.zeros(events.num_users)), 10)[1]
    wanted = torch.from_numpy(events.items[targets.stop].astype(np.int64))
    for rank, listed, item in zip(result.ranks, served.tolist(), wanted.tolist(), strict=True):
        assert (listed.index(item) + 1 if item in listed else 11) == min(rank, 11)


def test_training_mode_and_gradients_are_put_back() -> None:
    events = make_events([[0, 1, 2]])
    model = LastItem(torch.rand(4, 3)).train()
    evaluate(model, events, last_out(events))
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("protocol", [PAPER, TEMPORAL])
def test_targets_of_the_protocols(protocol: Protocol) -> None:
    rng = np.random.default_rng(4)
    log = make_events([list(range(9)), *rng.integers(9, size=(30, 12)).tolist()])
    parts = split(log, protocol)
    model = LastItem(torch.from_numpy(rng.random((parts.events.num_items + 1, 9))))
    for targets in (parts.validation, parts.test):
        result = evaluate(model, parts.events, targets, seen=protocol.seen)
        ranks, masked = oracle(model, parts.events, targets, protocol.seen)
        assert (result.ranks.tolist(), result.masked_targets) == (ranks, masked)


def by_hand() -> Evaluation:
    events = make_events([[0, 1, 2, 0, 1, 2, 2], [2, 1, 2]])
    model = Same(torch.tensor([[1.0, 2.0, 3.0]]))
    users = np.array([0, 1])
    targets = Targets(users, np.array([2, 7]), np.array([3, 7]), np.array([6, 9]))
    return evaluate(model, events, targets, seen="keep", metrics=["HR@1", Metric("MRR", 3)])


def test_per_user_frame() -> None:
    # user 0: items 0, 1, 2 rank 3, 2, 1; user 1: items 2, 1 rank 1, 2
    expected = pl.DataFrame(
        {
            "user": [0, 1],
            "targets": [3, 2],
            "HitRate@1": [1 / 3, 1 / 2],
            "MRR@3": [(1 / 3 + 1 / 2 + 1) / 3, (1 + 1 / 2) / 2],
        }
    )
    assert by_hand().per_user().equals(expected)


def test_by_history_length_frame() -> None:
    # user 0 was at 3, 4 and 5 past events, not at the one event of the window
    frame = by_hand().by_history_length()
    first = frame.filter(metric="HitRate@1").drop("low", "high", "metric")
    expected = pl.DataFrame(
        {
            "history": ["0", "1-4", "5-19"],
            "users": [1, 2, 1],
            "targets": [1, 3, 1],
            "mean": [1.0, 0.0, 1.0],
        }
    )
    assert first.equals(expected)
    assert frame.filter(metric="MRR@3", history="1-4")["mean"].item() == pytest.approx(
        (np.mean([1 / 3, 1 / 2]) + 1 / 2) / 2
    )
    assert (frame["low"] <= frame["mean"]).all()
    assert (frame["mean"] <= frame["high"]).all()


def test_json_says_how_it_was_measured() -> None:
    record = json.loads(by_hand().to_json())
    assert record["users"] == 2
    assert record["targets"] == 5
    assert record["items"] == 3
    assert record["seen"] == "keep"
    assert record["ties"] == "lower item row first, as served"
    assert record["masked_targets"] == 0
    assert record["metrics"]["HitRate@1"]["mean"] == pytest.approx(5 / 12)
    assert [row["history"] for row in record["by_history_length"]][::2] == ["0", "1-4", "5-19"]


def test_bad_input() -> None:
    events = make_events([[0, 1, 2], [1, 1]])
    model, targets = LastItem(torch.rand(4, 3)), last_out(events)
    none = Targets(*(values[:0] for values in targets))
    with pytest.raises(ValueError, match="no targets to evaluate"):
        evaluate(model, events, none)
    with pytest.raises(ValueError, match="'mask' or 'keep', received 'hide'"):
        evaluate(model, events, targets, seen="hide")
    with pytest.raises(ValueError, match="name at least one metric"):
        evaluate(model, events, targets, metrics=[])
    with pytest.raises(ValueError, match="did you mean 'NDCG'"):
        evaluate(model, events, targets, metrics=["NDG@3"])
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 4\).* in row 1"):
        evaluate(model, events, targets._replace(end=np.array([3, 4])))
    with pytest.raises(ValueError, match=r"\(0, 0, 2, 4\).* in row 0"):
        evaluate(model, events, targets._replace(end=np.array([4, 5])))
    with pytest.raises(ValueError, match="within the user's own events"):
        evaluate(model, events, targets._replace(user=np.array([0, 2])))
    with pytest.raises(ValueError, match=r"knows items 0 .. 1, the log has item row 2"):
        evaluate(LastItem(torch.rand(3, 2)), events, targets)
    with pytest.raises(ValueError, match="at least 1 event a batch"):
        evaluate(model, events, targets, events_per_batch=0)


def test_diverged_models_and_wrong_shapes_are_named() -> None:
    events = make_events([[0, 1, 2]])
    with pytest.raises(ValueError, match="received NaN"):
        evaluate(LastItem(torch.full((4, 3), torch.nan)), events, last_out(events))

    class TooFew(LastItem):
        def score(
            self, state: State, items: Tensor | None = None, at: Tensor | None = None
        ) -> Tensor:
            return torch.zeros(1, 2)

    with pytest.raises(ValueError, match=r"expected \(1, 3\), received \(1, 2\)"):
        evaluate(TooFew(torch.rand(4, 3)), events, last_out(events))
