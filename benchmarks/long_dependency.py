"""Memory of models: scores against the distance between a cue and its answer.

    python benchmarks/long_dependency.py                 # all models, two seeds
    python benchmarks/long_dependency.py --seeds 1

The log is ``long_dependency``: two items follow an ``ask`` item, each determined by a cue exactly
``distance`` events before it, with random items between; then a second episode has other cues. The
test target is the last event of users outside training, after all events before it. The labels of
all models are the answers of the training users and no other events: the others are random, and
with two answers in a thousand labels training would be slow. Training begins with short distances.
No
setting was chosen on these logs: settings were tuned on the log of seed 0, which is in no result.

Some distances are never trained; they measure generalisation to other distances.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import polars as pl
import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from everlong.data.arrays import IntArray
from everlong.data.dataset import Dataset
from everlong.data.events import read_events
from everlong.data.split import PAPER, Split, Targets, TrainSegments, split
from everlong.data.synthetic import SyntheticLog, long_dependency
from everlong.evaluation.next_item import evaluate
from everlong.models.hstu import HSTU, HSTUConfig
from everlong.models.lru import LRU, LRUConfig
from everlong.models.persrec import PerSRec, PerSRecConfig
from everlong.models.sasrec import SASRec, SASRecConfig
from everlong.models.state import bytes_per_user
from everlong.models.user_model import UserModel
from everlong.training.next_item import train
from everlong.training.settings import TrainConfig
from record import RESULTS, write_result

# repeats stay, so that distances are exact
PROTOCOL = PAPER.replace({"name": "whole", "window": None, "drop_immediate_repeats": False})
METRICS = ("HitRate@1", "NDCG@10")
WINDOW, LONGEST, GROUPS = 200, 4_004, 20
CUES, FILLERS = 8, 20

# users at each distance, in hundreds; the last ones are the test
USERS = {30: 17, 60: 2, 100: 17, 300: 8, 550: 2, 1000: 4, 2000: 1}
UNTRAINED = (60, 550, 2000)
TEST_USERS = 200


class Stage(NamedTuple):
    """A stage of the curriculum: its distances, users for each distance, and epochs."""

    distances: tuple[int, ...]
    users: int
    epochs: int
    lr: float


STAGES = (
    Stage((30, 100), users=1500, epochs=3, lr=3e-3),
    Stage((100, 300), users=600, epochs=2, lr=3e-3),
    Stage((30, 100, 300, 1000), users=200, epochs=8, lr=3e-3),
)


class Entry(NamedTuple):
    """A model of the comparison.

    Attributes:
        window: the most events that it can see, None = all.
        control: shows what does not work; one seed is enough.
    """

    config: LRUConfig | SASRecConfig | HSTUConfig | PerSRecConfig
    window: int | None
    control: bool = False


def entries(num_items: int) -> dict[str, Entry]:
    """The models by name, all without dropout."""
    near = LRUConfig(num_items=num_items, layers=1, dropout=0.0, recurrence_dropout=0.0)
    far = replace(near, min_radius=0.99, max_radius=0.9999)
    window = SASRecConfig(num_items=num_items, window=WINDOW, dropout=0.0)
    whole = HSTUConfig(num_items=num_items, window=LONGEST, dropout=0.0)
    stream = PerSRecConfig(
        num_items=num_items, dropout=0.0, segment=WINDOW // 2, keep=WINDOW // 2, groups=GROUPS
    )
    return {
        "lru, radii 0.99 to 0.9999": Entry(far, None),
        f"sasrec, window {WINDOW}": Entry(window, WINDOW),
        "hstu, whole history": Entry(whole, None),
        f"hstu, window {WINDOW}": Entry(replace(whole, window=WINDOW), None),
        f"persrec, {WINDOW} events and {GROUPS} summaries": Entry(stream, None),
        f"persrec, {WINDOW} events and 1 summary": Entry(replace(stream, groups=1), None),
        "lru, radii 0.8 to 0.99 (published)": Entry(near, None, control=True),
    }


def main(
    seeds: Annotated[int, typer.Option(help="how many logs and models")] = 2,
    only: Annotated[
        str, typer.Option(help="models whose name contains this; nothing is written")
    ] = "",
) -> None:
    """Trains and tests all models; writes results/long_dependency.json and .png."""
    # sums in one order, so that the same seed gives the same figures on any number of cores
    torch.set_num_threads(1)
    runs = []
    for seed in range(1, seeds + 1):
        case = make_case(seed)
        for name, entry in entries(case.parts.events.num_items).items():
            if (entry.control and seed > 1) or only not in name:
                continue
            runs.append({"model": name, "seed": seed, **run(entry, case, seed)})
            print(name, "seed", seed, runs[-1]["seconds"], "s", flush=True)
            for row in runs[-1]["by_distance"]:
                print("   ", row, flush=True)
    if only:
        return
    log = case.log
    figures = {
        "protocol": PROTOCOL.model_dump(mode="json"),
        "labels": "all answers of the training users",
        "test": "the last answer of other users",
        "stages": [stage._asdict() for stage in STAGES],
        "untrained_distances": UNTRAINED,
        "items": case.parts.events.num_items,
        "best": {metric: log.best[metric] for metric in METRICS},
        "chance": {metric: log.best_without_cue[metric] for metric in METRICS},
        "summary": summary(runs),
        "runs": runs,
    }
    print("written to", write_result("long_dependency", figures))
    plot(figures, RESULTS / "long_dependency.png")


@dataclass(frozen=True)
class Case:
    """A log, split, and the distance ``[U]`` of every user."""

    log: SyntheticLog
    parts: Split
    distance: IntArray


def make_case(seed: int) -> Case:
    """The log of a seed."""
    order = [distance for distance, hundreds in USERS.items() for _ in range(hundreds)]
    log = long_dependency(
        100 * len(order),
        distances=order,
        num_cues=CUES,
        num_fillers=FILLERS,
        seed=seed,
    )
    events = read_events(log.frame)
    # user u of the log has the distance u % len(order)
    number = events.user_ids.ids(np.arange(events.num_users)).to_numpy()
    return Case(
        log, split(events, PROTOCOL), np.asarray(order, dtype=np.int64)[number % len(order)]
    )


def run(entry: Entry, case: Case, seed: int) -> dict[str, Any]:
    """One model trained and tested."""
    model = make_model(entry.config, seed)
    began = time.perf_counter()
    losses: list[float] = []
    for number, stage in enumerate(STAGES):
        segments = answers(case, stage, entry.window)
        # the order of the histories differs between the stages
        settings = TrainConfig(
            epochs=stage.epochs, lr=stage.lr, precision="float32", seed=seed + 100 * number
        )
        result = train(model, Dataset(case.parts.events, segments), settings)
        losses += [record["loss"] for record in result.history]
    return {
        "config": asdict(entry.config),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes_per_user": bytes_per_user(model.initial_state(1)),
        "seconds": round(time.perf_counter() - began, 1),
        "training_losses": losses,
        "fingerprint": case.parts.events.fingerprint,
        "by_distance": by_distance(model, case),
    }


def make_model(config: Any, seed: int) -> UserModel:
    """A fresh model, initialised by a seed."""
    models: dict[type, type[UserModel]] = {
        LRUConfig: LRU,
        SASRecConfig: SASRec,
        HSTUConfig: HSTU,
        PerSRecConfig: PerSRec,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models[type(config)](config)


def answers(case: Case, stage: Stage, window: int | None) -> TrainSegments:
    """All answers of a stage's users as labels, and what precedes them in the history.

    There are two segments a user, one for each episode, both from the beginning of the history.
    A model with a window gets no more than that of events, all in one window.
    """
    chosen = np.concatenate([users_at(case, d)[: stage.users] for d in stage.distances])
    users = np.tile(chosen, 2)
    first, stop = case.parts.events.offsets[users], case.parts.events.offsets[users + 1]
    half = len(chosen)
    stop[:half] -= case.distance[chosen] + 2
    start = first if window is None else np.maximum(first, stop - window)
    return TrainSegments(users, start, stop, stop - 2)


def users_at(case: Case, distance: int) -> IntArray:
    """The users at a distance, in order."""
    return np.flatnonzero(case.distance == distance)


def by_distance(model: UserModel, case: Case) -> list[dict[str, Any]]:
    """Means of the test scores at each distance, after the whole history."""
    targets = case.parts.test
    users = np.concatenate([users_at(case, distance)[-TEST_USERS:] for distance in USERS])
    rows = np.flatnonzero(np.isin(targets.user, users))
    chosen = Targets(*(values[rows] for values in targets))
    found = evaluate(model, case.parts.events, chosen, seen=PROTOCOL.seen, metrics=METRICS)
    table = found.per_user()
    distance = pl.Series("distance", case.distance[table["user"].to_numpy()])
    means = (
        table.with_columns(distance)
        .group_by("distance")
        .agg(pl.len().alias("users"), *(pl.col(metric).mean() for metric in METRICS))
        .sort("distance")
    )
    return means.to_dicts()


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a model: HitRate@1 at each distance and seconds to train, means over seeds."""
    rows = []
    for name in dict.fromkeys(run["model"] for run in runs):
        mine = [run for run in runs if run["model"] == name]
        scores: dict[str, list[float]] = {}
        for row in (row for run in mine for row in run["by_distance"]):
            scores.setdefault(str(row["distance"]), []).append(row["HitRate@1"])
        rows.append(
            {
                "model": name,
                "bytes_per_user": mine[0]["bytes_per_user"],
                "seeds": len(mine),
                "seconds": round(statistics.mean(run["seconds"] for run in mine), 1),
                "HitRate@1": {d: round(statistics.mean(values), 4) for d, values in scores.items()},
                "lowest": {d: round(min(values), 4) for d, values in scores.items()},
            }
        )
    return rows


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG of HitRate@1 against the distance; hollow marks were never trained."""
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = ("#1f5fa8", "#c8642a", "#2a7d4f", "#8fc7a6", "#6b3fa0", "#b79bd6", "#7fb0de")
    for row, colour in zip(figures["summary"], colours, strict=True):
        trained = {int(d): s for d, s in row["HitRate@1"].items() if int(d) not in UNTRAINED}
        other = {int(d): s for d, s in row["HitRate@1"].items() if int(d) in UNTRAINED}
        axes.plot(list(trained), list(trained.values()), "o-", color=colour, label=row["model"])
        axes.plot(list(other), list(other.values()), "o", color=colour, markerfacecolor="none")
    chance = figures["chance"]["HitRate@1"]
    axes.axhline(chance, color="#8a8a8a", linestyle=":", label=f"without the cue, {chance:.2f}")
    axes.axvline(WINDOW, color="#c8642a", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xticks(list(USERS), [str(distance) for distance in USERS])
    axes.minorticks_off()
    axes.set_ylim(0, 1.04)
    axes.grid(alpha=0.3)
    axes.set(xlabel="events between the cue and its answer", ylabel="HitRate@1")
    axes.set_title("What is remembered; hollow: distances without training")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, format="png")


if __name__ == "__main__":
    typer.run(main)
