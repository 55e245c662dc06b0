"""Lists of the service: exact whatever the coarse look says, filtered, and gated where they are
not exact."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import everlong
from everlong.data.events import read_events
from everlong.data.split import PAPER
from everlong.data.synthetic import exposures
from everlong.inference import catalogue as module
from everlong.inference.catalogue import Catalogue
from everlong.inference.index import made_up
from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.query import Query
from everlong.models.state import State
from everlong.models.user_model import ItemEmbeddings
from everlong.ops.coarse_scores import coarse_best
from everlong.recommender.recommender import Recommender
from everlong.server.engine.served_model import ServedModel, Wanted

DIM = 64

Pairs = tuple[Tensor, Tensor]
"""Users and items, in any order, some of them twice."""


def by_user(exclude: Pairs | None, users: int) -> list[np.ndarray] | None:
    """The same as rising rows of each user."""
    if exclude is None:
        return None
    return [np.unique(exclude[1][exclude[0] == user].numpy()) for user in range(users)]


def sums(head: ItemEmbeddings, user: Tensor) -> np.ndarray:
    """The arithmetic as it is stated: float64, four lanes, in order, rounded once to float32."""
    weight, vectors = head.weight.numpy().astype("f8"), user.numpy().astype("f8")
    lanes = np.zeros((4, len(vectors), len(weight)))
    for dim in range(weight.shape[1]):
        lanes[dim % 4] += vectors[:, dim : dim + 1] * weight[:, dim]
    total = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
    scores: np.ndarray = (total + head.bias.numpy().astype("f8")).astype("f4")
    return scores


def sure(head: ItemEmbeddings, user: Tensor, k: int, exclude: Pairs | None, hidden: Tensor) -> Any:
    """The definition: every score, sorted with the lower row first."""
    scores = sums(head, user)
    scores[:, hidden.numpy()] = -np.inf
    if exclude is not None:
        scores[exclude[0].numpy(), exclude[1].numpy()] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(scores, order, axis=1)
    return values.tolist(), np.where(np.isneginf(values), -1, order).tolist()


def agrees(
    head: ItemEmbeddings,
    user: Tensor,
    k: int,
    *,
    coarse: bool,
    exclude: Pairs | None = None,
    hidden: Tensor | None = None,
) -> None:
    hidden = torch.zeros(0, dtype=torch.int64) if hidden is None else hidden
    catalogue = Catalogue(head, coarse=coarse)
    catalogue.hide(hidden)
    scores, items = catalogue.best(Query(user), k, by_user(exclude, len(user)))
    assert (scores.tolist(), items.tolist()) == sure(head, user, k, exclude, hidden)


def random_head(items: int, seed: int = 0, scale: float = 1.0) -> ItemEmbeddings:
    seeded = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(items, DIM, generator=seeded)
    return ItemEmbeddings(weight, scale * torch.randn(items, generator=seeded))


def clustered(items: int) -> ItemEmbeddings:
    """Items in groups, as trained vectors are."""
    seeded = torch.Generator().manual_seed(1)
    middles = torch.randn(items // 40, DIM, generator=seeded)
    own = torch.randint(len(middles), (items,), generator=seeded)
    weight = middles[own] + 0.3 * torch.randn(items, DIM, generator=seeded)
    return ItemEmbeddings(weight, 0.1 * torch.randn(items, generator=seeded))


@st.composite
def searches(draw: st.DrawFn) -> tuple[ItemEmbeddings, Tensor, int, Pairs, Tensor]:
    """Few distinct numbers, so that ties are everywhere; sums of them are exact."""
    users, items, width = draw(st.integers(1, 7)), draw(st.integers(1, 90)), draw(st.integers(1, 3))
    # differences that 8 bits do not keep
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    some = np.array([-1.0, -0.5, 0.0, 0.5, 1.0, 1.00390625, 1.001953125], dtype="f4")
    weight, user = random.choice(some, (items, width)), random.choice(some, (users, width))
    bias = random.choice(some, items) * draw(st.sampled_from([0.0, 1.0, 64.0]))
    pairs = draw(
        st.lists(st.tuples(st.integers(0, users - 1), st.integers(0, items - 1)), max_size=60)
    )
    exclude = tuple(torch.tensor([pair[n] for pair in pairs], dtype=torch.int64) for n in (0, 1))
    hidden = torch.from_numpy(np.flatnonzero(random.random(items) < draw(st.floats(0, 1))))
    head = ItemEmbeddings(torch.from_numpy(weight), torch.from_numpy(bias.astype("f4")))
    return head, torch.from_numpy(user), draw(st.integers(1, 100)), exclude, hidden  # type: ignore[return-value]


@settings(max_examples=300)
@given(searches(), st.booleans(), st.booleans())
def test_lists_are_those_of_the_definition(search: Any, coarse: bool, cut: bool) -> None:
    head, user, k, exclude, hidden = search
    with pytest.MonkeyPatch.context() as patch:
        if cut:
            # no room to spare
            patch.setattr(module, "SPARE", 1)
        agrees(head, user, k, coarse=coarse, exclude=exclude, hidden=hidden)


@pytest.mark.parametrize("users", [1, 3, 70])
@pytest.mark.parametrize("items", [8_191, 30_000])
def test_large_catalogues(users: int, items: int) -> None:
    head = random_head(items)
    # every item twice, so that equal scores straddle the end of a list
    pair = items // 2
    head.weight[-pair:], head.bias[-pair:] = head.weight[:pair].clone(), head.bias[:pair].clone()
    seeded = torch.Generator().manual_seed(2)
    user = torch.randn(users, DIM, generator=seeded)
    best = (user @ head.weight.T + head.bias).topk(30)[1]
    exclude = torch.arange(users).repeat_interleave(30), best.flatten()
    for k in (1, 9, 300):
        agrees(head, user, k, coarse=True, exclude=exclude, hidden=torch.arange(0, items, 7))


def near_ties(kind: str, items: int = 9_000) -> ItemEmbeddings:
    seeded = torch.Generator().manual_seed(3)
    noise = torch.randn(items, DIM, generator=seeded)
    if kind == "all the same but for what 8 bits drop":
        return ItemEmbeddings(1.0 + 1e-4 * noise, torch.zeros(items))
    if kind == "large biases over small products":
        return ItemEmbeddings(1e-3 * noise, 100.0 + 1e-3 * noise[:, 0])
    if kind == "one vector dwarfs the others":
        weight = 1.0 + 1e-3 * noise
        weight[17] = -1e6
        return ItemEmbeddings(weight, torch.zeros(items))
    return ItemEmbeddings(torch.ones(items, DIM), torch.zeros(items))


@pytest.mark.parametrize(
    "kind",
    [
        "all the same but for what 8 bits drop",
        "large biases over small products",
        "one vector dwarfs the others",
        "all the same",
    ],
)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_near_ties_that_the_coarse_look_cannot_tell_apart(kind: str, scale: float) -> None:
    head = near_ties(kind)
    user = scale * torch.randn(3, DIM, generator=torch.Generator().manual_seed(4))
    agrees(head, user, 20, coarse=True)
    if kind.startswith("all the same but"):
        coarse = user.bfloat16() @ head.weight.bfloat16().T
        exact = torch.tensor(sure(head, user, 20, None, torch.zeros(0, dtype=torch.int64))[1])
        assert not torch.equal(coarse.float().topk(20)[1].sort()[0], exact.sort()[0])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("users", [1, 2, 64])
def test_coarse_scores_are_as_near_as_is_said(scale: float, users: int) -> None:
    head = random_head(3_000, seed=5, scale=scale)
    user = torch.randn(users, DIM, generator=torch.Generator().manual_seed(6))
    catalogue = Catalogue(head, coarse=True)
    values = np.full((users, 3_000), -np.inf, dtype=np.float32)
    items = np.full((users, 3_000), -1)
    none, cuts = np.zeros(0, dtype=np.int64), np.zeros(users + 1, dtype=np.int64)
    asked = catalogue._asked(Query(user))
    table, scales = catalogue._table
    rows, padded = np.zeros(users, dtype=np.int64), catalogue._padded(asked)
    coarse_best(
        table, scales, catalogue.bias.numpy()[None], rows, padded, none, cuts, values, items
    )
    coarse = torch.empty(users, 3_000)
    coarse.scatter_(1, torch.from_numpy(items), torch.from_numpy(values))
    scores = user.double() @ head.weight.double().T + head.bias.double()
    length = float(user.norm(dim=1).max() * head.weight.norm(dim=1).max())
    for row in range(users):
        highest = torch.from_numpy(
            catalogue._error.highest(coarse[row].numpy(), asked.at(slice(row, row + 1)))
        )
        assert bool((highest >= scores[row]).all())
        # a bound that is far off would send every search the long way
        assert float((highest - scores[row]).max()) < 0.02 * length


@pytest.mark.parametrize(("items", "dim"), [(1, 1), (511, 3), (512, 8), (513, 17), (1_025, 64)])
def test_tables_of_any_size(items: int, dim: int) -> None:
    seeded = torch.Generator().manual_seed(items)
    head = ItemEmbeddings(
        torch.randn(items, dim, generator=seeded), torch.randn(items, generator=seeded)
    )
    user = torch.randn(3, dim, generator=seeded)
    # pairs in no order, some of them twice
    rows = torch.randint(0, 3, (40,), generator=seeded)
    without = torch.randint(0, items, (40,), generator=seeded)
    agrees(head, user, min(20, items), coarse=True, exclude=(rows, without))


def test_a_list_does_not_depend_on_the_other_requests() -> None:
    catalogue = Catalogue(random_head(20_000), coarse=True)
    user = torch.randn(9, DIM, generator=torch.Generator().manual_seed(7))
    together = catalogue.best(Query(user), 12)
    for row in range(9):
        alone = catalogue.best(Query(user[row : row + 1]), 12)
        assert alone.items.tolist() == together.items[row : row + 1].tolist()
        assert alone.scores.tolist() == together.scores[row : row + 1].tolist()


def test_numbers_that_are_none() -> None:
    head = random_head(10)
    head.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="item vectors must be finite"):
        Catalogue(head)
    catalogue = Catalogue(random_head(10))
    with pytest.raises(ValueError, match="user vectors must be finite"):
        catalogue.best(Query(torch.full((1, DIM), torch.inf)), 3)
    with pytest.raises(ValueError, match="k >= 1"):
        catalogue.best(Query(torch.zeros(1, DIM)), 0)
    assert catalogue.best(Query(torch.zeros(0, DIM)), 3).items.shape == (0, 3)


def test_what_was_hidden_comes_back() -> None:
    catalogue = Catalogue(random_head(50))
    user = torch.ones(1, DIM)
    before = catalogue.best(Query(user), 50)
    first = before.items[0, :1]
    catalogue.hide(first)
    assert int(first) not in catalogue.best(Query(user), 50).items.tolist()[0]
    assert catalogue.best(Query(user), 50).items[0, -1] == -1
    assert int(first) not in catalogue.similar(before.items[0, 1:2], 50).items.tolist()[0]
    catalogue.hide(first[:0])
    assert catalogue.best(Query(user), 50).items.tolist() == before.items.tolist()


# an index


@pytest.fixture(scope="module")
def indexed() -> tuple[Catalogue, Catalogue, Tensor]:
    """A catalogue with an index, the same without, and users."""
    pytest.importorskip("faiss")
    head = clustered(20_000)
    found = Catalogue(head)
    assert found.build_index(made_up(head.weight, 8.0, 200))
    return found, Catalogue(head), made_up(head.weight, 8.0, 500)[200:]


def test_an_index_finds_nearly_all_and_its_scores_are_the_scores(
    indexed: tuple[Catalogue, Catalogue, Tensor],
) -> None:
    near, exact, user = indexed
    found, wanted = near.best(Query(user), 100), exact.best(Query(user), 100)
    share = np.mean([np.isin(a, b).mean() for a, b in zip(wanted.items, found.items, strict=True)])
    assert near.recall is not None
    assert min(share, near.recall) >= 0.95
    assert exact.index is None
    assert torch.equal(found.scores, exact.scores(Query(user), found.items))
    assert bool((found.scores.diff(dim=1) <= 0).all())


def test_an_index_heeds_every_filter(indexed: tuple[Catalogue, Catalogue, Tensor]) -> None:
    near, exact, user = indexed
    user = user[:40]
    wanted = exact.best(Query(user), 150).items
    # the best ten are gone for all, the next hundred of each user are seen
    hidden = wanted[:, :10].flatten().unique()
    exclude = [np.sort(own) for own in wanted[:, 10:110].numpy()]
    for catalogue in (near, exact):
        catalogue.hide(hidden)
    try:
        found, left = near.best(Query(user), 20, exclude), exact.best(Query(user), 20, exclude)
    finally:
        for catalogue in (near, exact):
            catalogue.hide(hidden[:0])
    assert not np.isin(found.items, hidden).any()
    assert not (found.items[:, :, None] == wanted[:, None, 10:110]).any()
    assert bool((found.items >= 0).all())
    hits = (found.items[:, :, None] == left.items[:, None]).any(2).float().mean()
    assert float(hits) >= 0.9


def test_where_an_index_finds_too_few_the_search_is_exact(
    indexed: tuple[Catalogue, Catalogue, Tensor],
) -> None:
    near, exact, user = indexed
    few = torch.arange(3, 20_000, 1_500)
    hidden = torch.ones(20_000, dtype=torch.bool).index_fill(0, few, False).nonzero()[:, 0]
    for catalogue in (near, exact):
        catalogue.hide(hidden)
    try:
        found, wanted = near.best(Query(user[:5]), 20), exact.best(Query(user[:5]), 20)
    finally:
        for catalogue in (near, exact):
            catalogue.hide(hidden[:0])
    assert found.items.tolist() == wanted.items.tolist()
    assert sorted(found.items[0, : len(few)].tolist()) == few.tolist()
    # more than an index is asked for
    seen = [np.arange(4_000)]
    assert (
        near.best(Query(user[:1]), 99, seen).items.tolist()
        == exact.best(Query(user[:1]), 99, seen).items.tolist()
    )


def test_a_bad_index_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("faiss")
    # nothing is near anything, and one list of many is looked into
    head = random_head(20_000)
    catalogue = Catalogue(head, coarse=True)
    with caplog.at_level(logging.WARNING):
        assert not catalogue.build_index(made_up(head.weight, 8.0, 50), probes=(1,))
    assert "index refused" in caplog.text
    assert catalogue.index is None
    assert catalogue.recall is not None
    assert catalogue.recall < 0.95
    user = made_up(head.weight, 8.0, 4)
    scores, items = catalogue.best(Query(user), 30)
    none = torch.zeros(0, dtype=torch.int64)
    assert (scores.tolist(), items.tolist()) == sure(head, user, 30, None, none)


# models in service


def walk(users: int = 30, events: int = 6, items: int = 20) -> pl.DataFrame:
    random = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "user_id": [f"u{user}" for user in range(users) for _ in range(events)],
            "item_id": [f"i{item:02d}" for item in random.integers(0, items, users * events)],
            "timestamp": [1_700_000_000 + 3_600 * n for _ in range(users) for n in range(events)],
        }
    )


SHAPES: dict[str, dict[str, Any]] = {
    "lru": {"dim": 8, "channels": 8, "layers": 1},
    "hstu": {"dim": 8, "heads": 2, "layers": 1, "window": 8},
    "popularity": {},
    "markov": {},
}


def fitted(name: str) -> Recommender:
    training = {} if name in ("popularity", "markov") else {"epochs": 2}
    return everlong.fit(
        walk(),
        name,
        architecture=SHAPES[name],
        training=training,
        protocol=PAPER.replace({"seen": "keep"}),
    )


def two_stage() -> Recommender:
    fields = ["label", "outcome"]
    frame = exposures(num_users=40, num_items=30, seed=3).frame
    events = read_events(frame, fields=fields, time_unit="s")
    retriever = everlong.fit(events, "lru", architecture=SHAPES["lru"], training={"epochs": 1})
    shape = {"dim": 16, "heads": 2, "layers": 1, "window": 4, "fields": (("outcome", 2),)}
    return everlong.fit_ranker(
        retriever, events, architecture=shape, training={"epochs": 1}, candidates=12
    )


@pytest.fixture(scope="module")
def served_models() -> dict[str, ServedModel]:
    found = {name: ServedModel(fitted(name), Path(name)) for name in SHAPES}
    return {**found, "two_stage": ServedModel(two_stage(), Path("two_stage"))}


ALL = [*SHAPES, "two_stage"]
HOUR = 3_600


def read(served_model: ServedModel, users: int = 4) -> State:
    """States of users with one event to several."""
    counts = torch.arange(1, users + 1)
    items = torch.arange(int(counts.sum())) * 7 % len(served_model.item_ids)
    times = 1_700_000_000 + HOUR * torch.arange(len(items))
    events = Batch(
        items=items,
        times=times,
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]),
        fields={
            name: torch.zeros(len(items), dtype=torch.int64)
            for name in served_model.model.event_fields
        },
    )
    with torch.no_grad():
        return served_model.model.final_state(events)


@pytest.mark.parametrize("name", ALL)
def test_lists_heed_the_filters_of_each(name: str, served_models: dict[str, ServedModel]) -> None:
    served_model = served_models[name]
    state, ids = (
        read(served_model),
        served_model.item_ids.ids(range(len(served_model.item_ids))).to_list(),
    )
    whole = served_model.recommend(state, [Wanted(k=12)] * 4)
    some = whole[2].items
    wanted = [
        Wanted(k=3),
        Wanted(k=6, exclude=[*whole[1].items[:3], "nothing"]),
        Wanted(
            k=5,
            among=[*some[1:4], some[1], "nothing"],
            exclude=some[1:2],
        ),
        Wanted(k=5, among=[]),
    ]
    found = served_model.recommend(state, wanted)
    assert found[0].items == whole[0].items[:3]
    assert found[1].items[:3] == whole[1].items[3:6] or name == "two_stage"
    assert not set(found[1].items) & set(whole[1].items[:3])
    assert set(found[2].items) == set(whole[2].items[2:4])
    assert found[3].items == []
    assert all(sorted(one.scores, reverse=True) == one.scores for one in found)
    gone = {one.items[0] for one in whole}
    served_model.hide([*gone, "nothing"])
    try:
        kinds = [Wanted(k=30), Wanted(k=30, among=ids), Wanted(k=30, at=1_800_000_000), wanted[1]]
        for one in served_model.recommend(state, kinds):
            assert one.items
            assert not set(one.items) & gone
        # candidates that are named are ranked, whatever they are
        assert (
            set(served_model.rank(states.take(state, torch.tensor([0])), list(gone), None).items)
            == gone
        )
    finally:
        served_model.hide([])
    assert served_model.recommend(state, [Wanted(k=12)] * 4) == whole


@pytest.mark.parametrize("name", ["lru", "hstu", "popularity", "markov"])
def test_lists_are_the_models_own_scores(name: str, served_models: dict[str, ServedModel]) -> None:
    served_model = served_models[name]
    state = read(served_model)
    with torch.no_grad():
        scores = served_model.model.score(state).numpy()
    for row, found in enumerate(served_model.recommend(state, [Wanted(k=7)] * 4)):
        own = {item: scores[row, served_model.item_ids.row_of[item]] for item in found.items}
        np.testing.assert_allclose(list(own.values()), found.scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.scores, -np.sort(-scores[row])[:7], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["hstu", "two_stage", "lru"])
def test_each_request_is_scored_at_its_own_time(
    name: str, served_models: dict[str, ServedModel]
) -> None:
    served_model = served_models[name]
    state = read(served_model)
    times = [1_700_000_000 + 900 * HOUR, None, 1_700_000_000 + 90_000 * HOUR, None]
    together = served_model.recommend(state, [Wanted(k=5, at=at) for at in times])
    for row, at in enumerate(times):
        mine = states.take(state, torch.tensor([row]))
        (alone,) = served_model.recommend(mine, [Wanted(k=5, at=at)])
        assert together[row].items == alone.items
        np.testing.assert_allclose(together[row].scores, alone.scores, rtol=1e-5)
        (timeless,) = served_model.recommend(mine, [Wanted(k=5)])
        if name != "lru" and at is not None:
            # else the test could not tell
            assert timeless.scores != alone.scores


@pytest.mark.parametrize("name", ["lru", "hstu", "two_stage"])
def test_similar_items(name: str, served_models: dict[str, ServedModel]) -> None:
    served_model = served_models[name]
    item = served_model.item_ids.ids([5]).to_list()[0]
    wanted = served_model.recommender.similar_items([item], k=6)
    found = served_model.similar(item, 6)
    assert found is not None
    assert found.items == wanted["similar_item_id"].to_list()
    np.testing.assert_allclose(found.scores, wanted["score"].to_numpy(), rtol=1e-4, atol=1e-5)
    served_model.hide(found.items[:2])
    try:
        less = served_model.similar(item, 4)
    finally:
        served_model.hide([])
    assert less is not None
    assert less.items == found.items[2:]
    assert served_model.similar("nothing", 3) is None


@pytest.mark.parametrize("name", ["popularity", "markov"])
def test_models_without_item_vectors_have_no_similar_items(
    name: str, served_models: dict[str, ServedModel]
) -> None:
    with pytest.raises(TypeError, match=r"no item vectors|dot products"):
        served_models[name].similar("i03", 3)


def test_an_index_is_built_from_some_size_on(
    served_models: dict[str, ServedModel], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("faiss")
    lru = served_models["lru"]
    for start, built in ((len(lru.item_ids) + 1, False), (None, False), (1, True)):
        served_model = ServedModel(lru.recommender, lru.folder, index_from=start)
        served_model.prepare(read(served_model))
        assert served_model.exact is not built
        mine = served_model.recommend(read(served_model), [Wanted(k=4)] * 4)
        for found, expected in zip(mine, lru.recommend(read(lru), [Wanted(k=4)] * 4), strict=True):
            assert found.items == expected.items
            assert found.scores == pytest.approx(expected.scores, abs=1e-6)
    # a model without item vectors has nothing to put into one
    markov = ServedModel(served_models["markov"].recommender, lru.folder, index_from=1)
    markov.prepare()
    assert markov.exact
