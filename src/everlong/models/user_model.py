"""The contract of every model: one definition, run whole or event by event.

The seven laws that a model must keep are in :mod:`everlong.testing`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Literal, NamedTuple

import torch
from torch import Tensor, nn

from everlong.models.batch import Batch
from everlong.models.query import Query
from everlong.models.state import S

StateKind = Literal["order-dependent", "additive"]

Task = Literal["next_item", "rank"]
"""What a model learns from: each next event of a history, or requests with their candidates."""


class ItemEmbeddings(NamedTuple):
    """What turns a user vector into scores of items: ``user @ weight.T + bias``."""

    weight: Tensor  # [I, D]
    bias: Tensor  # [I]


class UserModel(nn.Module, Generic[S]):
    """Reads users' events into states of fixed size and scores items from those states alone.

    A model whose scores are dot products writes ``initial_state``, ``encode`` and
    ``item_embeddings``; its state has a field ``user [B, D]``, the output after the user's last
    event. Everything else follows from these. Other models override ``score_vectors`` or ``score``.

    ``S`` is the model's own state, as in ``class LRU(UserModel[LRUState])``. ``UserModel`` without
    it stands for a model of any state.
    """

    state_kind: ClassVar[StateKind] = "order-dependent"
    """Whether late events can be added to a state ("additive") or only replayed."""

    task: ClassVar[Task] = "next_item"
    """What the model learns from."""

    exemptions: ClassVar[Mapping[int, str]] = {}
    """Numbers of the laws that the model cannot keep, each with the reason."""

    config: Any
    """The model's own frozen dataclass of architecture, as given to its constructor."""

    recurrence_parameters: ClassVar[frozenset[str]] = frozenset()
    """Last names of parameters that set how long the model remembers: weight decay spares them."""

    weight_decay: ClassVar[Mapping[str, bool]] = {}
    """Names of parameters for which the rule of weight decay, that matrices decay and vectors do
    not, does not hold, and whether they decay. Any module may declare its own."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        if num_items < 1:
            raise ValueError(
                f"a model needs a catalogue: expected num_items >= 1, received {num_items}"
            )
        self.num_items = num_items

    @property
    def field_codes(self) -> Mapping[str, int]:
        """The event fields that the model reads beside items and times, and how many codes each
        has: a value is one of ``0 .. codes - 1``."""
        return {}

    @property
    def event_fields(self) -> tuple[str, ...]:
        """Names of the event fields that the model reads, beside items and times."""
        return tuple(self.field_codes)

    @property
    def scores_by_products(self) -> bool:
        """Whether scores are those of ``query`` and ``item_embeddings``, so that the best of a
        large catalogue are found without scoring all of it."""
        kind = type(self)
        own = kind.score is not UserModel.score or kind.score_vectors is not UserModel.score_vectors
        return kind.item_embeddings is not UserModel.item_embeddings and not own

    @property
    def num_candidates(self) -> int | None:
        """How many of the best by ``score`` ``rank_candidates`` puts in order; None: a list is in
        the order of ``score``."""
        return None

    @property
    def set_dependent(self) -> bool:
        """Whether the score of a candidate depends on which others it stands among."""
        return False

    @abstractmethod
    def initial_state(self, num_users: int) -> S:
        """The state of users without events, every field ``[num_users, ...]``."""

    @abstractmethod
    def encode(self, events: Batch, state: S | None = None) -> tuple[Tensor, S]:
        """Reads many events of many users.

        Args:
            events: packed events; a user without events keeps the state.
            state: where to continue, default ``initial_state``.

        Returns:
            The output after each event ``[N, D]`` and the state after each user's last event.
        """

    def final_state(self, events: Batch, state: S | None = None) -> S:
        """The state after each user's last event: what ``encode`` returns, without the outputs."""
        return self.encode(events, state)[1]

    def step(self, events: Batch, state: S) -> S:
        """Reads one event of each user: ``events`` holds exactly one event a user."""
        return self.encode(events, state)[1]

    def forward(self, events: Batch, state: S | None = None) -> Tensor:
        """The training path: the user vector *before* each event, all events at once.

        Returns:
            ``[N, D]``, row n from what precedes event n alone, at the time of event n (law 7).
        """
        if state is None:
            state = self.initial_state(events.num_users)
        if events.num_events == 0:
            return self.encode(events, state)[0]
        outputs = self.outputs_at(events, state, events.next_times)
        before = self.user_embedding(state, events.first_times)
        return shift(outputs, before, events.offsets)

    def outputs_at(self, events: Batch, state: S, at: Tensor) -> Tensor:
        """Outputs ``[N, D]`` after each event, as of the times ``at [N]`` of requests.

        They are those of ``encode`` in a model that does not use the time of the request; another
        overrides this, and so is trained with the times of the events to be predicted.
        """
        return self.encode(events, state)[0]

    def user_embedding(self, state: S, at: Tensor | None = None) -> Tensor:
        """The user vector of a state, ``[B, D]``, at the times ``at [B]`` of requests.

        Models without time ignore ``at``; the others take that of the newest event without it.
        """
        vector: Tensor = state.user  # type: ignore[attr-defined]
        return vector

    def query(self, state: S, at: Tensor | None = None) -> Query:
        """What the scores of users ``[B]`` at the times ``at [B]`` of requests are made of.

        By default the user vectors alone; a model that adds a bias of the time of the request, or
        scores of its own for a few items of each user, says so here.
        """
        return Query(self.user_embedding(state, at))

    def item_embeddings(self) -> ItemEmbeddings:
        """Item vectors and biases of a model whose scores are dot products."""
        raise TypeError(
            f"{type(self).__name__} does not score by dot products; use score_vectors()"
        )

    def embeddings_of(self, items: Tensor) -> ItemEmbeddings:
        """``item_embeddings`` of some items ``[n]``; a model may know a shorter way to them."""
        weight, bias = self.item_embeddings()
        return ItemEmbeddings(weight[items], bias[items])

    def score_vectors(self, user: Tensor, items: Tensor | None = None) -> Tensor:
        """Scores from user vectors ``[B, D]``: ``[B, I]``, or ``[B, C]`` for ``items [B, C]``."""
        if items is None:
            weight, bias = self.item_embeddings()
            return torch.addmm(bias.to(user.dtype), user, weight.to(user.dtype).T)
        weight, bias = (part.to(user.dtype) for part in self.embeddings_of(items.flatten()))
        weight = weight.view(*items.shape, -1)
        return torch.einsum("bd,bcd->bc", user, weight) + bias.view(items.shape)

    def score(self, state: S, items: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """Scores of items for users, from their states alone.

        Args:
            state: ``B`` users.
            items: ``[B, C]`` item rows, or None for the whole catalogue.
            at: ``[B]`` time of the request, Unix seconds; models without time ignore it.

        Returns:
            ``[B, I]`` or ``[B, C]``, higher is better.
        """
        query = self.query(state, at)
        return query.add_to(self.score_vectors(query.vectors, items), items)

    def rank_candidates(self, state: S, items: Tensor, at: Tensor | None = None) -> Tensor:
        """Scores ``[B, C]`` by which candidates ``[B, C]`` are put in order; ``score`` by default.

        A model with a second stage says in ``num_candidates`` how many items come to it.
        """
        return self.score(state, items, at)


class CountingModel(UserModel[S]):
    """A model that counts the training events instead of learning by gradients."""

    @abstractmethod
    def observe(self, events: Batch, state: S | None = None) -> None:
        """Adds training events to the counts; called once for every part of the log.

        Args:
            events: the next part.
            state: where each user stood before it, default ``initial_state``.
        """


def shift(outputs: Tensor, before: Tensor, offsets: Tensor) -> Tensor:
    """Outputs one event later: row n holds what is known before event n.

    Args:
        outputs: ``[N, D]`` after each event.
        before: ``[B, D]`` before each user's first event of the batch.
        offsets: ``[B + 1]``.

    Returns:
        ``[N, D]``.
    """
    if outputs.shape[0] == 0:
        return outputs
    has_events = offsets[1:] > offsets[:-1]
    moved = outputs.roll(1, 0)
    return moved.index_copy(0, offsets[:-1][has_events], before[has_events].to(outputs.dtype))
