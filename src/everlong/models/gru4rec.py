"""GRU4Rec (Hidasi et al., ICLR 2016, arXiv 1511.06939): a gated recurrent network over events.

State: the hidden vector of every layer, ``4 L H`` bytes: 512 at the default sizes (L = 1, H = 128).

Departures from the paper, as in current practice: item embeddings shared by input and output
(tied), an item bias, whole histories instead of sessions, and a softmax over the catalogue
instead of ranking losses on the items of the batch (the loss is not part of the model).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from everlong.models.batch import Batch
from everlong.models.item_vectors import ItemConfig, ItemVectors
from everlong.models.user_model import ItemEmbeddings, UserModel
from everlong.ops.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class GRU4RecConfig(ItemConfig):
    """Architecture of GRU4Rec.

    Attributes:
        hidden: width H of the recurrent vector.
        layers: recurrent layers L.
        dropout: on embeddings, between the layers and on what they give out.
    """

    hidden: int = 128
    layers: int = 1
    dropout: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, received {getattr(self, name)}")


class GRU4RecState(NamedTuple):
    """What GRU4Rec remembers of a user."""

    hidden: Tensor  # [B, L, H]


class GRU4Rec(UserModel[GRU4RecState]):
    """A recurrent network on packed histories, each event after the one before it."""

    def __init__(self, config: GRU4RecConfig) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.items = ItemVectors(config)
        self.item_bias = nn.Parameter(torch.zeros(config.num_items))
        for weight in self.items.parameters():
            nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)
        self.dropout = Dropout(config.dropout)
        self.recurrence = nn.GRU(
            config.dim,
            config.hidden,
            config.layers,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        self.leave = nn.Linear(config.hidden, config.dim)

    def initial_state(self, num_users: int) -> GRU4RecState:
        """Zero hidden vectors."""
        config = self.config
        shape = (num_users, config.layers, config.hidden)
        return GRU4RecState(self.leave.weight.new_zeros(shape))

    def encode(
        self, events: Batch, state: GRU4RecState | None = None
    ) -> tuple[Tensor, GRU4RecState]:
        """Outputs ``[N, D]`` after each event, and the final hidden vectors."""
        if state is None:
            state = self.initial_state(events.num_users)
        if events.num_events == 0:
            return self._leave(state.hidden[:0, -1]), state
        embedded = self.dropout(self.items(events.items))
        users, where, sizes = time_major(events)
        # (layers, users) is the order that the recurrence wants
        carried = state.hidden.index_select(0, users).transpose(0, 1).contiguous()
        # float32 in any case: the state lives long
        with torch.autocast(events.items.device.type, enabled=False):
            packed = PackedSequence(embedded[where].to(carried.dtype), sizes)
            found, last = self.recurrence(packed, carried)
        outputs = torch.empty_like(found.data).index_copy(0, where, found.data)
        hidden = state.hidden.index_copy(0, users, last.transpose(0, 1))
        return self._leave(outputs), GRU4RecState(hidden)

    def user_embedding(self, state: GRU4RecState, at: Tensor | None = None) -> Tensor:
        """The user vector ``[B, D]``, from the last layer."""
        return self._leave(state.hidden[:, -1])

    def _leave(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.leave(self.dropout(hidden))
        return found

    def item_embeddings(self) -> ItemEmbeddings:
        """The item vectors, tied, and the item biases."""
        return ItemEmbeddings(self.items.table(), self.item_bias)

    def embeddings_of(self, items: Tensor) -> ItemEmbeddings:
        """The same of some items, without the others."""
        return ItemEmbeddings(self.items(items), self.item_bias[items])


def time_major(events: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """How to read packed events one time step after the other.

    Returns:
        The users with events, longest history first; the place in the batch of every event, in
        the order of (position in the history, user); the number of events at each position, on
        the CPU.
    """
    lengths = events.lengths
    order = lengths.argsort(descending=True, stable=True)
    users = order[: int((lengths > 0).sum())]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    rows = events.user_rows
    position = torch.arange(events.num_events, device=rows.device) - events.offsets[rows]
    where = (position * order.numel() + rank[rows]).argsort()
    return users, where, torch.bincount(position).cpu()
