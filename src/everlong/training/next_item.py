"""The task of predicting each next item of a history."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from everlong.data.dataset import Dataset, TrainBatch
from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.device import serving
from everlong.models.state import State
from everlong.models.user_model import CountingModel, UserModel
from everlong.training.loop import TrainResult, Validate, run
from everlong.training.next_item_losses import NEXT_ITEM_LOSSES, Negatives, NegativeSampler
from everlong.training.precision import Precision
from everlong.training.settings import TrainConfig

EVEN = 256
"""Events of a micro-batch come in multiples of this where products are narrow."""


def train(
    model: UserModel,
    dataset: Dataset,
    config: TrainConfig,
    *,
    validate: Validate | None = None,
    folder: Path | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
) -> TrainResult:
    """Trains a model in place and leaves it at its best validation score.

    Args:
        model: any model; one that counts instead of learning is shown the events once.
        dataset: training segments.
        config: settings.
        validate, folder, resume: as of ``loop.run``.
        device: where to train.

    Raises:
        ValueError: if there is nothing to learn from, or the checkpoint is of another run.
        Interrupted: after Ctrl-C, once the checkpoint is written.
    """
    if dataset.num_labels == 0:
        raise ValueError("training needs events: the training part of the log is empty")
    place = torch.device(device)
    model.to(place)
    if isinstance(model, CountingModel):
        return _count(model, dataset, config, place)
    task = NextItem(model, dataset, config, place)
    return run(task, config, validate=validate, folder=folder, resume=resume)


class NextItem:
    """Micro-batches of whole histories, and the loss of each event's item."""

    encoder: nn.Module | None = None

    def __init__(
        self, model: UserModel, dataset: Dataset, config: TrainConfig, device: torch.device
    ) -> None:
        self.model, self.dataset, self.config, self.device = model, dataset, config, device
        self.precision = Precision(config.precision, device)
        self.carried: State | None = None
        self.facts: Mapping[str, Any] = {**_data_facts(dataset), "given": _given(model)}
        self._loss = NEXT_ITEM_LOSSES[config.loss_for(model.num_items)]
        self._sampler: NegativeSampler | None = None
        if self._loss.power is not None:
            counts = dataset.item_counts(model.num_items).to(device)
            self._sampler = NegativeSampler(counts, config.negatives, self._loss.power)

    @property
    def num_labels(self) -> int:
        return self.dataset.num_labels

    def num_batches(self, epoch: int) -> int:
        config = self.config
        return self.dataset.num_batches(config.micro_batch_budget, seed=config.seed, epoch=epoch)

    def batches(self, epoch: int, start: int) -> Iterator[TrainBatch]:
        config = self.config
        return self.dataset.batches(
            config.micro_batch_budget, seed=config.seed, epoch=epoch, start=start
        )

    def loss(self, batch: TrainBatch) -> float:
        """The mean loss of a first micro-batch; 0 if it has no label."""
        if not bool(batch.labels.any()):
            return 0.0
        events = batch.events.to(self.device)
        with self.precision.autocast():
            vectors = self.model(events)
            return float(self._mean_loss(vectors, events.items, batch.labels, self._draw()))

    def accumulate(self, batch: TrainBatch) -> tuple[float, int]:
        number, carried = int(batch.labels.sum()), self.carried
        with self.precision.autocast():
            self.carried = _last_state(self.model, batch, carried, self.device)
        if self.precision.narrow and self.device.type == "cpu":
            batch = _filled_up(batch)
        events = batch.events.to(self.device)
        if number == 0:
            return 0.0, 0
        negatives = self._draw()
        self.prepare(events, negatives)
        with self.precision.autocast():
            vectors = self.model(events, _first_states(self.model, batch, carried))
        loss = self._mean_loss(vectors, events.items, batch.labels, negatives) * number
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()), number

    def prepare(self, events: Batch, negatives: Negatives | None) -> None:
        """Called before a micro-batch is read, with the items that its loss will be of."""

    def _draw(self) -> Negatives | None:
        """The negatives of a micro-batch; None where all items are."""
        return None if self._sampler is None else self._sampler.draw()

    def _mean_loss(
        self, vectors: Tensor, items: Tensor, labels: Tensor, negatives: Negatives | None
    ) -> Tensor:
        labels = labels.to(self.device)
        if not bool(labels.all()):
            vectors, items = vectors[labels], items[labels]
        if negatives is None:
            head = self.model.item_embeddings()
        else:
            # of the catalogue only what the loss is about
            both = torch.cat([items, negatives.items])
            rows, place = torch.unique(both, return_inverse=True)
            head = self.model.embeddings_of(rows)
            items, drawn = place[: items.numel()], place[items.numel() :]
            expected = negatives.target_log_expected[rows]
            negatives = Negatives(drawn, negatives.log_expected, expected)
        vectors = vectors.to(head.weight.dtype)
        return self._loss.function(vectors, head, items, negatives, self.precision.dtype)


def _count(
    model: CountingModel, dataset: Dataset, config: TrainConfig, device: torch.device
) -> TrainResult:
    """Shows the model every event once, in batches that go on where a history was cut."""
    model.eval()
    carried: State | None = None
    for batch in dataset.batches(config.batch_events, seed=config.seed, epoch=0):
        model.observe(batch.events.to(device), _first_states(model, batch, carried))
        carried = _last_state(model, batch, carried, device)
    return TrainResult(best_epoch=0, best_score=math.nan, epochs=1)


def _first_states(model: UserModel, batch: TrainBatch, carried: State | None) -> State | None:
    """Fresh states, but for a first row that continues a history longer than a batch."""
    if not batch.carried or carried is None:
        return None
    fresh: State = model.initial_state(batch.events.num_users)
    return states.put(fresh, torch.tensor([0], device=carried[0].device), carried)


def _last_state(
    model: UserModel, batch: TrainBatch, carried: State | None, device: torch.device
) -> State | None:
    """The state after the last row where it goes on in the next batch, as it would be served."""
    if not batch.continues:
        return None
    events, last = batch.events, batch.events.num_users - 1
    begin, end = (int(events.offsets[last + n]) for n in (0, 1))
    row = events.select(torch.arange(begin, end), torch.tensor([0, end - begin])).to(device)
    # in eval mode: a carried state has no dropout, as no served state has, and nothing is drawn
    with serving(model):
        final: State = model.final_state(row, carried if batch.carried and last == 0 else None)
    return final


def _filled_up(batch: TrainBatch) -> TrainBatch:
    """The batch with one more history, unlabelled, that fills it to a multiple of ``EVEN`` events.

    The library for narrow products on CPU compiles a kernel for every shape and keeps a thousand of
    them: micro-batches that are never of one size twice took gigabytes.
    """
    events = batch.events
    extra = -events.num_events % EVEN
    filled = Batch(
        items=pad(events.items, (0, extra)),
        times=pad(events.times, (0, extra)),
        offsets=torch.cat([events.offsets, events.offsets[-1:] + extra]),
        fields={name: pad(values, (0, extra)) for name, values in events.fields.items()},
    )
    return replace(batch, events=filled, labels=pad(batch.labels, (0, extra)))


def _data_facts(dataset: Dataset) -> dict[str, Any]:
    """What tells one training part from another."""
    digest = hashlib.sha256(dataset.events.fingerprint.encode())
    for positions in dataset.segments:
        digest.update(np.ascontiguousarray(positions).data)
    return {"labels": dataset.num_labels, "fingerprint": digest.hexdigest()}


def _given(model: UserModel) -> str:
    """A digest of what a model is given and does not learn, such as the vectors of its items.

    A checkpoint holds these too: with others a run would silently go on with the old ones.
    """
    digest = hashlib.sha256()
    for name, value in model.named_buffers():
        digest.update(name.encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()
