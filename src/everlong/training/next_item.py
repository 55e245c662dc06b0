"""The training loop: batches of events in, a model at its best validation score out.

A run is a function of the model, the data and its settings. Interrupted at any update and resumed,
it ends with the same bits on CPU, with the same number of threads, as a run that was never
interrupted.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import pad

from everlong.data.dataset import Dataset, TrainBatch
from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.device import serving
from everlong.models.state import State
from everlong.models.user_model import CountingModel, UserModel
from everlong.system.interrupt import Interrupted, deferred_interrupt
from everlong.system.progress import Progress
from everlong.system.settings import Settings, unknown
from everlong.training.checkpoint import Checkpoint, Position
from everlong.training.losses import Negatives, NegativeSampler, full_softmax, nce, sampled_softmax

log = logging.getLogger(__name__)

EVEN = 256
"""Events of a piece come in multiples of this where products are narrow."""

B = TypeVar("B")

Validate = Callable[[UserModel], dict[str, float]]


class LoopConfig(Settings):
    """What every training has, whatever is learnt.

    Attributes:
        epochs: passes over the training data, at most.
        lr, schedule, warmup: AdamW's rate; constant, or falling to zero along a half cosine over
            ``epochs``; rising linearly over the first ``warmup`` share of them.
        weight_decay: of AdamW, on matrices only; never on biases and norms.
        decay_recurrence: decay the recurrence parameters too, as LRURec's published code does,
            which pulls the memory of every channel towards one event.
        clip: bound on the norm of the gradient.
        encoder_lr: rate of an item encoder that is trained with the model, on the same schedule.
        precision: of matrix products; ``auto`` is bfloat16 where the machine multiplies it fast.
            Parameters, states, norms and sums are float32 always.
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
    def pieces_per_update(self) -> int:
        """Batches whose gradients make one update."""
        return 1


class TrainConfig(LoopConfig):
    """How a model learns to predict the next item; nothing here changes what it is.

    Attributes:
        batch_events: events of an update (whole histories are packed up to this budget).
        piece_events: events read at once. The gradients of an update's pieces are added up, so
            that activations take the memory of one piece. A history longer than a piece goes on
            in the next one from its carried state; gradients stop at the border.
        loss: full softmax, sampled softmax, or one of these by the size of the catalogue
            (``auto``); or ``nce``, the softmax against uniform draws that are not much like the
            target, for models that score by cosines. The draws are merged where they repeat, which
            the published code does not do.
        full_softmax_limit: largest catalogue for which ``auto`` takes the full softmax.
        negatives: draws of the sampled softmax and of ``nce``, fresh for each piece.
    """

    batch_events: PositiveInt = 4_096
    piece_events: PositiveInt = 4_096
    loss: Literal["auto", "full", "sampled", "nce"] = "auto"
    full_softmax_limit: NonNegativeInt = 50_000
    negatives: PositiveInt = 4_096

    @property
    def piece_budget(self) -> int:
        """Most events read at once."""
        return min(self.piece_events, self.batch_events)

    @property
    def pieces_per_update(self) -> int:
        """Pieces whose gradients make one update."""
        return max(1, round(self.batch_events / self.piece_budget))


@dataclass
class TrainResult:
    """What a run came to."""

    best_epoch: int
    best_score: float
    epochs: int
    history: list[dict[str, Any]] = field(default_factory=list)


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
        validate: metrics of the model on held-out events, called in evaluation mode.
        folder: where checkpoints and the log (``train.jsonl``) go; none are kept without it.
        resume: continue from the checkpoint in ``folder``, if there is one.
        device: where to train.

    Raises:
        ValueError: if there is nothing to learn from, or the checkpoint is of another run.
        Interrupted: after Ctrl-C, once the checkpoint is written.
    """
    if dataset.num_labels == 0:
        raise ValueError("training needs events: the training part of the log is empty")
    model.to(device)
    place = torch.device(device)
    if isinstance(model, CountingModel):
        return _count(model, dataset, config, place)
    # the caller's random numbers go on as if nothing had been drawn
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        task = NextItem(model, dataset, config, place)
        return Run(task, model, config, validate, folder).run(resume)


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
    # in eval mode: the state that the next piece starts from has no dropout, as none that is served
    # has one, and no random number is drawn for it
    with serving(model):
        final: State = model.final_state(row, carried if batch.carried and last == 0 else None)
    return final


def _filled_up(piece: TrainBatch) -> TrainBatch:
    """The piece with one more history, unlabelled, that fills it to a multiple of ``EVEN`` events.

    The library for narrow products on CPU compiles a kernel for every shape and keeps a thousand of
    them: pieces that are never of one size twice took gigabytes.
    """
    events = piece.events
    extra = -events.num_events % EVEN
    filled = Batch(
        items=pad(events.items, (0, extra)),
        times=pad(events.times, (0, extra)),
        offsets=torch.cat([events.offsets, events.offsets[-1:] + extra]),
        fields={name: pad(values, (0, extra)) for name, values in events.fields.items()},
    )
    return replace(piece, events=filled, labels=pad(piece.labels, (0, extra)))


class Task(Protocol[B]):
    """What a run learns: batches, and the gradient of each."""

    dtype: torch.dtype
    """Of matrix products."""

    carried: State | None
    """Of a history that goes on in the next batch."""

    @property
    def num_labels(self) -> int:
        """Labels in one epoch."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What tells one training part from another."""

    def num_batches(self, epoch: int) -> int:
        """Batches of an epoch."""

    def batches(self, epoch: int, start: int) -> Iterator[B]:
        """The batches of an epoch, in an order drawn anew for each, from one on."""

    def check(self, batch: B) -> None:
        """Looks at a first batch, before anything is learnt."""

    def accumulate(self, batch: B) -> tuple[float, int]:
        """Adds the gradient of a batch's summed loss; returns that sum and its labels."""


class NextItem:
    """The task of predicting each next item of a history."""

    def __init__(
        self, model: UserModel, dataset: Dataset, config: TrainConfig, device: torch.device
    ) -> None:
        self.model, self.dataset, self.config, self.device = model, dataset, config, device
        self.loss = _NextItemLoss(model, dataset, config, device)
        self.carried: State | None = None
        self.facts: Mapping[str, Any] = {**_data_facts(dataset), "given": _given(model)}

    @property
    def dtype(self) -> torch.dtype:
        return self.loss.dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self.loss.dtype = dtype

    @property
    def num_labels(self) -> int:
        return self.dataset.num_labels

    def num_batches(self, epoch: int) -> int:
        config = self.config
        return self.dataset.num_batches(config.piece_budget, seed=config.seed, epoch=epoch)

    def batches(self, epoch: int, start: int) -> Iterator[TrainBatch]:
        config = self.config
        return self.dataset.batches(config.piece_budget, seed=config.seed, epoch=epoch, start=start)

    def check(self, batch: TrainBatch) -> None:
        self.loss.check(batch)

    def accumulate(self, batch: TrainBatch) -> tuple[float, int]:
        number, carried = int(batch.labels.sum()), self.carried
        with self.loss.compute():
            self.carried = _last_state(self.model, batch, carried, self.device)
        if self.loss.dtype != torch.float32 and self.device.type == "cpu":
            batch = _filled_up(batch)
        events = batch.events.to(self.device)
        if number == 0:
            return 0.0, 0
        negatives = self.loss.draw()
        self.prepare(events, negatives)
        with self.loss.compute():
            vectors = self.model(events, _first_states(self.model, batch, carried))
        loss = self.loss(vectors, events.items, batch.labels.to(self.device), negatives) * number
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()), number

    def prepare(self, events: Batch, negatives: Negatives | None) -> None:
        """Called before a piece is read, with the items that its loss will be of."""


class Run(Generic[B]):
    """One run: what must be in a checkpoint, and the loop over it."""

    def __init__(
        self,
        task: Task[B],
        model: UserModel,
        config: LoopConfig,
        validate: Validate | None,
        folder: Path | None,
    ) -> None:
        self.task, self.model, self.config = task, model, config
        self.validate, self.folder = validate, folder
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config), lr=config.lr, eps=1e-9, fused=True
        )
        self.position = Position()
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []

    def run(self, resume: bool) -> TrainResult:
        torch.manual_seed(self.config.seed)
        # gradients that somebody left behind must not count
        self.model.zero_grad(set_to_none=True)
        if resume:
            self._resume()
        with deferred_interrupt() as interrupt:
            if self.position.epoch == 0 and self.position.batch == 0:
                self.task.check(next(self.task.batches(0, 0)))
            while self.position.epoch < self.config.epochs and not self._stale():
                self._epoch(interrupt)
                # pressed while the model was validated
                if interrupt():
                    self._stop_for_interrupt()
        if self.best:
            self.model.load_state_dict(self.best)
        self.model.eval()
        position = self.position
        return TrainResult(position.best_epoch, position.best_score, position.epoch, self.history)

    def _epoch(self, interrupt: Callable[[], bool]) -> None:
        position, before = self.position, self.position.labels
        epoch, per_update = position.epoch, self.config.pieces_per_update
        count = self.task.num_batches(epoch)
        began, pending = time.perf_counter(), 0
        self.model.train()
        left = self.task.num_labels - before
        with Progress(f"epoch {epoch + 1}", left, "events") as progress:
            for piece in self.task.batches(epoch, position.batch):
                loss, number = self.task.accumulate(piece)
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
                    # only here: between the pieces of an update there are gradients to lose
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
            score = self._monitored(record)
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
            precision=str(self.task.dtype).removeprefix("torch."),
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
            place = next(self.model.parameters()).device
            self.task.carried = states.to_device(saved.carried, place)
        # as the first batch of the run has decided
        self.task.dtype = getattr(torch, saved.precision)
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


class _NextItemLoss:
    """The loss that the settings ask for, in the precision that they ask for."""

    def __init__(
        self, model: UserModel, dataset: Dataset, config: TrainConfig, device: torch.device
    ) -> None:
        self.model, self.device = model, device
        self.dtype = compute_dtype(config.precision, device)
        self.name = config.loss
        if self.name == "auto":
            self.name = "full" if model.num_items <= config.full_softmax_limit else "sampled"
        self.sampler: NegativeSampler | None = None
        if self.name != "full":
            counts = dataset.item_counts(model.num_items).to(device)
            power = 0.0 if self.name == "nce" else 0.75
            self.sampler = NegativeSampler(counts, config.negatives, power)

    def compute(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def draw(self) -> Negatives | None:
        """The negatives of a piece; None where all items are."""
        return None if self.sampler is None else self.sampler.draw()

    def __call__(
        self, vectors: Tensor, items: Tensor, labels: Tensor, negatives: Negatives | None
    ) -> Tensor:
        if not bool(labels.all()):
            vectors, items = vectors[labels], items[labels]
        if negatives is None:
            head = self.model.item_embeddings()
            vectors = vectors.to(head.weight.dtype)
            return full_softmax(vectors, head, items, dtype=self.dtype)
        # of the catalogue only what the loss is about
        both = torch.cat([items, negatives.items])
        rows, place = torch.unique(both, return_inverse=True)
        head = self.model.embeddings_of(rows)
        vectors = vectors.to(head.weight.dtype)
        items, drawn = place[: items.numel()], place[items.numel() :]
        expected = negatives.target_log_expected[rows]
        negatives = Negatives(drawn, negatives.log_expected, expected)
        if self.name == "nce":
            return nce(vectors, head, items, negatives.items, dtype=self.dtype)
        return sampled_softmax(vectors, head, items, negatives, dtype=self.dtype)

    def check(self, batch: TrainBatch) -> None:
        """Falls back to float32 if narrow products change the loss of a first batch."""
        if self.dtype == torch.float32 or not bool(batch.labels.any()):
            return
        events, labels = batch.events.to(self.device), batch.labels.to(self.device)
        narrow, losses = self.dtype, {}
        self.model.eval()
        for dtype in (narrow, torch.float32):
            self.dtype = dtype
            # only negatives are drawn here, and from the CPU's generator
            with torch.random.fork_rng(devices=[]), torch.no_grad(), self.compute():
                vectors = self.model(events)
                losses[dtype] = float(self(vectors, events.items, labels, self.draw()))
        difference = abs(losses[narrow] - losses[torch.float32])
        self.dtype = narrow if difference <= 1e-2 * losses[torch.float32] else torch.float32
        log.info(
            "first loss %.4f in %s, %.4f in float32: training in %s",
            losses[narrow],
            narrow,
            losses[torch.float32],
            self.dtype,
        )


def parameter_groups(model: UserModel, config: LoopConfig) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, those of an encoder apart, for AdamW."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        last = name.rsplit(".", 1)[-1]
        recurrence = last in model.recurrence_parameters and not config.decay_recurrence
        plain = "bias" in name or "norm" in name
        decay = 0.0 if plain or recurrence else config.weight_decay
        rate = config.encoder_lr if ".encoder." in name else config.lr
        groups.setdefault((rate, decay), []).append(parameter)
    # decayed ones first, as they have always been
    return [
        {"params": parameters, "weight_decay": decay, "full_lr": rate}
        for (rate, decay), parameters in sorted(groups.items(), key=lambda x: x[0], reverse=True)
    ]


def rate_share(done: float, config: LoopConfig) -> float:
    """The share of the learning rate that holds after a share ``done`` of the run."""
    share = min(1.0, (done + 1e-6) / config.warmup) if config.warmup > 0 else 1.0
    if config.schedule == "cosine":
        share *= 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return share


def _as_values(config: Any) -> Any:
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else str(config)


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


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: bfloat16 for ``auto`` only where it is fast."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = _cpu_multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) is True for name in ("avx512_bf16", "amx_bf16", "bf16"))
