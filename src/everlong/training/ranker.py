"""Rankers: learning from requests, and scoring the candidates of held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from everlong.data.requests import RequestDataset
from everlong.models.batch import RequestBatch
from everlong.models.ranker import Ranker
from everlong.models.state import State
from everlong.training.next_item import LoopConfig, Run, TrainResult, Validate
from everlong.training.ranking_losses import Shares, ranking_loss


class RankerTrainConfig(LoopConfig):
    """How a ranker learns.

    Attributes:
        batch_size: events and candidates of an update.
        pointwise, pairwise, listwise: shares of the losses.
        candidate_drop: share of candidates that are left out at random, so that a model whose
            scores depend on the set depends less on its size. One labelled candidate always stays.
        unexposed: items drawn in proportion to their labels that join the candidates of a request
            in a quarter of all requests, without a label: sets are larger in serving than in logs.
        unexposed_label: ``none``, or ``negative`` to learn that they were not chosen.
    """

    lr: Annotated[float, Field(gt=0)] = 2e-3
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
    def shares(self) -> Shares:
        """Of the losses."""
        return Shares(self.pointwise, self.pairwise, self.listwise)


def train_ranker(
    model: Ranker,
    dataset: RequestDataset,
    config: RankerTrainConfig,
    *,
    validate: Validate | None = None,
    folder: Path | None = None,
    resume: bool = False,
    device: torch.device | str = "cpu",
) -> TrainResult:
    """Trains a ranker in place and leaves it at its best validation score.

    Args:
        model: any ranker.
        dataset: requests with labels.
        config: settings.
        validate: metrics of the model on held-out requests.
        folder: where checkpoints and the log go; none are kept without it.
        resume: continue from the checkpoint in ``folder``, if there is one.
        device: where to train.

    Raises:
        ValueError: if no request has a label, or the checkpoint is of another run.
        Interrupted: after Ctrl-C, once the checkpoint is written.
    """
    if dataset.num_labels == 0:
        raise ValueError("training needs labelled candidates, received none; check the label field")
    model.to(device)
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        task = Ranking(model, dataset, config, place)
        return Run(task, model, config, validate, folder).run(resume)


class Ranking:
    """The task of ordering the candidates of requests."""

    carried: State | None = None

    def __init__(
        self,
        model: Ranker,
        dataset: RequestDataset,
        config: RankerTrainConfig,
        device: torch.device,
    ) -> None:
        self.model, self.dataset, self.config, self.device = model, dataset, config, device
        self.dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
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

    def check(self, batch: RequestBatch) -> None:
        """Nothing to look at: the products of rankers are in the precision that was asked for."""

    def accumulate(self, batch: RequestBatch) -> tuple[float, int]:
        number = int((~batch.labels.isnan()).sum())
        batch = drop_candidates(batch, self.config.candidate_drop)
        batch = self._with_unexposed(batch).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            logits = self.model.rank(batch)
        loss = ranking_loss(logits.float(), batch.labels, batch.offsets, self.config.shares)
        # the mean of the labels that are left stands for all
        (loss * number).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()) * number, number

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
