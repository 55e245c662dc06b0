"""A retriever and a ranker over one history: both states in one record, kept by the same events.

The retriever names the best of the whole catalogue, the ranker orders these few as one set.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from everlong.models.batch import Batch
from everlong.models.query import Query
from everlong.models.ranker import Ranker
from everlong.models.registry import config_class, stored_model_class
from everlong.models.state import State, field_names
from everlong.models.user_model import ItemEmbeddings, UserModel
from everlong.system.settings import load_settings


@dataclass(frozen=True, kw_only=True)
class TwoStageConfig:
    """Which models, and how many candidates go from the one to the other.

    Attributes:
        num_items: items of the catalogue of both.
        retriever, ranker: names of built-in models.
        retriever_settings, ranker_settings: their architectures, without ``num_items``.
        candidates: items that the retriever names for the ranker.
    """

    num_items: int
    retriever: str = "lru"
    ranker: str = "ifa"
    retriever_settings: dict[str, Any] = field(default_factory=dict)
    ranker_settings: dict[str, Any] = field(default_factory=dict)
    candidates: int = 200

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"expected candidates >= 1, received {self.candidates}")


class TwoStage(UserModel):
    """A retriever and a ranker as one model: ``score`` retrieves, ``rank_candidates`` ranks."""

    def __init__(self, config: TwoStageConfig) -> None:
        super().__init__(config.num_items)
        self.config = config
        retriever = stored_model_class(config.retriever)
        ranker = stored_model_class(config.ranker, "rank")
        items = {"num_items": config.num_items}
        settings = load_settings(config_class(retriever), {**config.retriever_settings, **items})
        self.retriever: UserModel = retriever(settings)
        settings = load_settings(config_class(ranker), {**config.ranker_settings, **items})
        self.ranker: Ranker = ranker(settings)

    @property
    def field_codes(self) -> Mapping[str, int]:
        """What both read of events."""
        return {**self.retriever.field_codes, **self.ranker.field_codes}

    def initial_state(self, num_users: int) -> State:
        """Both initial states side by side."""
        return joined(self.retriever.initial_state(num_users), self.ranker.initial_state(num_users))

    def encode(self, events: Batch, state: State | None = None) -> tuple[Tensor, State]:
        """The outputs of the retriever, and both states."""
        a, b = self.parts(self.initial_state(events.num_users) if state is None else state)
        outputs, retrieved = self.retriever.encode(events, a)
        return outputs, joined(retrieved, self.ranker.final_state(events, b))

    def final_state(self, events: Batch, state: State | None = None) -> State:
        """Both states after all events."""
        a, b = self.parts(self.initial_state(events.num_users) if state is None else state)
        return joined(self.retriever.final_state(events, a), self.ranker.final_state(events, b))

    def step(self, events: Batch, state: State) -> State:
        """Both states after one event of each user."""
        a, b = self.parts(state)
        return joined(self.retriever.step(events, a), self.ranker.step(events, b))

    def forward(self, events: Batch, state: State | None = None) -> Tensor:
        """The training path of the retriever."""
        return self.retriever(events, None if state is None else self.parts(state)[0])  # type: ignore[no-any-return]

    @property
    def scores_by_products(self) -> bool:
        """Whether the retriever scores by products."""
        return self.retriever.scores_by_products

    @property
    def num_candidates(self) -> int | None:
        """Items that the retriever names for the ranker."""
        candidates: int = self.config.candidates
        return candidates

    def query(self, state: State, at: Tensor | None = None) -> Query:
        """The query of the retriever."""
        return self.retriever.query(self.parts(state)[0], at)

    def user_embedding(self, state: State, at: Tensor | None = None) -> Tensor:
        """The user vector of the retriever."""
        return self.retriever.user_embedding(self.parts(state)[0], at)

    def item_embeddings(self) -> ItemEmbeddings:
        """Item vectors of the retriever."""
        return self.retriever.item_embeddings()

    def embeddings_of(self, items: Tensor) -> ItemEmbeddings:
        """The same of some items."""
        return self.retriever.embeddings_of(items)

    def score_vectors(self, user: Tensor, items: Tensor | None = None) -> Tensor:
        """Scores of the retriever from its user vectors."""
        return self.retriever.score_vectors(user, items)

    def score(self, state: State, items: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Scores of the retriever."""
        return self.retriever.score(self.parts(state)[0], items, at)

    def rank_candidates(self, state: State, items: Tensor, at: Tensor | None = None) -> Tensor:
        """Scores ``[B, C]`` of candidates ``[B, C]`` as sets, by the ranker."""
        return self.ranker.score(self.parts(state)[1], items, at)

    def parts(self, state: State) -> tuple[State, State]:
        """The state of the retriever and that of the ranker."""
        like = self.retriever.initial_state(0), self.ranker.initial_state(0)
        cut = len(like[0])
        return type(like[0])(*state[:cut]), type(like[1])(*state[cut:])


def joined(retriever: State, ranker: State) -> State:
    """Both states as one, the fields named by whose they are."""
    names = [f"retriever_{name}" for name in field_names(retriever)]
    names += [f"ranker_{name}" for name in field_names(ranker)]
    kind: type[State] = namedtuple("TwoStageState", names)  # type: ignore[misc]
    return kind(*retriever, *ranker)
