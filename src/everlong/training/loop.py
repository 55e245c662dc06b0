"""The training loop: micro-batches of a task in, a model at its best validation score out.

A run is a function of the model, the data and its settings. Interrupted at any update and resumed,
it ends with the same bits on CPU, with the same number of threads, as a run that was never
interrupted.

Today one process trains. Several processes would divide the batches in ``Task.batches`` and sum
gradients and numbers of labels over processes at the start of ``Run._update``; nothing else in
this package knows how many processes there are.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from everlong.models import state as states
from everlong.models.state import State
from everlong.models.user_model import UserModel
from everlong.system.interrupt import Interrupted, deferred_interrupt
from everlong.system.progress import Progress
from everlong.system.settings import unknown
from everlong.system.threads import yielding
from everlong.training.checkpoint import Checkpoint, Position
from everlong.training.optimizer import adamw, rate_share
from everlong.training.precision import Precision
from everlong.training.settings import LoopConfig

log = logging.getLogger(__name__)

B = TypeVar("B")

Validate = Callable[[UserModel], Mapping[str, float]]
"""Metrics of a model on held-out data; called in eval mode."""


class Task(Protocol[B]):
    """What a run learns: micro-batches, and the gradient of each."""

    precision: Precision

    carried: State | None
    """The state of a history that continues in the next micro-batch."""

    @property
    def model(self) -> UserModel:
        """What learns."""

    @property
    def encoder(self) -> nn.Module | None:
        """The part of the model that learns at a rate of its own."""

    @property
    def num_labels(self) -> int:
        """Labels in one epoch."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What tells one training part from another."""

    def num_batches(self, epoch: int) -> int:
        """Micro-batches of an epoch."""

    def batches(self, epoch: int, start: int) -> Iterator[B]:
        """The micro-batches of an epoch, from one on, in an order drawn anew for each epoch."""

    def loss(self, batch: B) -> float:
        """The mean loss of a micro-batch as it is, for the choice of the precision."""

    def accumulate(self, batch: B) -> tuple[float, int]:
        """Adds the gradient of a micro-batch's summed loss; returns that sum and its labels."""


@dataclass
class TrainResult:
    """The best epoch of a run, its score, and the record of each epoch."""

    best_epoch: int
    best_score: float
    epochs: int
    history: list[dict[str, Any]] = field(default_factory=list)


@yielding()
def run(
    task: Task[B],
    config: LoopConfig,
    *,
    validate: Validate | None = None,
    minimise: bool = False,
    folder: Path | None = None,
    resume: bool = False,
) -> TrainResult:
    """Trains the model of a task in place and leaves it at its best validation score.

    Args:
        task: what to learn; its model is on the device where it trains.
        config: settings.
        validate: metrics of the model on held-out data.
        minimise: whether a smaller value of the ``monitor`` metric is better.
        folder: where checkpoints and the log (``train.jsonl``) go; none are kept without it.
        resume: continue from the checkpoint in ``folder``, if there is one.

    Raises:
        ValueError: if the checkpoint is of another run, or the loss is not finite.
        Interrupted: after Ctrl-C, once the checkpoint is written.
    """
    device = task.precision.device
    # the random numbers of the caller continue as if nothing had been drawn
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return Run(task, config, validate, minimise, folder).run(resume)


class Run(Generic[B]):
    """One run: what must be in a checkpoint, and the loop over it."""

    def __init__(
        self,
        task: Task[B],
        config: LoopConfig,
        validate: Validate | None,
        minimise: bool,
        folder: Path | None,
    ) -> None:
        self.task, self.model, self.config = task, task.model, config
        self.validate, self.folder = validate, folder
        self.sign = -1.0 if minimise else 1.0
        self.optimizer = adamw(self.model, config, task.encoder)
        self.position = Position()
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []

    def run(self, resume: bool) -> TrainResult:
        torch.manual_seed(self.config.seed)
        # gradients that the caller left behind must not count
        self.model.zero_grad(set_to_none=True)
        if resume:
            self._resume()
        with deferred_interrupt() as interrupt:
            if self.position == Position() and self.task.precision.narrow:
                batch = next(self.task.batches(0, 0))
                self.task.precision.choose(self.model, lambda: self.task.loss(batch))
            while self.position.epoch < self.config.epochs and not self._stale():
                self._epoch(interrupt)
                # pressed while the model was validated
                if interrupt():
                    self._stop_for_interrupt()
        if self.best:
            self.model.load_state_dict(self.best)
        self.model.eval()
        position = self.position
        score = self.sign * position.best_score
        return TrainResult(position.best_epoch, score, position.epoch, self.history)

    def _epoch(self, interrupt: Callable[[], bool]) -> None:
        position, before = self.position, self.position.labels
        epoch, per_update = position.epoch, self.config.micro_batches_per_update
        count = self.task.num_batches(epoch)
        began, pending = time.perf_counter(), 0
        self.model.train()
        left = self.task.num_labels - before
        with Progress(f"epoch {epoch + 1}", left, "events") as progress:
            for batch in self.task.batches(epoch, position.batch):
                loss, number = self.task.accumulate(batch)
                position.loss_sum += loss
                position.labels += number
                position.batch += 1
                pending += number
                progress.advance(number)
                if position.batch % per_update == 0 or position.batch == count:
                    # the rate of where the update began: at its end the last would have none
                    first = (position.batch - 1) // per_update * per_update
                    self._update(pending, epoch + first / count)
                    pending = 0
                    # only here: between the micro-batches of an update there are gradients to lose
                    if interrupt():
                        self._stop_for_interrupt()
        seconds = time.perf_counter() - began
        record = {
            "epoch": epoch + 1,
            "loss": position.loss_sum / position.labels,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "events_per_second": round((position.labels - before) / max(seconds, 1e-9)),
        }
        position.epoch, position.batch, self.task.carried = epoch + 1, 0, None
        position.loss_sum, position.labels = 0.0, 0
        self._close_epoch(record)

    def _update(self, labels: int, epochs: float) -> None:
        """One step of the optimizer along the mean gradient of ``labels`` labels."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if labels == 0:
            return
        for parameter in parameters:
            parameter.grad.div_(labels)  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        # before the parameters are touched, so that a bad gradient never reaches a checkpoint
        if not math.isfinite(self.position.loss_sum) or not bool(torch.isfinite(norm)):
            raise ValueError(
                f"the loss or its gradient is not finite at epoch {self.position.epoch + 1}, batch "
                f"{self.position.batch}: expected numbers, received a summed loss of "
                f"{self.position.loss_sum} and a gradient of norm {float(norm)}; lower lr or use "
                "precision float32"
            )
        share = rate_share(epochs / self.config.epochs, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _close_epoch(self, record: dict[str, Any]) -> None:
        position, config = self.position, self.config
        due = position.epoch % config.validate_every == 0 or position.epoch == config.epochs
        if self.validate is not None and due:
            self.model.eval()
            record |= self.validate(self.model)
            score = self.sign * self._monitored(record)
            position.waited += 1
            if score > position.best_score:
                position.best_score, position.best_epoch, position.waited = score, position.epoch, 0
                self.best = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.history.append(record)
        log.info("%s", self._line(record))
        if self.folder is not None:
            self._save(self.folder)

    def _line(self, record: Mapping[str, Any]) -> str:
        """An epoch in few words; everything is in the log file."""
        name = self.config.monitor
        score = f", {name} {record[name]:.4f}" if name in record else ""
        return (
            f"epoch {record['epoch']}: loss {record['loss']:.4f}{score}, "
            f"{record['events_per_second']:,} events/s"
        )

    def _monitored(self, record: Mapping[str, Any]) -> float:
        name = self.config.monitor
        if name not in record:
            raise ValueError(unknown("monitor", name, record, of="the metrics of validation"))
        return float(record[name])

    def _stale(self) -> bool:
        return self.validate is not None and self.position.waited >= self.config.patience

    def _save(self, folder: Path) -> None:
        Checkpoint(
            run=self._identity(),
            position=self.position,
            history=self.history,
            model=self.model.state_dict(),
            best=self.best,
            optimizer=self.optimizer.state_dict(),
            random=torch.get_rng_state(),
            carried=self.task.carried,
            precision=self.task.precision.name,
        ).write(folder)

    def _resume(self) -> None:
        if self.folder is None or not Checkpoint.exists(self.folder):
            return
        like = self.model.initial_state(1)
        saved = Checkpoint.read(self.folder, run=self._identity(), state_like=like)
        self.model.load_state_dict(saved.model)
        self.optimizer.load_state_dict(dict(saved.optimizer))
        torch.set_rng_state(saved.random)
        self.position, self.history, self.best = saved.position, saved.history, dict(saved.best)
        if saved.carried is not None:
            self.task.carried = states.to_device(saved.carried, self.task.precision.device)
        # as the first batch of the run has decided
        self.task.precision.dtype = getattr(torch, saved.precision)
        log.info("resumed at epoch %d, batch %d", self.position.epoch + 1, self.position.batch)

    def _stop_for_interrupt(self) -> None:
        where = f"epoch {self.position.epoch + 1}, batch {self.position.batch}"
        if self.folder is None:
            raise Interrupted(f"stopped at {where}; no folder was given, so nothing was kept")
        self._save(self.folder)
        raise Interrupted(f"stopped at {where}; resume from {self.folder}")

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued."""
        return {
            "model": type(self.model).__name__,
            "architecture": _as_values(self.model.config),
            "parameters": {k: list(v.shape) for k, v in self.model.state_dict().items()},
            "training": self.config.model_dump(),
            "data": dict(self.task.facts),
        }


def _as_values(config: Any) -> Any:
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else str(config)
