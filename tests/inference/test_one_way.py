"""One way from histories to states and from states to lists: the recommender, the server and the
evaluation give the same list in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everlong.data.events import Events, read_events
from everlong.data.split import TEMPORAL, Targets
from everlong.evaluation.next_item import evaluate
from everlong.models.batch import Batch
from everlong.models.gru4rec import GRU4Rec, GRU4RecConfig
from everlong.models.hstu import HSTU, HSTUConfig
from everlong.models.lru import LRU, LRUConfig
from everlong.models.markov import Markov, MarkovConfig
from everlong.models.popularity import Popularity, PopularityConfig
from everlong.models.query import Query
from everlong.models.two_stage import TwoStage, TwoStageConfig
from everlong.models.user_model import CountingModel, ItemEmbeddings, UserModel
from everlong.recommender.origin import Origin
from everlong.recommender.recommender import Recommender
from everlong.server.engine.served_model import ServedModel, Wanted
from everlong.server.engine.service import Service
from everlong.server.store.log import Event
from everlong.training.settings import TrainConfig

START = 1_700_000_000


class RecentState(NamedTuple):
    """The last items of a user, as integers, and a vector in half precision."""

    items: Tensor  # [B, 3] int32, newest first, -1 before the first
    half: Tensor  # [B, D] float16, that of the newest item


class Recent(UserModel[RecentState]):
    """Scores by products with the sum of the last vectors, by the hour, and by a memory of repeats.

    States and user vectors are exact, so that lists can be compared bit for bit however the
    history was read.
    """

    def __init__(self, weight: Tensor, bias: Tensor, hours: Tensor, repeats: Tensor) -> None:
        super().__init__(len(weight))
        self.config = None
        for name, value in {"weight": weight, "bias": bias, "hours": hours}.items():
            self.register_buffer(name, value)
        self.register_buffer("repeats", repeats)
        self.weight: Tensor
        self.bias: Tensor
        self.hours: Tensor
        self.repeats: Tensor

    def initial_state(self, num_users: int) -> RecentState:
        none = torch.full((num_users, 3), -1, dtype=torch.int32)
        return RecentState(none, torch.zeros(num_users, self.weight.shape[1], dtype=torch.float16))

    def encode(self, events: Batch, state: RecentState | None = None) -> tuple[Tensor, RecentState]:
        items = (self.initial_state(events.num_users) if state is None else state).items.clone()
        half = (self.initial_state(events.num_users) if state is None else state).half.clone()
        for user in range(events.num_users):
            own = events.items[events.offsets[user] : events.offsets[user + 1]].flip(0)[:3]
            kept = torch.cat([own.to(torch.int32), items[user]])[:3]
            items[user] = kept
            if len(own):
                half[user] = self.weight[int(own[0])].half()
        return events.items[:, None].float(), RecentState(items, half)

    def query(self, state: RecentState, at: Tensor | None = None) -> Query:
        there = state.items >= 0
        vectors = self.weight[state.items.clamp(min=0).long()] * there[:, :, None]
        # in an order of its own for each user, whatever the other users are
        user = vectors[:, 0] + 0.5 * vectors[:, 1] + 0.25 * vectors[:, 2] + state.half.float()
        items = state.items.long()
        for place in (1, 2):
            again = (items[:, place : place + 1] == items[:, :place]).any(1)
            items[:, place] = items[:, place].masked_fill(again, -1)
        hour = None if at is None else at // 3_600 % len(self.hours)
        added = self.repeats.expand(len(items), -1)
        if hour is None:
            return Query(user, items=items, added=added)
        return Query(user, self.hours, hour, items, added)

    def user_embedding(self, state: RecentState, at: Tensor | None = None) -> Tensor:
        return self.query(state, at).vectors

    def item_embeddings(self) -> ItemEmbeddings:
        return ItemEmbeddings(self.weight, self.bias)


def near_equal(random: np.random.Generator, items: int, dim: int) -> np.ndarray:
    """Item vectors of which many are there twice, and many differ from another by one ulp."""
    few = random.normal(size=(max(2, items // 5), dim)).astype("f4")
    weight = few[random.integers(len(few), size=items)]
    up = random.random(weight.shape) < 0.05
    return np.where(up, np.nextafter(weight, np.float32(np.inf)), weight)


def recent(random: np.random.Generator, items: int) -> Recent:
    weight = near_equal(random, items, int(random.integers(1, 9)))
    bias = random.choice(np.array([0.0, 0.5], "f4"), items) * random.integers(0, 2)
    hours = random.choice(np.array([0.0, 0.25], "f4"), (5, items))
    repeats = random.normal(size=3).astype("f4")
    return Recent(*(torch.from_numpy(np.asarray(a, "f4")) for a in (weight, bias, hours, repeats)))


def trained(name: str, random: np.random.Generator, items: int) -> UserModel:
    """A built-in model of random parameters, with item vectors that are nearly equal."""
    torch.manual_seed(int(random.integers(1 << 30)))
    model: UserModel
    if name == "lru":
        model = LRU(LRUConfig(num_items=items, dim=8, channels=8, layers=1))
    elif name == "hstu":
        model = HSTU(HSTUConfig(num_items=items, dim=8, heads=2, layers=1, window=8))
    elif name == "gru4rec":
        model = GRU4Rec(GRU4RecConfig(num_items=items, dim=8))
    elif name == "two_stage":
        shapes: dict[str, Any] = {
            "retriever_settings": {"dim": 8, "channels": 8, "layers": 1},
            "ranker_settings": {"dim": 8, "heads": 2, "layers": 1, "window": 4},
        }
        model = TwoStage(TwoStageConfig(num_items=items, candidates=7, **shapes))
    elif name == "markov":
        model = Markov(MarkovConfig(num_items=items))
    else:
        model = Popularity(PopularityConfig(num_items=items))
    if isinstance(model, CountingModel):
        lengths = random.integers(1, 9, 30)
        histories = [random.integers(items, size=length).tolist() for length in lengths]
        model.observe(Batch.from_histories(histories))
        return model.eval()
    with torch.no_grad():
        for table in model.modules():
            if isinstance(table, torch.nn.Embedding) and table.num_embeddings == items:
                vectors = near_equal(random, items, table.embedding_dim)
                table.weight.copy_(0.3 * torch.from_numpy(vectors))
    return model.eval()


def log_of(random: np.random.Generator, items: int, lengths: Sequence[int]) -> pl.DataFrame:
    """Histories; the first user has every item once, so that all are in the catalogue."""
    histories = [np.arange(items), *(random.integers(items, size=n) for n in lengths)]
    return pl.DataFrame(
        {
            "user_id": [f"u{n:03d}" for n, own in enumerate(histories) for _ in own],
            "item_id": [f"i{row:04d}" for own in histories for row in own],
            "timestamp": [START + 60 * n for own in histories for n in range(len(own))],
        }
    )


def recommender_of(model: UserModel, events: Events, seen: str) -> Recommender:
    origin = Origin(
        model="lru",
        train=TrainConfig(),
        protocol=TEMPORAL.replace({"seen": seen}),
        time_unit="s",
        data={"fingerprint": events.fingerprint},
        metrics={},
    )
    found = Recommender(model, events.item_ids, origin)
    found.update(events)
    return found


@contextmanager
def serving(recommender: Recommender, events: Events, folder: Path, shards: int) -> Iterator[Any]:
    """A service that has read the events, one request for many."""
    service = Service(folder, ServedModel(recommender, folder), shards=shards, capacity=100_000)
    try:
        users = events.user_ids.ids(range(events.num_users)).to_list()
        names = events.item_ids.ids(events.items).to_list()
        sent = [
            Event(f"{user}-{n}", user, names[n], int(events.times[n]), {})
            for row, user in enumerate(users)
            for n in range(events.offsets[row], events.offsets[row + 1])
        ]
        for first in range(0, len(sent), 1_000):
            for future in service.ingest(sent[first : first + 1_000]):
                future.result()
        yield service
    finally:
        service.close()


def share_states(recommender: Recommender, service: Service) -> None:
    """Gives the recommender the states of the server: products of other sizes may have rounded
    other bits of them, and lists are promised for one state."""
    ids = recommender.users.ids
    state = service._live_states(ids)[1]
    recommender.users.write_states(torch.arange(len(ids)), state)


class Asked(NamedTuple):
    """What is asked of each user."""

    k: int
    at: int | None
    filter_seen: bool | None
    exclude: dict[str, list[str]]
    among: dict[str, list[str]]


def lists_of(frame: pl.DataFrame, users: Sequence[str]) -> Lists:
    parts = {key[0]: part for key, part in frame.partition_by("user_id", as_dict=True).items()}
    empty = frame.clear()
    return [
        (parts.get(user, empty)["item_id"].to_list(), parts.get(user, empty)["score"].to_list())
        for user in users
    ]


Lists = list[tuple[list[Any], list[float]]]


def equal(found: Lists, expected: Lists) -> None:
    assert found == expected


def close(found: Lists, expected: Lists) -> None:
    """The scores of a network may round otherwise in a batch of another size, so that items that
    are nearly equal may change places."""
    for (items, scores), (others, wanted) in zip(found, expected, strict=True):
        assert len(items) == len(set(items)) == len(others)
        np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-5)


def check(recommender: Recommender, events: Events, service: Service, asked: Asked) -> None:
    """The server's lists are those of the recommender, in batches of any size; so are ranks."""
    users = recommender.users.ids
    how = {"filter_seen": asked.filter_seen, "exclude": asked.exclude, "among": asked.among}
    frame = recommender.recommend(users, k=asked.k, at=asked.at, **how)  # type: ignore[arg-type]
    expected = lists_of(frame, users)
    # alone and together
    alone = [
        lists_of(recommender.recommend([user], k=asked.k, at=asked.at, **how), [user])[0]  # type: ignore[arg-type]
        for user in users[:2]
    ]
    same = close if recommender.model.num_candidates is not None else equal
    same(alone, expected[:2])
    waiting = [
        service.recommend(
            user,
            Wanted(
                k=asked.k,
                at=asked.at,
                exclude=asked.exclude.get(user, ()),
                among=asked.among.get(user),
            ),
            filter_seen=asked.filter_seen,
        )
        for user in users
    ]
    served = [future.result() for future in waiting]
    same([(one.items, one.scores) for one in served], expected)
    for user, (items, scores), one in zip(users, expected, served, strict=True):
        named = {*asked.exclude.get(user, ()), *asked.among.get(user, ())}
        assert list(one.unknown) == ["unknown"] * ("unknown" in named)
        seen = set(events.item_ids.ids(events.items[user_slice(events, user)]).to_list())
        filters = asked.filter_seen is not False
        if filters and (asked.filter_seen or recommender.origin.protocol.seen == "mask"):
            assert not seen & set(items)
        if not items or recommender.model.num_candidates is not None:
            continue
        mixed = [*sorted(items), "unknown"]
        ranked = recommender.rank([user], [mixed], at=asked.at)
        assert ranked["item_id"].to_list() == [*items, "unknown"]
        assert ranked["score"].to_list() == [*scores, None]
        assert ranked["rank"].to_list() == [*range(1, len(items) + 1), None]
        by_server = service.rank(user, mixed, asked.at)
        assert (by_server.items, by_server.scores, by_server.unknown) == (
            items,
            scores,
            ["unknown"],
        )


def user_slice(events: Events, user: str) -> slice:
    row = int(events.user_ids.rows([user])[0])
    return slice(int(events.offsets[row]), int(events.offsets[row + 1]))


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, list[int], Asked, str, int]:
    seed, items = draw(st.integers(0, 2**31)), draw(st.integers(2, 60))
    random = np.random.default_rng(seed)
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    if draw(st.integers(0, 9)) == 0:
        # beyond what a ring of 1,024 held, and beyond what the server reads at once
        lengths, items = (
            [*lengths, draw(st.integers(1_100, 5_000))],
            draw(st.integers(1_300, 2_000)),
        )
    ids = [f"i{row:04d}" for row in range(items)]
    users = [f"u{n:03d}" for n in range(len(lengths) + 1)]

    def some(share: float) -> dict[str, list[str]]:
        chosen = [user for user in users if random.random() < share]
        picked = {u: random.choice(ids, random.integers(0, min(9, items))) for u in chosen}
        return {u: [*own.tolist(), *(["unknown"] * int(own.size % 2))] for u, own in picked.items()}

    asked = Asked(
        k=draw(st.integers(1, 70)),
        at=draw(st.one_of(st.none(), st.integers(START, START + 1_000_000))),
        filter_seen=draw(st.sampled_from([None, True, False])),
        exclude=some(0.5),
        among=some(0.3),
    )
    return (
        seed,
        items,
        lengths,
        asked,
        draw(st.sampled_from(["mask", "keep"])),
        draw(st.integers(1, 3)),
    )


def compare(name: str, problem: Any, folder: Path) -> None:
    seed, items, lengths, asked, seen, shards = problem
    random = np.random.default_rng(seed)
    model = recent(random, items) if name == "recent" else trained(name, random, items)
    events = read_events(log_of(random, items, lengths), time_unit="s")
    recommender = recommender_of(model, events, seen)
    with serving(recommender, events, folder, shards) as service:
        if name != "recent":
            share_states(recommender, service)
        check(recommender, events, service, asked)


@settings(max_examples=30)
@given(problem=problems())
def test_lists_are_the_same_from_histories_on(
    problem: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    compare("recent", problem, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", ["lru", "popularity", "markov", "two_stage"])
@settings(max_examples=6)
@given(problem=problems())
def test_lists_of_one_state_are_the_same(
    name: str, problem: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    compare(name, problem, tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", ["recent", "popularity", "markov", "two_stage"])
@pytest.mark.parametrize("seen", ["mask", "keep"])
@pytest.mark.parametrize("seed", range(4))
def test_the_rank_of_a_target_is_its_place_in_the_list(name: str, seen: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    items = int(random.integers(20, 80))
    model = recent(random, items) if name == "recent" else trained(name, random, items)
    events = read_events(log_of(random, items, [30, 4, 12, 2, 9]), time_unit="s")
    first, end = events.offsets[:-1], events.offsets[1:]
    targets = Targets(np.arange(events.num_users), first, end - 1, end)
    found = evaluate(model, events, targets, seen=seen)  # type: ignore[arg-type]
    # the recommender knows all but the targets
    kept = np.ones(events.num_events, dtype=bool)
    kept[end - 1] = False
    before = pl.DataFrame(
        {
            "user_id": events.user_ids.ids(np.repeat(np.arange(events.num_users), end - first)),
            "item_id": events.item_ids.ids(events.items),
            "timestamp": events.times,
        }
    ).filter(pl.Series(kept))
    recommender = recommender_of(model, events, seen)
    recommender.users = type(recommender.users)(model.initial_state(1))
    recommender.update(before, time_unit="s")
    size = model.num_candidates or items
    for row, rank in enumerate(found.ranks.tolist()):
        user = events.user_ids.ids([row]).to_list()
        target = events.item_ids.ids([int(events.items[end[row] - 1])])[0]
        at = int(events.times[end[row] - 1])
        listed = recommender.recommend(user, k=size, at=at)["item_id"].to_list()
        if target in listed:
            assert rank == listed.index(target) + 1
        else:
            assert rank > len(listed) or rank == items


def test_scores_of_the_model_are_those_of_the_list() -> None:
    random = np.random.default_rng(0)
    model = recent(random, 50)
    _, state = model.encode(Batch.from_histories([[3, 7, 3], [1], []]))
    at = torch.tensor([START, START + 3_600, START])
    scores = model.score(state, at=at)
    events = read_events(log_of(random, 50, [3]), time_unit="s")
    retriever = recommender_of(model, events, "keep").retriever
    best = retriever.recommend(state, 50, at=at)
    np.testing.assert_allclose(best.scores, scores.gather(1, best.items), rtol=1e-5, atol=1e-6)
    some = torch.tensor([[3, 1, 40], [0, 1, 2], [9, 8, 7]])
    expected = scores.gather(1, some)
    np.testing.assert_allclose(model.score(state, some, at), expected, rtol=1e-5, atol=1e-6)
    assert retriever.catalogue is not None
    user = torch.zeros(1, model.weight.shape[1])
    twice = Query(user, items=torch.tensor([[4, 4]]), added=torch.ones(1, 2))
    with pytest.raises(ValueError, match="distinct items, received repeats"):
        retriever.catalogue.best(twice, 3)


@pytest.mark.parametrize("name", ["lru", "hstu", "gru4rec"])
def test_a_damaged_state_gives_an_error_and_no_list(name: str) -> None:
    model = trained(name, np.random.default_rng(1), 30)
    events = read_events(log_of(np.random.default_rng(2), 30, [5]), time_unit="s")
    recommender = recommender_of(model, events, "mask")
    broken = type(recommender.users.states)(
        *(
            value.clone().fill_(torch.nan) if value.is_floating_point() else value
            for value in recommender.users.read_states(torch.tensor([1]))
        )
    )
    recommender.users.write_states(torch.tensor([1]), broken)
    with pytest.raises(ValueError, match="must be finite numbers"):
        recommender.recommend(["u001"])
    with pytest.raises(ValueError, match="must be finite numbers"):
        recommender.rank(["u001"], [["i0001", "i0002"]])
    assert recommender.recommend(["u000"], filter_seen=False).height == 10
