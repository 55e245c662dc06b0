"""Quality on real logs: one run, or all runs of the results table.

    python benchmarks/quality.py run ml-1m paper lru --seed 0
    python benchmarks/quality.py all            # every run that has no result yet

The logs are read from ``../shared/data`` beside the repository, or from ``--data-dir``; they are
not part of the project. Settings were chosen on validation; ``search`` records how. Each run writes
``results/quality/<data>-<protocol>-<model>-<seed>.json``.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import everlong
from everlong.data.events import Events, read_events
from everlong.data.split import Protocol
from everlong.recommender.fit import PROTOCOLS

DATA_DIR = Path(__file__).parents[2] / "shared" / "data"
RESULTS = Path(__file__).parent / "results" / "quality"
SEEDS = (0, 1, 2)
COUNTING = ("popularity", "recent_popularity", "markov")
LEARNING = ("lru", "sasrec", "gru4rec")
app = typer.Typer(help=__doc__, add_completion=False)


class Log(NamedTuple):
    """How a log is read and split."""

    timestamp: str
    ties: str
    window: int  # of the paper protocol: 200, or 50 for the Amazon sets
    seen: str  # whether seen items are masked; not where people buy the same things again


LOGS = {
    "ml-1m": Log("order", "stable", 200, "mask"),
    "amazon-video-games": Log("order", "stable", 50, "mask"),
    "ml-latest-small": Log("timestamp", "random", 200, "mask"),
    "ml-100k": Log("timestamp", "random", 200, "mask"),
    "online-retail": Log("timestamp", "random", 200, "keep"),
}
TABLE = [
    ("ml-1m", "paper"),
    ("amazon-video-games", "paper"),
    ("ml-latest-small", "paper"),
    ("ml-latest-small", "temporal"),
    ("ml-100k", "paper"),
    ("ml-100k", "temporal"),
    ("online-retail", "temporal"),
]


RECIPES = Path(__file__).parent / "recipes.json"
DROPOUTS = (0.2, 0.4, 0.6)


class Recipe(NamedTuple):
    """Settings that differ from the defaults, chosen on validation."""

    architecture: dict[str, Any]
    training: dict[str, Any]


def recipe(data: str, protocol: str, model: str) -> Recipe:
    """The chosen settings of a run."""
    found = json.loads(RECIPES.read_text()).get(f"{data}-{protocol}-{model}", {})
    return Recipe(found.get("architecture", {}), found.get("training", {}))


def dropout_settings(model: str, dropout: float) -> dict[str, float]:
    """Architecture settings with one dropout everywhere."""
    if model == "lru":
        return {"dropout": dropout, "recurrence_dropout": dropout}
    return {"dropout": dropout}


def read_log(data: str, data_dir: Path, seed: int) -> Events:
    """Reads a log; random ties have one seed for all runs, so that their targets are equal."""
    log = LOGS[data]
    path = data_dir / data / "interactions.parquet"
    return read_events(path, timestamp=log.timestamp, ties=log.ties, seed=0)  # type: ignore[arg-type]


def protocol_for(data: str, name: str) -> Protocol:
    log = LOGS[data]
    changes: dict[str, object] = {"seen": log.seen}
    if name == "paper":
        changes["window"] = log.window
    return PROTOCOLS[name].replace(changes)


@app.command()
def run(
    data: str,
    protocol: str,
    model: str,
    seed: int = 0,
    data_dir: Path = DATA_DIR,
    architecture: Annotated[str, typer.Option(help="JSON of changes, for a search")] = "{}",
    training: Annotated[str, typer.Option(help="JSON of changes, for a search")] = "{}",
    name: Annotated[str, typer.Option(help="result file, default by the settings")] = "",
) -> None:
    """Trains and evaluates one model on one log."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    chosen = recipe(data, protocol, model)
    settings = {**chosen.training, "seed": seed, **json.loads(training)}
    shape = {**chosen.architecture, **json.loads(architecture)}
    events = read_log(data, data_dir, seed)
    name = name or f"{data}-{protocol}-{model}-{seed}"
    began = time.perf_counter()
    recommender = everlong.fit(
        events,
        model,
        architecture=shape,
        training=settings,
        protocol=protocol_for(data, protocol),
        folder=Path("runs") / "quality" / name,
        resume=True,
    )
    record = {
        "data": data,
        "model": model,
        "seed": seed,
        "fingerprint": events.fingerprint,
        "ties": events.facts.ties,
        "architecture": shape,
        "training": settings,
        "state_bytes": recommender.bytes_per_user.state,
        "seconds": round(time.perf_counter() - began, 1),
        **{part: shorten(result) for part, result in recommender.origin.metrics.items()},
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    for part, result in recommender.origin.metrics.items():
        means = {m: round(result["metrics"][m]["mean"], 5) for m in ("NDCG@10", "Recall@10")}
        print(name, part, means, "best epoch", result["best_epoch"], flush=True)


@app.command()
def search(data: str, protocol: str, model: str, data_dir: Path = DATA_DIR) -> None:
    """Tries the dropouts on validation and keeps the best in ``recipes.json``."""
    scores = {}
    for dropout in DROPOUTS:
        name = f"search/{data}-{protocol}-{model}-{dropout}"
        shape = json.dumps(dropout_settings(model, dropout))
        run(data, protocol, model, 0, data_dir, shape, "{}", name)
        found = json.loads((RESULTS / f"{name}.json").read_text())
        scores[dropout] = found["validation"]["metrics"]["NDCG@10"]["mean"]
    best = max(scores, key=lambda dropout: scores[dropout])
    recipes = json.loads(RECIPES.read_text())
    entry = recipes.setdefault(f"{data}-{protocol}-{model}", {})
    entry["architecture"] = {**entry.get("architecture", {}), **dropout_settings(model, best)}
    entry["validation NDCG@10 by dropout"] = scores
    RECIPES.write_text(json.dumps(recipes, indent=1) + "\n")
    # the run with the chosen settings is the first seed's result
    chosen = RESULTS / f"search/{data}-{protocol}-{model}-{best}.json"
    chosen.replace(RESULTS / f"{data}-{protocol}-{model}-0.json")


@app.command("all")
def run_all(data_dir: Path = DATA_DIR, only: str = "", models: str = "") -> None:
    """Runs everything without a result."""
    for data, protocol in TABLE:
        for model in (*COUNTING, *LEARNING):
            for seed in SEEDS if model in LEARNING else SEEDS[:1]:
                done = RESULTS / f"{data}-{protocol}-{model}-{seed}.json"
                wanted = only in f"{data}-{protocol}" and (not models or model in models.split(","))
                if wanted and not done.exists():
                    run(data, protocol, model, seed, data_dir, "{}", "{}", "")


def shorten(result: dict[str, Any]) -> dict[str, Any]:
    """A result with only two metrics by history length, to keep the record small."""
    short = [
        row for row in result["by_history_length"] if row["metric"] in ("NDCG@10", "Recall@10")
    ]
    return {**result, "by_history_length": short}


if __name__ == "__main__":
    app()
