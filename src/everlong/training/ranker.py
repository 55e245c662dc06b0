"""The task of ordering the candidates of requests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from everlong.data.requests import RequestDataset
from everlong.models.batch import RequestBatch
from everlong.models.ranker import Ranker
from everlong.models.state import State
from everlong.training.loop import TrainResult, Validate, run
from everlong.training.precision import Precision
from everlong.training.ranker_losses import ranker_loss
from everlong.training.settings import RankerTrainConfig


def train_ranker(
    model: Ranker,
    dataset: RequestDataset,
    config: RankerTrainConfig,
    *,
    validate: Validate | None = None,
    minimise: bool = False,
    folder: Path | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
) -> TrainResult:
    """Trains a ranker in place and leaves it at its best validation score.

    Args:
        model: any ranker.
        dataset: requests with labels.
        config: settings.
        validate, minimise, folder, resume: as of ``loop.run``.
        device: where to train.

    Raises:
        ValueError: if no request has a label, or the checkpoint is of another run.
        Interrupted: after Ctrl-C, once the checkpoint is written.
    """
    if dataset.num_labels == 0:
        raise ValueError("training needs labelled candidates, received none; check the label field")
    place = torch.device(device)
    model.to(place)
    task = Ranking(model, dataset, config, place)
    return run(task, config, validate=validate, minimise=minimise, folder=folder, resume=resume)


class Ranking:
    """Batches of whole users with all their requests, and the loss of the candidates."""

    encoder: nn.Module | None = None
    carried: State | None = None

    def __init__(
        self,
        model: Ranker,
        dataset: RequestDataset,
        config: RankerTrainConfig,
        device: torch.device,
    ) -> None:
        self.model: Ranker = model
        self.dataset, self.config, self.device = dataset, config, device
        self.precision = Precision(config.precision, device)
        counts = np.bincount(dataset.requests.items, minlength=model.num_items)
        self._chances = torch.from_numpy(counts.astype(np.float64))

    @property
    def num_labels(self) -> int:
        return self.dataset.num_labels

    @property
    def facts(self) -> Mapping[str, Any]:
        digest = hashlib.sha256(self.dataset.events.fingerprint.encode())
        requests = self.dataset.requests
        for values in (requests.user, requests.stop, requests.offsets, requests.items):
            digest.update(np.ascontiguousarray(values).data)
        digest.update(np.ascontiguousarray(requests.labels).data)
        return {"labels": requests.num_labels, "fingerprint": digest.hexdigest()}

    def num_batches(self, epoch: int) -> int:
        config = self.config
        return self.dataset.num_batches(config.batch_size, seed=config.seed, epoch=epoch)

    def batches(self, epoch: int, start: int) -> Iterator[RequestBatch]:
        config = self.config
        return self.dataset.batches(config.batch_size, seed=config.seed, epoch=epoch, start=start)

    def loss(self, batch: RequestBatch) -> float:
        """The mean loss of a batch, with the candidates that were shown."""
        return float(self._mean_loss(batch.to(self.device)))

    def accumulate(self, batch: RequestBatch) -> tuple[float, int]:
        number = int((~batch.labels.isnan()).sum())
        batch = drop_candidates(batch, self.config.candidate_drop)
        loss = self._mean_loss(self._with_unexposed(batch).to(self.device))
        # the mean of the labels that are left stands for all
        (loss * number).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()) * number, number

    def _mean_loss(self, batch: RequestBatch) -> Tensor:
        with self.precision.autocast():
            logits = self.model.rank(batch)
        return ranker_loss(logits.float(), batch.labels, batch.offsets, self.config.shares)

    def _with_unexposed(self, batch: RequestBatch) -> RequestBatch:
        """The batch in which a quarter of the requests have candidates that were not shown."""
        extra = self.config.unexposed
        if extra == 0:
            return batch
        chosen = torch.rand(batch.user.numel()) < 0.25
        label = 0.0 if self.config.unexposed_label == "negative" else torch.nan
        return add_candidates(batch, chosen, extra, self._chances, label)


def drop_candidates(batch: RequestBatch, share: float) -> RequestBatch:
    """The batch without a share of its candidates; of each request one labelled one stays."""
    if share == 0:
        return batch
    requests = _rows(batch.offsets)
    drawn = torch.rand(batch.items.numel())
    # of the labelled ones that with the largest number is kept whatever the share
    known = torch.where(batch.labels.isnan(), -1.0, drawn)
    best = torch.full((batch.user.numel(),), -1.0).scatter_reduce(0, requests, known, "amax")
    kept = (drawn >= share) | (known == best[requests])
    return _candidates(batch, requests[kept], batch.items[kept], batch.labels[kept])


def add_candidates(
    batch: RequestBatch, chosen: Tensor, number: int, chances: Tensor, label: float
) -> RequestBatch:
    """The batch with items drawn by ``chances [I]`` added to requests where ``chosen [Q]`` holds.

    An item that is a candidate of the request already is not added.
    """
    rows = chosen.nonzero().flatten().repeat_interleave(number)
    if rows.numel() == 0:
        return batch
    drawn = torch.multinomial(chances, rows.numel(), replacement=True)
    requests = _rows(batch.offsets)
    owner, items = torch.cat([requests, rows]), torch.cat([batch.items, drawn])
    labels = torch.cat([batch.labels, torch.full((rows.numel(),), label)])
    # the first of each pair of request and item stays, and the shown ones come first
    pair = owner * chances.numel() + items
    order = pair.argsort(stable=True)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = pair[order][1:] != pair[order][:-1]
    kept = order[new].sort().values
    kept = kept[owner[kept].argsort(stable=True)]
    return _candidates(batch, owner[kept], items[kept], labels[kept])


def _rows(offsets: Tensor) -> Tensor:
    return torch.arange(offsets.numel() - 1).repeat_interleave(offsets.diff())


def _candidates(
    batch: RequestBatch, requests: Tensor, items: Tensor, labels: Tensor
) -> RequestBatch:
    """The batch with other candidates, which come by request."""
    counts = torch.bincount(requests, minlength=batch.user.numel())
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return replace(batch, offsets=offsets, items=items, labels=labels)
