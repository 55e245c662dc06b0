"""A model of your own in 60 lines: it passes the laws, trains, and is evaluated.

An exponential moving average of item vectors: old events fade, at a speed that is learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from everlong import PAPER, TrainConfig, read_events
from everlong.data.dataset import Dataset
from everlong.data.split import split
from everlong.data.synthetic import markov_chain
from everlong.evaluation.next_item import Evaluation, evaluate
from everlong.models.batch import Batch
from everlong.models.user_model import ItemEmbeddings, UserModel
from everlong.ops.linear_scan import linear_scan
from everlong.testing import check_model
from everlong.training.next_item import train


@dataclass(frozen=True, kw_only=True)
class FadingConfig:
    num_items: int
    dim: int = 16


class FadingState(NamedTuple):
    user: Tensor  # [B, 2D]: the scan is complex, real parts and then imaginary parts


class Fading(UserModel[FadingState]):
    recurrence_parameters = frozenset({"decay_logit"})

    def __init__(self, config: FadingConfig) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.items = nn.Embedding(config.num_items, 2 * config.dim)
        self.out = nn.Embedding(config.num_items, 2 * config.dim)
        self.bias = nn.Parameter(torch.zeros(config.num_items))
        self.decay_logit = nn.Parameter(torch.zeros(config.dim))

    def initial_state(self, num_users: int) -> FadingState:
        return FadingState(self.bias.new_zeros(num_users, 2 * self.config.dim))

    def encode(self, events: Batch, state: FadingState | None = None) -> tuple[Tensor, FadingState]:
        if state is None:
            state = self.initial_state(events.num_users)
        real = torch.sigmoid(self.decay_logit)
        decay = torch.stack([real, torch.zeros_like(real)])
        outputs, final = linear_scan(self.items(events.items), decay, state.user, events.offsets)
        return outputs, FadingState(final)

    def item_embeddings(self) -> ItemEmbeddings:
        return ItemEmbeddings(self.out.weight, self.bias)


def main() -> Evaluation:
    print(check_model(Fading(FadingConfig(num_items=20))))
    log = markov_chain(num_users=200, num_items=20, length=30)
    parts = split(read_events(log.frame), PAPER.replace({"seen": "keep"}))
    model = Fading(FadingConfig(num_items=parts.events.num_items))
    config = TrainConfig(epochs=30, batch_events=512, lr=0.02, precision="float32")
    train(model, Dataset(parts.events, parts.train), config)
    result = evaluate(model, parts.events, parts.test, seen="keep")
    print(f"HitRate@1 {result.metrics['HitRate@1'].mean:.3f}, best {log.best['HitRate@1']:.3f}")
    return result


if __name__ == "__main__":
    main()
