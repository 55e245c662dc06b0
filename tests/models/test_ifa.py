"""IFA: the seven laws, one pass for all requests, and states that add, merge and forget."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.forms import slow
from torch import Tensor

from everlong.data.ids import IdMap
from everlong.data.items import read_items
from everlong.models import state as states
from everlong.models.batch import Batch, RequestBatch
from everlong.models.ifa import IFA, IFAConfig, IFAState
from everlong.ops.sets import Sets
from everlong.recommender.fit_ranker import fill_items, item_features
from everlong.testing import check_model
from everlong.training.ranker_losses import ranker_loss

FIELDS = {"label": 2}
DAY_S = 86_400.0


def small(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> IFA:
    """A small model whose parameters are large enough that nothing is nearly nothing."""
    torch.manual_seed(seed)
    shape = {"window": 4, "spare": 2, "half_lives": (0.0, DAY_S), "fields": (("label", 2),)}
    config = {"num_items": 9, "dim": 8, "heads": 2, "layers": 2, **shape, **changes}
    model = IFA(IFAConfig(**config))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def random_events(lengths: list[int], seed: int, gap_s: int = 40_000) -> Batch:
    """Events with many ties."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    gaps = torch.randint(0, 3, (total,), generator=generator) * gap_s
    times = [10**9 + part.cumsum(0) for part in gaps.split(lengths)]
    return Batch(
        items=torch.randint(0, 9, (total,), generator=generator),
        times=torch.cat(times),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        fields={"label": torch.randint(0, 2, (total,), generator=generator)},
    )


def random_requests(events: Batch, seed: int) -> RequestBatch:
    """Requests at and between the times of events; the history ends strictly before."""
    generator = torch.Generator().manual_seed(seed)
    user, cut, at = [], [], []
    for row in range(events.num_users):
        times = events.times[events.offsets[row] : events.offsets[row + 1]]
        asked = torch.randint(10**9 - 1, 10**9 + 600_000, (3,), generator=generator)
        for time in torch.cat([asked, times[:1], times[-1:]]).sort().values.tolist():
            user.append(row)
            cut.append(int((times < time).sum()))
            at.append(time)
    sizes = torch.randint(0, 5, (len(user),), generator=generator)
    return RequestBatch(
        events=events,
        user=torch.tensor(user),
        cut=torch.tensor(cut),
        times=torch.tensor(at),
        offsets=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
        items=torch.randint(0, 9, (int(sizes.sum()),), generator=generator),
        labels=torch.zeros(int(sizes.sum())),
        rows=torch.arange(len(user)),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        slow({"candidate_attention": False}),
        {"window": 0},
        {"half_lives": (3_600.0, DAY_S, 7 * DAY_S), "layers": 1},
        slow({"feature_map": "exp"}),
        slow({"feature_map": "taylor"}),
        {"feature_map": "random"},
        {"clock": False, "fields": ()},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, slow(torch.float32)])
def test_keeps_the_seven_laws(changes: dict[str, object], dtype: torch.dtype) -> None:
    report = check_model(
        small(**changes), dtype=dtype, fields=FIELDS, num_users=4, max_events=16, long_events=60
    )
    assert report.exempt == {}


@pytest.mark.parametrize("changes", [{}, {"candidate_attention": False}, {"window": 0}])
@pytest.mark.parametrize("seed", range(3))
def test_one_pass_for_all_requests_is_the_score_from_each_state(
    changes: dict[str, object], seed: int
) -> None:
    model = small(seed, **changes)
    events = random_events([9, 0, 1, 14], seed)
    batch = random_requests(events, seed)
    with torch.no_grad():
        trained = model.rank(batch)
        for number in range(batch.user.numel()):
            start = int(events.offsets[batch.user[number]])
            index = torch.arange(start, start + int(batch.cut[number]))
            state = model.final_state(events.select(index, torch.tensor([0, len(index)])))
            a, b = batch.offsets[number : number + 2].tolist()
            served = model.score(state, batch.items[None, a:b], batch.times[number : number + 1])
            assert torch.allclose(served[0], trained[a:b], atol=1e-9)


def test_gradients_of_the_one_pass_are_those_of_the_states() -> None:
    model = small()
    events = random_events([7, 3], 5)
    batch = random_requests(events, 5)
    found = []
    for way in ("pass", "states"):
        model.zero_grad()
        weights = torch.randn(
            batch.items.numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
        if way == "pass":
            loss = (model.rank(batch) * weights).sum()
        else:
            loss = torch.zeros((), dtype=torch.float64)
            for number in range(batch.user.numel()):
                start = int(events.offsets[batch.user[number]])
                index = torch.arange(start, start + int(batch.cut[number]))
                state = model.final_state(events.select(index, torch.tensor([0, len(index)])))
                a, b = batch.offsets[number : number + 2].tolist()
                scores = model.score(state, batch.items[None, a:b], batch.times[number, None])
                loss = loss + (scores[0] * weights[a:b]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        found.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in model.named_parameters()
            }
        )
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-9), name


def same_states(model: IFA, a: IFAState, b: IFAState, tolerance: float = 1e-10) -> None:
    at = torch.maximum(a.at, b.at) + 1_000
    assert torch.equal(a.events, b.events)
    for name in ("items", "times", "codes", "filled"):
        size = model.config.window
        left, right = (getattr(state, name) for state in (a, b))
        if name == "filled":
            left, right = left.clamp(max=size), right.clamp(max=size)
        elif size:
            left, right = left[:, -size:], right[:, -size:]
        assert torch.equal(left, right), name
    assert torch.allclose(model.user_embedding(a, at), model.user_embedding(b, at), atol=tolerance)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_order_of_arrival_and_merging_make_no_difference(lengths: list[int], seed: int) -> None:
    model, events = small(), random_events(lengths, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        whole = model.final_state(events)
        # one by one in any order
        late = model.initial_state(len(lengths))
        for row, length in enumerate(lengths):
            for place in torch.randperm(length, generator=generator).tolist():
                index = events.offsets[row, None] + place
                one = events.select(index, torch.tensor([0, 1]))
                rows = torch.tensor([row])
                late = states.put(late, rows, model.step(one, states.take(late, rows)))
        same_states(model, whole, late)
        half = torch.rand(events.num_events, generator=generator) < 0.5
        a, b = (model.final_state(chosen(events, mask)) for mask in (half, ~half))
        same_states(model, whole, model.merge(a, b))


def chosen(events: Batch, mask: Tensor) -> Batch:
    counts = torch.bincount(events.user_rows[mask], minlength=events.num_users)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return events.select(mask.nonzero().flatten(), offsets)


@settings(max_examples=20)
@given(length=st.integers(1, 14), seed=st.integers(0, 99))
def test_what_is_removed_was_never_there(length: int, seed: int) -> None:
    model, events = small(spare=14), random_events([length, 3], seed)
    generator = torch.Generator().manual_seed(seed)
    gone = torch.rand(events.num_events, generator=generator) < 0.4
    with torch.no_grad():
        left = model.remove(chosen(events, gone), model.final_state(events))
        same_states(model, model.final_state(chosen(events, ~gone)), left, 1e-9)


def test_removal_says_when_the_state_must_be_built_anew() -> None:
    model, events = small(spare=0), random_events([12], 1)
    state = model.final_state(events)
    newest = events.select(torch.tensor([11]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="expected the newest 4 events to be held, received 3"):
        model.remove(newest, state)
    oldest = events.select(torch.tensor([0]), torch.tensor([0, 1]))
    assert int(model.remove(oldest, state).events) == 11
    foreign = replace(newest, times=newest.times + 5)
    with pytest.raises(ValueError, match="as new as the events that are held but not among them"):
        model.remove(foreign, state)
    with pytest.raises(ValueError, match="expected at most 12 events to remove, received 13"):
        model.remove(random_events([13], 1), state)


def test_nothing_left_is_exactly_nothing() -> None:
    model, events = small(), random_events([4], 2)
    left = model.remove(events, model.final_state(events))
    empty = model.initial_state(1)
    for name, a, b in zip(states.field_names(empty), left, empty, strict=True):
        if name != "at":
            assert torch.equal(a, b), name


def test_without_a_history_everyone_sees_the_null_event() -> None:
    model = small()
    scores = model.score(
        model.initial_state(2), torch.tensor([[1, 2], [1, 2]]), torch.tensor([0, 0])
    )
    assert bool(scores.isfinite().all())
    torch.testing.assert_close(scores[0], scores[1])


def test_candidates_see_each_other_unless_told_not_to() -> None:
    events = random_events([6], 3)
    items, at = torch.tensor([[3, 4, 5]]), torch.tensor([2 * 10**9])
    together, alone = small(), small(candidate_attention=False)
    for model, same in ((together, False), (alone, True)):
        state = model.final_state(events)
        whole = model.score(state, items, at)
        assert torch.allclose(whole[:, :2], model.score(state, items[:, :2], at)) is same
        order = torch.tensor([2, 0, 1])
        assert torch.allclose(whole[:, order], model.score(state, items[:, order], at))
    # one candidate: attention among candidates adds what it makes of the candidate alone
    layer = together.layers[1].among
    value = torch.randn(1, 8, dtype=torch.float64)
    part = layer.enter(layer.norm(value))[:, 16:]
    sets_of_one = together.score(together.final_state(events), items[:, :1], at)
    assert sets_of_one.shape == (1, 1)
    assert torch.allclose(layer(value, Sets.of(torch.tensor([0, 1]))), layer.leave(part))


def test_float32_sums_do_not_drift() -> None:
    # 20,000 events one by one; the long form is in benchmarks/ranking_cost.py
    exact, model = small(window=0), small(window=0).float()
    events = random_events([20_000], 7, gap_s=30)
    with torch.no_grad():
        state = model.initial_state(1)
        for part in torch.arange(20_000).split(50):
            piece = events.select(part, torch.tensor([0, len(part)]))
            state = model.final_state(piece, state)
        at, items = events.times[-1:] + 60, torch.arange(9)[None]
        expected = exact.score(exact.final_state(events), items, at)
        worst = (model.score(state, items, at).double() - expected).abs().max()
    assert float(worst) < 1e-4


def test_head_can_be_trained_without_rebuilding_states() -> None:
    model = small()
    before, digest = model.final_state(random_events([5], 1)), model.history_digest()
    model.freeze_history()
    batch = random_requests(random_events([8, 4], 2), 2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    old = model.score(before)
    model.rank(batch).square().sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert model.history_digest() == digest
    after = model.final_state(random_events([5], 1))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(old, model.score(before))
    with torch.no_grad():
        model.memories[1].key.weight += 0.1  # type: ignore[union-attr, operator]
    assert model.history_digest() != digest


def test_item_features_are_read() -> None:
    table = pl.DataFrame(
        {
            "item_id": [0, 1, 2, 3],
            "genres": ["a|b", "a", None, "c"],
            "maker": ["x", "y", "x", None],
            "vector": [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]],
        }
    )
    items = read_items(
        table,
        IdMap.from_values(pl.Series(range(5))),
        categorical=("maker",),
        multi=("genres",),
        vectors=("vector",),
    )
    categories, vectors = item_features(items)
    model = small(num_items=5, categories=categories, vectors=vectors)
    fill_items(model, items)
    rows = torch.tensor([[0, 2], [4, 1]])
    found = model.items(rows)
    assert found.shape == (2, 2, 8)
    genres = model.items.tables[1].weight
    names = items.categories["genres"].names
    maker = model.items.tables[0].weight[items.categories["maker"].names.index("x")]
    expected = (
        model.items.ids.weight[0]
        + maker
        + (genres[names.index("a")] + genres[names.index("b")]) / 2
        + model.items.maps[0].weight[:, 0]
    )
    assert torch.allclose(found[0, 0], expected)
    assert bool(found.isfinite().all())
    again = IFA(model.config).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.items(rows), found)
    with pytest.raises(ValueError, match="expected items with a feature 'maker'"):
        fill_items(model, replace(items, categories={}))
    wrong = small(num_items=5, categories=(("maker", 3, 7), categories[1]), vectors=vectors)
    with pytest.raises(ValueError, match="item feature 'maker': expected"):
        fill_items(wrong, items)


def test_bad_input_is_named() -> None:
    events = random_events([3], 0)
    with pytest.raises(ValueError, match="expected events with a field 'label', received none"):
        small().final_state(replace(events, fields={}))
    with pytest.raises(
        ValueError, match=r"field 'label': expected codes 0 \.\. 1, received 5 \.\. 5"
    ):
        small().final_state(replace(events, fields={"label": torch.full((3,), 5)}))
    for change, message in (
        ({"dim": 9}, "dim a multiple of heads"),
        ({"feature_map": "relu"}, "expected feature_map one of elu, exp"),
        ({"half_lives": ()}, "expected half_lives in seconds"),
        ({"half_lives": (-1.0,)}, "expected half_lives in seconds"),
        ({"window": -1}, "expected window >= 0"),
        ({"layers": 0}, "expected layers >= 1"),
        ({"spare": -1}, "expected spare >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**change)


def test_learns_which_items_go_together() -> None:
    # an item is liked if the history has its partner, however far back
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    shape = {"num_items": 20, "dim": 16, "heads": 2, "layers": 1, "window": 0, "dropout": 0.0}
    model = IFA(IFAConfig(**shape, clock=False))  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def draw(users: int) -> RequestBatch:
        histories = np.stack([generator.permutation(10)[:4] for _ in range(users)])
        candidates = np.stack([10 + generator.permutation(10)[:5] for _ in range(users)])
        labels = (candidates[:, :, None] - 10 == histories[:, None]).any(2)
        rows = torch.arange(users)
        return RequestBatch(
            events=Batch.from_histories(histories.tolist()),
            user=rows,
            cut=torch.full((users,), 4),
            times=torch.full((users,), 100),
            offsets=torch.arange(users + 1) * 5,
            items=torch.from_numpy(candidates.flatten()),
            labels=torch.from_numpy(labels.flatten().astype(np.float32)),
            rows=rows,
        )

    for _ in range(150):
        batch = draw(64)
        optimizer.zero_grad()
        ranker_loss(model.rank(batch), batch.labels, batch.offsets, {"pointwise": 1.0}).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    batch = draw(200)
    right = (model.rank(batch) > 0) == (batch.labels > 0.5)
    assert float(right.float().mean()) > 0.95
