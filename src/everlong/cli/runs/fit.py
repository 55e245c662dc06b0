"""The run of the ``fit`` command: checkpoints and plots in a run folder, baselines."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from everlong.evaluation.report import comparison, metrics_text, ranking_text
from everlong.data.events import Events
from everlong.data.ids import IdMap
from everlong.data.items import ItemTable
from everlong.data.split import Protocol
from everlong.evaluation.plots import plot_learning_curve, plot_quality
from everlong.models.registry import load_model_class
from everlong.recommender.fit import choose_protocol, fit
from everlong.recommender.fit_ranker import RANKING, Asked, fit_ranker
from everlong.recommender.folder import check_target
from everlong.recommender.recipe import initialised
from everlong.recommender.recommender import Recommender
from everlong.system.interrupt import Interrupted
from everlong.system.settings import load_settings
from everlong.training.checkpoint import FILE as CHECKPOINT
from everlong.training.checkpoint import LOG, Checkpoint
from everlong.training.settings import RankerTrainConfig, TrainConfig

log = logging.getLogger(__name__)

ReadTable = Callable[[IdMap], ItemTable]

BASELINES = ("popularity", "recent_popularity", "markov")
"""Models without gradient descent, which are fitted in seconds for comparison."""


@dataclass(frozen=True, kw_only=True)
class FitPlan(ABC):
    """The arguments of the ``fit`` command, whatever the model learns.

    Attributes:
        model: name of a model.
        out: the model folder.
        architecture: settings of the model, as text or values.
        training: settings of training, as text or values.
        device: where to train.
        resume: continue from the checkpoint.
    """

    model: str
    out: Path
    architecture: Mapping[str, object] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)
    device: str = "cpu"
    resume: bool = False

    shown: ClassVar[str] = "NDCG@10"
    """The metric of validation that is plotted."""

    @property
    def run_folder(self) -> Path:
        """The folder of checkpoints, training log and plots, beside the model folder."""
        return self.out.with_name(self.out.name + ".run")

    @abstractmethod
    def check(self) -> None:
        """Raises ``ValueError`` for whatever is wrong and can be found without the log."""

    @abstractmethod
    def fit(self, events: Events, read_table: ReadTable | None) -> Recommender:
        """Fits a recommender with checkpoints in ``run_folder``."""

    @abstractmethod
    def results(self, recommender: Recommender, events: Events) -> Iterator[str]:
        """The results in words."""


@dataclass(frozen=True, kw_only=True)
class NextItemPlan(FitPlan):
    """Fit a model that predicts the next item.

    Attributes:
        protocol: name of a protocol, None for what the log allows.
        split: settings of the protocol to change.
        baselines: also fit and measure ``BASELINES``.
    """

    protocol: str | None = None
    split: Mapping[str, object] = field(default_factory=dict)
    baselines: bool = False

    def check(self) -> None:
        load_model_class(self.model)
        load_settings(TrainConfig, self.training)

    def fit(self, events: Events, read_table: ReadTable | None) -> Recommender:
        return fit(
            events,
            self.model,
            items=None if read_table is None else read_table(events.item_ids),
            architecture=self.architecture,
            training=self.training,
            protocol=self._protocol(events),
            folder=self.run_folder,
            resume=self.resume,
            device=self.device,
        )

    def _protocol(self, events: Events) -> Protocol:
        protocol = choose_protocol(self.protocol, events)
        return load_settings(Protocol, {**protocol.model_dump(), **self.split})

    def results(self, recommender: Recommender, events: Events) -> Iterator[str]:
        for part, result in recommender.origin.metrics.items():
            yield f"\n{part}: {metrics_text(result)}"
        if not self.baselines or "test" not in recommender.origin.metrics:
            return
        fitted = {self.model: recommender}
        for name in BASELINES:
            if name != self.model:
                protocol = self._protocol(events)
                fitted[name] = fit(events, name, protocol=protocol, device=self.device)
        yield "\n" + comparison({name: _row(model) for name, model in fitted.items()})


@dataclass(frozen=True, kw_only=True)
class RankPlan(FitPlan):
    """Fit a ranker behind a recommender.

    Attributes:
        retriever: loads the recommender.
        asked: how the requests of the log are found.
        candidates: items that are retrieved for the ranker.
    """

    shown: ClassVar[str] = "GAUC"

    retriever: Callable[[], Recommender]
    asked: Asked
    candidates: int

    def check(self) -> None:
        load_settings(RankerTrainConfig, self.training)
        self.event_fields()

    def event_fields(self) -> tuple[str, ...]:
        """The fields of events that the ranker reads and learns from.

        Raises:
            ValueError: if there is no such ranker, or a setting is unknown or impossible.
        """
        kind = load_model_class(self.model, "rank")
        ranker = initialised(kind, self.architecture, num_items=1, seed=0)
        named = (self.asked.label, self.asked.request, *ranker.event_fields)
        return tuple(dict.fromkeys(name for name in named if name is not None))

    def fit(self, events: Events, read_table: ReadTable | None) -> Recommender:
        retriever = self.retriever()
        return fit_ranker(
            retriever,
            events,
            self.model,
            **self.asked.model_dump(),
            items=None if read_table is None else read_table(retriever.item_ids),
            architecture=self.architecture,
            training=self.training,
            candidates=self.candidates,
            folder=self.run_folder,
            resume=self.resume,
            device=self.device,
        )

    def results(self, recommender: Recommender, events: Events) -> Iterator[str]:
        yield f"\n{RANKING}: {ranking_text(recommender.origin.metrics[RANKING])}"


def run_fit(
    plan: FitPlan,
    open_log: Callable[[], Events],
    read_table: ReadTable | None = None,
    *,
    say: Callable[[str], None],
) -> Recommender:
    """Fits and saves a recommender, and passes its results to ``say``.

    Args:
        plan: what to do.
        open_log: reads the log; called after everything that can be checked without it.
        read_table: reads what is known of the items of a catalogue, if anything is.
        say: takes lines for the user.

    Raises:
        ValueError: for settings that do not exist, a log that cannot be used, or an unfinished
            run in the way.
        Interrupted: after Ctrl-C, once the checkpoint is written.
    """
    plan.check()
    check_target(plan.out)
    _check_run(plan)
    events = open_log()
    try:
        recommender = plan.fit(events, read_table)
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}: the same command with --resume continues it") from None
    except KeyboardInterrupt:
        if Checkpoint.exists(plan.run_folder):
            raise Interrupted(
                f"a checkpoint is in {plan.run_folder}: the same command with --resume continues it"
            ) from None
        raise
    recommender.save(plan.out)
    # the model is saved, so the checkpoint is not needed any more
    (plan.run_folder / CHECKPOINT).unlink(missing_ok=True)
    say(f"{recommender!r}, saved in {plan.out}")
    for text in plan.results(recommender, events):
        say(text)
    _draw(plan, recommender)
    return recommender


def _check_run(plan: FitPlan) -> None:
    if Checkpoint.exists(plan.run_folder) and not plan.resume:
        raise ValueError(
            f"an unfinished run is in {plan.run_folder}: add --resume to continue it, or remove "
            "that folder to start again"
        )
    if plan.resume and not Checkpoint.exists(plan.run_folder):
        log.info("no checkpoint in %s: starting from the beginning", plan.run_folder)


def _row(recommender: Recommender) -> tuple[dict[str, float], str]:
    values = recommender.origin.metrics["test"]["metrics"]
    means = {name: value["mean"] for name, value in values.items()}
    return means, f"{recommender.bytes_per_user.state:,}"


def _draw(plan: FitPlan, recommender: Recommender) -> None:
    """Writes plots to the run folder, or logs how to install the extra ``plot``."""
    folder = plan.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if (folder / LOG).is_file():
            history = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
            plot_learning_curve(history, folder / "learning_curve.png", metric=plan.shown)
        test = recommender.origin.metrics.get("test")
        if test is not None and plan.shown in test["metrics"]:
            plot_quality({plan.model: test}, folder / "quality_by_history.png")
    except ImportError as error:
        log.info("no plots: %s", error)
