"""Full-catalogue evaluation: exactly the calls that serve users, in the order they would happen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import polars as pl
import torch

from everlong.data.arrays import IntArray
from everlong.data.dataset import gather
from everlong.data.events import Events
from everlong.data.split import Targets
from everlong.evaluation import history
from everlong.evaluation.interval import METHOD, Estimate
from everlong.evaluation.metrics import DEFAULT, Metric, estimate, parse_metric, user_means
from everlong.inference.encode import EVENTS_PER_BATCH, Progress, encode_histories
from everlong.inference.filters import holds
from everlong.inference.retriever import Retriever
from everlong.inference.seen import MemorySeen
from everlong.inference.topk import SCORES_PER_BATCH
from everlong.models.batch import Batch
from everlong.models.device import device_of, serving
from everlong.models.state import State, bytes_per_user, take
from everlong.models.user_model import UserModel
from everlong.system.threads import yielding

Seen = Literal["mask", "keep"]

# states of the users ranked together
STATE_BYTES = 1 << 28


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """The rank of every target, and what follows from it.

    Attributes:
        ranks: ``[Q]`` int64, from 1: the place in the list that would be served.
        users: ``[Q]`` int64, user row of each target.
        history_lengths: ``[Q]`` int64, all past events of the user before the target.
        metrics: name to mean over users and bootstrap interval.
        num_items: size of the catalogue ranked.
        seen: ``mask``: items of the fed history and earlier targets cannot be recommended.
        masked_targets: targets that were such an item and so ranked last.
    """

    ranks: IntArray
    users: IntArray
    history_lengths: IntArray
    metrics: Mapping[str, Estimate]
    num_items: int
    seen: Seen
    masked_targets: int

    @property
    def num_targets(self) -> int:
        return self.ranks.size

    @property
    def num_users(self) -> int:
        return np.unique(self.users).size

    def per_user(self) -> pl.DataFrame:
        """One row a user: ``user`` (row), ``targets``, and the user's mean of each metric."""
        users, means = user_means(self.ranks, self.users, self._parsed())
        targets = np.unique(self.users, return_counts=True)[1]
        columns = {name: means[:, i] for i, name in enumerate(self.metrics)}
        return pl.DataFrame({"user": users, "targets": targets, **columns})

    def by_history_length(self) -> pl.DataFrame:
        """One row a bucket and metric: ``history, users, targets, metric, mean, low, high``.

        ``history`` is the range of past events before the target. Buckets without targets are
        left out. A user whose history grows from one bucket into the next counts in both.
        """

        def measure(mask: history.Mask) -> history.Measured:
            users = self.users[mask]
            estimates = estimate(self.ranks[mask], users, self._parsed())
            return history.Measured(np.unique(users).size, users.size, estimates)

        return history.by_history_length(self.history_lengths, "targets", measure)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the single ranks, as plain values for a results file."""
        return {
            "users": self.num_users,
            "targets": self.num_targets,
            "items": self.num_items,
            "seen": self.seen,
            "ties": "lower item row first, as served",
            "masked_targets": self.masked_targets,
            "interval": METHOD,
            "metrics": {name: value._asdict() for name, value in self.metrics.items()},
            "by_history_length": self.by_history_length().to_dicts(),
        }

    def to_json(self) -> str:
        """``as_dict`` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def _parsed(self) -> list[Metric]:
        return [parse_metric(name) for name in self.metrics]


@yielding()
def evaluate(
    model: UserModel,
    events: Events,
    targets: Targets,
    *,
    seen: Seen = "mask",
    metrics: Sequence[Metric | str] = DEFAULT,
    events_per_batch: int = EVENTS_PER_BATCH,
    scores_per_batch: int = SCORES_PER_BATCH,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The evaluation of a model on held-out events, ranked against the full catalogue.

    Each user's history is read into a state. Then, for each target in turn: score from the state
    at the time of the target, rank the target, and step the state by the target.

    Args:
        model: used in eval mode, without gradients; training mode is put back.
        events: the log, item rows being the model's catalogue.
        targets: which events are history and which are targets.
        seen: ``mask`` bars items of the fed history and earlier targets; a target among them
            ranks last and is counted. ``keep`` bars nothing.
        metrics: metrics or their names.
        events_per_batch: most events read at once.
        scores_per_batch: most scores held at once; one user's whole catalogue at least.
        device: where events and scores are put; default where the model is.
        progress: called with the events read or ranked so far and all of them.

    Raises:
        ValueError: if there are no targets, or targets, log and model do not fit each other.
    """
    chosen = [parse_metric(m) if isinstance(m, str) else m for m in metrics]
    _check(model, events, targets, seen, chosen)
    place = device_of(model) if device is None else torch.device(device)
    counts = targets.end - targets.stop
    first = np.cumsum(counts) - counts
    ranks = np.empty(counts.sum(), dtype=np.int64)
    masked = done = 0
    total = int((targets.end - targets.start).sum())
    with serving(model):
        retriever = Retriever(model, scores_per_batch=scores_per_batch)
        run = _Run(retriever, events, seen, events_per_batch, place)
        for rows in _blocks(model, targets, events_per_batch):
            part = Targets(*(values[rows] for values in targets))
            state = run.encode(part, _shifted(progress, done, total))
            done += int((part.stop - part.start).sum())
            for turn, (found, barred) in enumerate(run.turns(part, state)):
                ranks[first[rows[: found.size]] + turn] = found
                masked += barred
                done += found.size
                if progress is not None:
                    progress(done, total)
    users = np.repeat(targets.user, counts)
    # position of each target, minus the user's first event
    positions = np.repeat(targets.stop - first, counts) + np.arange(ranks.size)
    return Evaluation(
        ranks=ranks,
        users=users,
        history_lengths=positions - events.offsets[users],
        metrics=estimate(ranks, users, chosen),
        num_items=model.num_items,
        seen=seen,
        masked_targets=masked,
    )


class _Run(NamedTuple):
    """What stays the same while the targets of many users are ranked."""

    retriever: Retriever
    events: Events
    seen: Seen
    events_per_batch: int
    device: torch.device

    def encode(self, part: Targets, progress: Progress | None) -> State:
        """The states after the fed histories."""
        return encode_histories(
            self.retriever.model,
            self.events,
            part.start,
            part.stop,
            events_per_batch=self.events_per_batch,
            device=self.device,
            progress=progress,
        )

    def turns(self, part: Targets, state: State) -> Iterator[tuple[IntArray, int]]:
        """For the first, second, ... target: its rank for each user who has one, and how many
        were masked. The users of ``part`` are ordered by falling number of targets.
        """
        counts = part.end - part.stop
        active, barred = counts.size, MemorySeen()
        if self.seen == "mask":
            _note(barred, gather(self.events, part.start, part.stop))
        for turn in range(int(counts[0])):
            position = part.stop[:active] + turn
            target = gather(self.events, position, position + 1)
            yield self._rank(state, target, barred)
            active = int(np.count_nonzero(counts > turn + 1))
            if active:
                position = position[:active]
                revealed = gather(self.events, position, position + 1)
                going_on = take(state, torch.arange(active, device=state[0].device))
                state = self.retriever.model.step(revealed.to(self.device), going_on)
                if self.seen == "mask":
                    _note(barred, revealed)

    def _rank(self, state: State, target: Batch, barred: MemorySeen) -> tuple[IntArray, int]:
        """The rank of the target of each user and how many of these items are masked."""
        exclude = barred.rows(np.arange(target.num_users)) if self.seen == "mask" else None
        at = target.times.to(self.device)
        places = self.retriever.places(state, target.items, at=at, exclude=exclude).numpy()
        pairs = zip(exclude or (), target.items.tolist(), strict=False)
        return places, sum(holds(own, item) for own, item in pairs)


def _note(seen: MemorySeen, events: Batch) -> None:
    """Adds the items of events of the users 0, 1, ..."""
    seen.add(np.arange(events.num_users), events.offsets.numpy(), events.items.numpy())


def _blocks(model: UserModel, targets: Targets, events_per_batch: int) -> Iterator[IntArray]:
    """The rows of ``targets`` in blocks whose states fit in memory, most targets first in each."""
    # histories of similar length together
    order = np.argsort(targets.stop - targets.start, kind="stable")
    size = STATE_BYTES // bytes_per_user(model.initial_state(1))
    size = max(1, min(size, events_per_batch))
    counts = targets.end - targets.stop
    for block in range(0, len(order), size):
        rows = order[block : block + size]
        yield rows[np.argsort(-counts[rows], kind="stable")]


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """A progress that counts on from ``before`` towards ``total``."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def _check(
    model: UserModel, events: Events, targets: Targets, seen: str, metrics: Sequence[Metric]
) -> None:
    """Raises ``ValueError`` unless the targets can be ranked by the model."""
    if seen not in get_args(Seen):
        raise ValueError(f"seen is 'mask' or 'keep', received {seen!r}")
    if not metrics:
        raise ValueError("nothing to measure: name at least one metric, such as NDCG@10")
    if targets.user.size == 0:
        raise ValueError(
            "no targets to evaluate: expected at least one user with held-out events, received "
            "none; use a longer log or an earlier cut"
        )
    known = (targets.user >= 0) & (targets.user < events.num_users)
    owner = np.where(known, targets.user, 0)
    wrong = ~known | (targets.start < events.offsets[owner]) | (targets.stop < targets.start)
    wrong |= (targets.end <= targets.stop) | (targets.end > events.offsets[owner + 1])
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            "expected start <= stop < end within the user's own events, received "
            f"{tuple(int(values[row]) for values in targets)} (user, start, stop, end) in row "
            f"{row}; evaluate on the events of the split that the targets come from"
        )
    highest = int(events.items.max())
    if highest >= model.num_items:
        raise ValueError(
            f"the model knows items 0 .. {model.num_items - 1}, the log has item row {highest}; "
            "evaluate on the events of the split that the model was fitted on"
        )
