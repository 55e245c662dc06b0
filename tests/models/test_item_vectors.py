"""Items as ids, as vectors and as both: what models make of them, and items that come later."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import everlong
from everlong.data.ids import IdMap
from everlong.data.items import ItemTable, read_items
from everlong.models.batch import Batch
from everlong.models.item_vectors import ItemConfig, ItemVectors, item_vectors, with_more_items
from everlong.models.registry import built_in_names, config_class, load_model_class
from everlong.models.user_model import UserModel
from everlong.testing import check_model
from everlong.training.next_item_losses import full_softmax

ITEMS, WIDTH = 9, 5
TAKES_VECTORS = [
    name
    for name in built_in_names("next_item")
    if "vectors" in config_class(load_model_class(name)).__dataclass_fields__
]
SMALL: dict[str, dict[str, Any]] = {
    "lru": {"dim": 8, "channels": 8, "layers": 2},
    "sasrec": {"dim": 8, "layers": 1, "window": 128},
    "gru4rec": {"dim": 8, "hidden": 8},
}


def drawn(rows: int = ITEMS, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def module(*, ids: bool = True, vectors: int = WIDTH) -> ItemVectors:
    torch.manual_seed(0)
    found = ItemVectors(ItemConfig(num_items=ITEMS, dim=4, vectors=vectors, ids=ids)).double()
    if vectors:
        found.fill(drawn())
    return found


def model_of(name: str, **architecture: Any) -> UserModel:
    torch.manual_seed(0)
    kind = load_model_class(name)
    model = kind(config_class(kind)(num_items=ITEMS, **architecture))  # type: ignore[arg-type]
    inside = item_vectors(model)
    if inside is not None and inside.project is not None:
        inside.fill(drawn())
    return model


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("events", [3, ITEMS + 1])
def test_the_vectors_of_events_are_rows_of_the_table(ids: bool, events: int) -> None:
    found = module(ids=ids)
    rows = torch.arange(events) % ITEMS
    assert found.table().shape == (ITEMS, 4)
    torch.testing.assert_close(found(rows), found.table()[rows])
    torch.testing.assert_close(found(rows[None])[0], found(rows))


def test_ids_and_vectors_add_up() -> None:
    both, rows = module(), torch.tensor([3, 0, 3])
    assert both.ids is not None
    assert both.project is not None
    expected = both.ids.weight + both.vectors @ both.project.weight.T
    torch.testing.assert_close(both.table(), expected)
    torch.testing.assert_close(both(rows), expected[rows])
    alone = module(vectors=0)
    assert alone.ids is not None
    assert alone.table() is alone.ids.weight


@settings(max_examples=30)
@given(
    st.integers(2, ITEMS), st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from([0.0, -7.0, 100.0])
)
def test_filled_vectors_are_centred_and_of_length_one(
    there: int, scale: float, offset: float
) -> None:
    vectors = scale * (drawn().double() + offset)
    vectors[there:] = 0
    found = module()
    found.fill(vectors)
    kept = found.vectors[:there]
    torch.testing.assert_close(kept.mean(0), torch.zeros(WIDTH).double(), atol=1e-9, rtol=0)
    assert float(kept.square().sum(1).mean()) == pytest.approx(1.0)
    # no vector is no vector, wherever the centre is
    assert not found.vectors[there:].any()
    torch.testing.assert_close(found.prepared(vectors), found.vectors)


def test_vectors_that_are_all_the_same_say_nothing() -> None:
    found = module()
    found.fill(torch.ones(ITEMS, 1) * drawn(1))
    assert found.vectors.abs().max() < 1e-6
    assert found.prepared(drawn(seed=1)).abs().max() < 100
    found.fill(torch.zeros(ITEMS, WIDTH))
    assert not found.vectors.any()


def test_a_projection_begins_as_large_as_the_embeddings() -> None:
    torch.manual_seed(0)
    for name in SMALL:
        kind = load_model_class(name)
        model = kind(config_class(kind)(num_items=500, vectors=32))  # type: ignore[arg-type]
        inside = item_vectors(model)
        assert inside is not None
        assert inside.ids is not None
        inside.fill(torch.randn(500, 32) + 3)
        ids = inside.ids.weight.detach()
        projected = inside.table().detach() - ids
        assert float(projected.std()) == pytest.approx(float(ids.std()), rel=0.1)


def test_gradients_reach_ids_and_projection_and_no_vector() -> None:
    found = module()
    found(torch.tensor([2, 2])).sum().backward()
    assert found.ids is not None
    assert found.project is not None
    assert found.ids.weight.grad is not None
    assert found.ids.weight.grad.any(1).nonzero().flatten().tolist() == [2]
    expected = 2 * found.vectors[2].expand(4, -1)
    torch.testing.assert_close(found.project.weight.grad, expected)
    assert not found.vectors.requires_grad


@pytest.mark.parametrize("change", ["step", "fill", "load", "double", "project"])
def test_a_kept_table_follows_every_change(change: str) -> None:
    found = module().float().eval()
    found.keep()
    with torch.no_grad():
        before = found.table()
        assert found.table() is before
    if change == "step":
        optimizer = torch.optim.AdamW(found.train().parameters(), lr=0.1, fused=True)
        found.table().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    elif change == "fill":
        found.fill(drawn(seed=1))
    elif change == "load":
        found.load_state_dict({k: 2 * v for k, v in found.state_dict().items()})
    elif change == "double":
        found.double()
    else:
        found.project = nn.Linear(WIDTH, 4, bias=False)
    with torch.no_grad():
        after = found.table()
    assert torch.equal(after, found.table().detach())
    assert after.dtype != before.dtype or not torch.equal(after, before)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="expected vectors >= 1 where ids=False"):
        ItemConfig(num_items=3, ids=False)
    with pytest.raises(ValueError, match="expected vectors >= 0, received -1"):
        ItemConfig(num_items=3, vectors=-1)
    with pytest.raises(ValueError, match=r"= \(9, 5\), received \(9, 4\)"):
        module().fill(torch.zeros(ITEMS, 4))
    with pytest.raises(ValueError, match="set vectors= in the architecture"):
        module(vectors=0).fill(drawn())
    with pytest.raises(ValueError, match="knows items by their ids alone"):
        with_more_items(model_of("lru"), drawn(2))
    with pytest.raises(ValueError, match="vectors of width 5, as in training, received 4"):
        with_more_items(model_of("lru", vectors=WIDTH), torch.ones(2, 4))


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_the_laws_hold(name: str, ids: bool) -> None:
    model = model_of(name, vectors=WIDTH, ids=ids, **SMALL[name])
    report = check_model(model, num_users=5, max_events=24, long_events=200)
    assert set(report.kept) >= {1, 3, 4, 5, 6}


@pytest.mark.parametrize("name", TAKES_VECTORS)
def test_a_model_learns_through_its_vectors(name: str) -> None:
    model = model_of(name, vectors=WIDTH, ids=False)
    batch = Batch.from_histories([[1, 2, 3, 4], [5, 6]])
    full_softmax(model(batch), model.item_embeddings(), batch.items).backward()  # type: ignore[no-untyped-call]
    inside = item_vectors(model)
    assert inside is not None
    assert inside.project is not None
    assert inside.project.weight.grad is not None
    assert inside.project.weight.grad.any()
    assert not any("ids" in key for key in inside.state_dict())


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("name", TAKES_VECTORS)
def test_a_larger_catalogue_leaves_states_and_scores_alone(name: str, ids: bool) -> None:
    model, new = model_of(name, vectors=WIDTH, ids=ids).eval(), drawn(3, seed=1)
    random = torch.get_rng_state()
    larger = with_more_items(model, new)
    assert torch.equal(torch.get_rng_state(), random)
    assert larger.num_items == larger.config.num_items == ITEMS + 3
    assert not larger.training
    batch = Batch.from_histories([[1, 2, 3, 8], [], [5, 6]])
    with torch.no_grad():
        state = model.encode(batch)[1]
        for a, b in zip(state, larger.encode(batch)[1], strict=True):
            torch.testing.assert_close(a, b)
        scores, expected = larger.score(state), model.score(state)
        torch.testing.assert_close(scores[:, :ITEMS], expected)
        inside = item_vectors(larger)
        assert inside is not None
        assert inside.project is not None
        torch.testing.assert_close(
            inside.table()[ITEMS:], inside.project(inside.prepared(new)), atol=1e-6, rtol=1e-6
        )
        # and they can be read
        more = larger.encode(Batch.from_histories([[ITEMS], [ITEMS + 2], []]), state)[1]
        assert larger.score(more).isfinite().all()
    if "item_bias" in larger.state_dict():
        bias = larger.state_dict()["item_bias"]
        torch.testing.assert_close(bias[ITEMS:], bias[:ITEMS].mean().expand(3))


GROUPS, SIZE = 4, 12
"""Items of a group follow each other; the last of each group is in no log."""


def group_log(seed: int = 0) -> pl.DataFrame:
    """Histories that stay in one group each, from items whose names tell nothing."""
    random = np.random.default_rng(seed)
    rows = [
        {"user_id": user, "item_id": int(item) * GROUPS + user % GROUPS, "timestamp": place}
        for user in range(80)
        for place, item in enumerate(random.integers(SIZE - 1, size=10))
    ]
    return pl.DataFrame(rows)


def group_items(seed: int = 0) -> ItemTable:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(GROUPS, 8))
    items = np.arange(GROUPS * SIZE)
    vectors = centres[items % GROUPS] + 0.3 * random.normal(size=(len(items), 8))
    frame = pl.DataFrame({"item_id": items, "text": vectors.tolist()})
    return read_items(frame, IdMap.from_values(items), vectors=["text"])


def fit_groups(**changes: Any) -> everlong.Recommender:
    arguments: dict[str, Any] = {
        "items": group_items(),
        "architecture": {"dim": 16, "channels": 16, "layers": 1, "ids": False},
        "training": {"epochs": 8, "batch_events": 128, "precision": "float32", "lr": 0.01},
        "protocol": "paper",
    }
    return everlong.fit(group_log(), "lru", **{**arguments, **changes})


def test_an_item_without_events_is_ranked_by_its_vector() -> None:
    recommender = fit_groups()
    unseen = [(SIZE - 1) * GROUPS + group for group in range(GROUPS)]
    assert (recommender.item_ids.rows(unseen) == -1).all()
    users = list(range(40))
    assert recommender.add_items(group_items()) == GROUPS
    ranked = recommender.rank(users, [unseen] * len(users))
    first = ranked.filter(rank=1).with_columns(group=pl.col("item_id") % GROUPS)
    # chance is 1 in 4
    assert (first["group"] == first["user_id"] % GROUPS).mean() > 0.9
    # of the 48 items those of the group come first, the new one somewhere among its 12
    places = recommender.recommend(users, k=GROUPS * SIZE, filter_seen=False).filter(
        pl.col("item_id") == (SIZE - 1) * GROUPS + pl.col("user_id") % GROUPS
    )
    assert places.height == len(users)
    assert (places["rank"] <= SIZE).mean() > 0.9
    with pytest.raises(ValueError, match="fit one with vectors"):
        fit_groups(
            items=None, architecture={"dim": 8}, training={"epochs": 1, "precision": "float32"}
        ).add_items(group_items())
