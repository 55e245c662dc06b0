"""The settings of training: what every task has, and what each task adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from everlong.system.settings import Settings, unknown
from everlong.training.next_item_losses import NEXT_ITEM_LOSSES
from everlong.training.ranker_losses import RANKER_LOSSES


class LoopConfig(Settings):
    """What every training has, whatever the task.

    Attributes:
        epochs: passes over the training data, at most.
        lr, schedule, warmup: AdamW's rate; constant, or falling to zero along a half cosine over
            ``epochs``; rising linearly over the first ``warmup`` share of them.
        weight_decay: of AdamW, on matrices only (``UserModel.weight_decay`` names exceptions).
        decay_recurrence: decay the recurrence parameters too, as LRURec's published code does,
            which pulls the memory of every channel towards one event.
        clip: bound on the norm of the gradient.
        encoder_lr: rate of an item encoder that is trained with the model, on the same schedule.
        precision: of matrix products; ``auto`` is bfloat16 where the machine multiplies it fast and
            the first batch has the same loss in it. Parameters, states, norms and sums are float32
            always.
        monitor, patience, validate_every: training stops after ``patience`` validations, one every
            ``validate_every`` epochs, without a new best of the ``monitor`` metric.
        seed: of dropout, order of the data and whatever is drawn.
    """

    epochs: PositiveInt = 40
    lr: PositiveFloat = 4e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.03
    weight_decay: NonNegativeFloat = 0.01
    decay_recurrence: bool = False
    clip: PositiveFloat = 5.0
    encoder_lr: PositiveFloat = 1e-4
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    monitor: str = "NDCG@10"
    patience: PositiveInt = 10
    validate_every: PositiveInt = 1
    seed: int = 0

    @property
    def micro_batches_per_update(self) -> int:
        """Micro-batches whose gradients make one update."""
        return 1


def _known_loss(name: str) -> str:
    if name != "auto" and name not in NEXT_ITEM_LOSSES:
        raise ValueError(unknown("loss", name, ["auto", *NEXT_ITEM_LOSSES]))
    return name


class TrainConfig(LoopConfig):
    """How a model learns to predict the next item; nothing here changes what it is.

    Attributes:
        batch_events: events of an update (whole histories are packed up to this budget).
        micro_batch_events: events that are read at once. The gradients of an update's
            micro-batches are added up, so that activations take the memory of one micro-batch. A
            history longer than a micro-batch continues in the next one from its carried state;
            gradients stop at the border.
        loss: name of one of ``NEXT_ITEM_LOSSES``; ``auto`` is the full softmax or the sampled
            softmax, by the size of the catalogue.
        full_softmax_limit: largest catalogue for which ``auto`` takes the full softmax.
        negatives: draws of the losses against drawn items, fresh for each micro-batch.
    """

    batch_events: PositiveInt = 4_096
    micro_batch_events: PositiveInt = 4_096
    loss: Annotated[str, AfterValidator(_known_loss)] = "auto"
    full_softmax_limit: NonNegativeInt = 50_000
    negatives: PositiveInt = 4_096

    @property
    def micro_batch_budget(self) -> int:
        """Most events read at once."""
        return min(self.micro_batch_events, self.batch_events)

    @property
    def micro_batches_per_update(self) -> int:
        """Micro-batches whose gradients make one update."""
        return max(1, round(self.batch_events / self.micro_batch_budget))

    def loss_for(self, num_items: int) -> str:
        """The name of the loss for a catalogue of some size."""
        if self.loss != "auto":
            return self.loss
        return "full" if num_items <= self.full_softmax_limit else "sampled"


class RankerTrainConfig(LoopConfig):
    """How a ranker learns.

    Attributes:
        batch_size: events and candidates of an update.
        pointwise, pairwise, listwise: shares of the ``RANKER_LOSSES`` of these names.
        candidate_drop: share of candidates that are left out at random, so that a model whose
            scores depend on the set depends less on its size. One labelled candidate always stays.
        unexposed: items drawn in proportion to their labels that join the candidates of a request
            in a quarter of all requests, without a label: sets are larger in serving than in logs.
        unexposed_label: ``none``, or ``negative`` to learn that they were not chosen.
    """

    lr: PositiveFloat = 2e-3
    epochs: PositiveInt = 20
    monitor: str = "GAUC"
    patience: PositiveInt = 4
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    batch_size: PositiveInt = 8_192
    pointwise: NonNegativeFloat = 1.0
    pairwise: NonNegativeFloat = 0.0
    listwise: NonNegativeFloat = 0.0
    candidate_drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    unexposed: NonNegativeInt = 0
    unexposed_label: Literal["none", "negative"] = "none"

    @property
    def shares(self) -> Mapping[str, float]:
        """Of each loss, by its name."""
        return {name: getattr(self, name) for name in RANKER_LOSSES}
