"""The run of the ``fit`` command: checkpoints and plots in a run folder, baselines."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from everlong.evaluation.report import comparison, metrics_text
from everlong.data.events import Events
from everlong.data.ids import IdMap
from everlong.data.items import ItemTable
from everlong.data.split import Protocol
from everlong.evaluation.plots import plot_learning_curve, plot_quality
from everlong.models.registry import load_model_class
from everlong.recommender.fit import choose_protocol, fit
from everlong.recommender.folder import check_target
from everlong.recommender.recommender import Recommender
from everlong.system.interrupt import Interrupted
from everlong.system.settings import load_settings
from everlong.training.checkpoint import FILE as CHECKPOINT
from everlong.training.checkpoint import LOG, Checkpoint
from everlong.training.settings import TrainConfig

log = logging.getLogger(__name__)

BASELINES = ("popularity", "recent_popularity", "markov")
"""Models without gradient descent, which are fitted in seconds for comparison."""


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """The arguments of the ``fit`` command.

    Attributes:
        model: name of a built-in model.
        out: the model folder.
        protocol: name of a protocol, None for what the log allows.
        split: settings of the protocol to change.
        architecture: settings of the model, as text or values.
        training: settings of training, as text or values.
        device: where to train.
        resume: continue from the checkpoint.
        baselines: also fit and measure ``BASELINES``.
    """

    model: str
    out: Path
    protocol: str | None = None
    split: Mapping[str, object] = field(default_factory=dict)
    architecture: Mapping[str, object] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)
    device: str = "cpu"
    resume: bool = False
    baselines: bool = False

    @property
    def run_folder(self) -> Path:
        """The folder of checkpoints, training log and plots, beside the model folder."""
        return self.out.with_name(self.out.name + ".run")


def run_fit(
    plan: FitPlan,
    open_log: Callable[[], Events],
    read_table: Callable[[IdMap], ItemTable] | None = None,
    *,
    say: Callable[[str], None],
) -> Recommender:
    """Fits and saves a recommender, and passes its results to ``say``.

    Args:
        plan: what to do.
        open_log: reads the log; called after everything that can be checked without it.
        read_table: reads what is known of the items of the log, if anything is.
        say: takes lines for the user.

    Raises:
        ValueError: for settings that do not exist, a log that cannot be used, or an unfinished
            run in the way.
        Interrupted: after Ctrl-C, once the checkpoint is written.
    """
    load_model_class(plan.model)
    config = load_settings(TrainConfig, plan.training)
    check_target(plan.out)
    _check_run(plan)
    events = open_log()
    protocol = choose_protocol(plan.protocol, events)
    protocol = load_settings(Protocol, {**protocol.model_dump(), **plan.split})
    try:
        recommender = fit(
            events,
            plan.model,
            items=None if read_table is None else read_table(events.item_ids),
            architecture=plan.architecture,
            training=config,
            protocol=protocol,
            folder=plan.run_folder,
            resume=plan.resume,
            device=plan.device,
        )
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
    _tell_results(plan, recommender, events, protocol, say)
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


def _tell_results(
    plan: FitPlan,
    recommender: Recommender,
    events: Events,
    protocol: Protocol,
    say: Callable[[str], None],
) -> None:
    for part, result in recommender.origin.metrics.items():
        say(f"\n{part}: {metrics_text(result)}")
    if not plan.baselines or "test" not in recommender.origin.metrics:
        return
    fitted = {plan.model: recommender}
    for name in BASELINES:
        if name != plan.model:
            fitted[name] = fit(events, name, protocol=protocol, device=plan.device)
    say("\n" + comparison({name: _row(model) for name, model in fitted.items()}))


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
            plot_learning_curve(history, folder / "learning_curve.png")
        test = recommender.origin.metrics.get("test")
        if test is not None:
            plot_quality({plan.model: test}, folder / "quality_by_history.png")
    except ImportError as error:
        log.info("no plots: %s", error)
