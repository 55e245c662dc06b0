"""The demonstration: training, evaluation, updates and storage on a synthetic log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl

from everlong.evaluation.report import columns, comparison
from everlong.data.events import Events, read_events
from everlong.data.split import PAPER
from everlong.data.synthetic import SyntheticLog, demo_log
from everlong.evaluation.plots import plot_cost, plot_quality
from everlong.recommender.fit import fit
from everlong.recommender.recommender import Recommender, load

log = logging.getLogger(__name__)

Say = Callable[[str], None]

SHOWN = ("NDCG@10", "HitRate@10")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A model of the comparison.

    Attributes:
        label: its name in the table.
        model: the name of a built-in model.
        architecture: settings of the model.
        training: settings of training, without the seed.
    """

    label: str
    model: str
    architecture: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The settings of a demonstration.

    Attributes:
        users: number of users of the log.
        ours: the model with a state of fixed size.
        others: the models for comparison.
    """

    users: int
    ours: Contender
    others: tuple[Contender, ...]


LENGTHS = (10, 1_000, 100_000)
FAR_FUTURE = 2_000_000_000  # 2033
REPEATS = 21

COUNTERS = (
    Contender(label="popularity", model="popularity"),
    Contender(label="markov", model="markov"),
)

DEMO = Demo(
    users=1500,
    ours=Contender(
        label="lru (whole history)",
        model="lru",
        # the dependency is a whole cycle long: slow decays, and little dropout
        architecture=MappingProxyType(
            {
                "min_radius": 0.9,
                "max_radius": 0.999,
                "dropout": 0.05,
                "recurrence_dropout": 0.05,
            }
        ),
        training=MappingProxyType(
            {
                "epochs": 20,
                "batch_events": 2048,
                "lr": 0.005,
                "schedule": "cosine",
                "warmup": 0.05,
                "weight_decay": 0.0,
                "validate_every": 4,
            }
        ),
    ),
    others=(
        *COUNTERS,
        Contender(
            label="sasrec (last 20 events)",
            model="sasrec",
            architecture=MappingProxyType({"window": 20}),
            training=MappingProxyType(
                {
                    "epochs": 8,
                    "batch_events": 4096,
                    "lr": 0.003,
                    "schedule": "cosine",
                    "validate_every": 4,
                }
            ),
        ),
    ),
)


def run_demo(plan: Demo, out: Path, *, seed: int, say: Say) -> Recommender:
    """Runs the demonstration, passes its report to ``say`` and returns the recommender.

    Args:
        plan: the settings.
        out: the folder for the model and the plots.
        seed: the random seed of the log and of training.
        say: prints lines of the report.

    Raises:
        ValueError: if a file is at ``out``.
    """
    began = time.monotonic()
    made = demo_log(seed, num_users=plan.users)
    events = read_events(made.frame, time_unit="s")
    say(f"1. A log.  {made.description}\n")
    recommender = _compare(plan, made, events, out, seed=seed, say=say)
    _recommend_and_update(recommender, made, say)
    _show_cost(recommender, out, say)
    _save_and_load(recommender, made, out / "model", say)
    say(f"\nDone in {time.monotonic() - began:.0f} s; model and plots are in {out}.")
    return recommender


def _compare(
    plan: Demo, made: SyntheticLog, events: Events, out: Path, *, seed: int, say: Say
) -> Recommender:
    """Trains all models and prints the comparison; returns the recommender of ``plan.ours``."""
    say("2. Training and testing: the last event of every user, ranked among all items.\n")
    fitted = {}
    for contender in (*plan.others, plan.ours):
        log.info("fitting %s", contender.label)
        fitted[contender.label] = fit(
            events,
            contender.model,
            architecture=contender.architecture,
            training={**contender.training, "seed": seed},
            protocol=PAPER,
        )
    tests = {label: found.origin.metrics["test"] for label, found in fitted.items()}
    rows = {
        label: (
            {name: value["mean"] for name, value in tests[label]["metrics"].items()},
            f"{found.bytes_per_user.state:,}",
        )
        for label, found in fitted.items()
    }
    rows["best possible, blind to the past evenings"] = (made.best_without_cue, "")
    rows["best possible"] = (made.best, "")
    say(comparison(rows, SHOWN))
    out.mkdir(parents=True, exist_ok=True)
    _draw(lambda: plot_quality(tests, out / "quality_by_history.png"))
    return fitted[plan.ours.label]


def _recommend_and_update(recommender: Recommender, made: SyntheticLog, say: Say) -> None:
    """Prints recommendations for a user before and after new events."""
    user = made.frame["user_id"][-1]
    before = recommender.recommend([user], k=5)
    size = recommender.bytes_per_user.state
    # the user interacts with the first recommendations, an hour after the end of the log
    newest = int(made.frame["timestamp"].to_numpy().max())
    report = recommender.update(_events(user, before["item_id"].to_list()[:3], newest + 3600))
    after = recommender.recommend([user], k=5)
    say(f"\n3. Recommendations for user {user}, before and after {report.events} new events.\n")
    both = zip(before["item_id"], after["item_id"], strict=True)
    say(
        columns(
            ("rank", "before", "after"), [(str(n), *pair) for n, pair in enumerate(both, start=1)]
        )
    )
    say(f"\nBytes of the state: {size:,} before, {recommender.bytes_per_user.state:,} after.")
    if before["item_id"].equals(after["item_id"]) or recommender.bytes_per_user.state != size:
        raise RuntimeError("expected other recommendations from a state of the same size")


def _show_cost(recommender: Recommender, out: Path, say: Say) -> None:
    """Prints the cost of an event after short and long histories."""
    items = recommender.item_ids.ids(range(len(recommender.item_ids))).to_list()
    points = []
    for length in LENGTHS:
        # the same model without users
        fresh = Recommender(recommender.model, recommender.item_ids, recommender.origin)
        history = (items * (length // len(items) + 1))[:length]
        fresh.update(_events("user", history, FAR_FUTURE))
        points.append((length, fresh.bytes_per_user.state, _seconds_an_event(fresh, items[0], length)))
    say("\n4. One more event, after histories of different length.\n")
    rows = [(f"{length:,}", f"{size:,}", f"{1e3 * s:.1f}") for length, size, s in points]
    say(columns(("events before", "bytes of the state", "ms for one more"), rows))
    line = [(length, 1e3 * seconds) for length, _, seconds in points]
    path = out / "cost_by_history.png"
    _draw(lambda: plot_cost({"one more event": line}, path, label="milliseconds per event"))


def _seconds_an_event(recommender: Recommender, item: str, length: int) -> float:
    """The median duration of ``update`` with one event."""
    times = []
    for repeat in range(REPEATS):
        event = _events("user", [item], FAR_FUTURE + length + repeat)
        began = time.perf_counter()
        recommender.update(event)
        times.append(time.perf_counter() - began)
    return sorted(times)[REPEATS // 2]


def _save_and_load(recommender: Recommender, made: SyntheticLog, folder: Path, say: Say) -> None:
    """Saves and loads the model with its users, and compares the recommendations."""
    users = made.frame["user_id"].unique().sort()[:50]
    recommender.save(folder)
    if not load(folder).recommend(users).equals(recommender.recommend(users)):
        raise RuntimeError(f"expected equal recommendations from {folder}")
    say(f"\n5. Saved in {folder}, loaded again: the same recommendations for {len(users)} users.")


def _events(user: object, items: Sequence[object], first_time: int) -> Events:
    """Events of one user, one second apart."""
    times = range(first_time, first_time + len(items))
    frame = pl.DataFrame({"user_id": [user] * len(items), "item_id": items, "timestamp": times})
    return read_events(frame, time_unit="s")


def _draw(draw: Callable[[], None]) -> None:
    try:
        draw()
    except ImportError as error:
        log.info("no plot: %s", error)
