"""Quality of rankers on real logs: candidates of one request, and the history before it.

    python benchmarks/ranking.py run kuairand-pure ifa --seed 0
    python benchmarks/ranking.py all                 # every run that has no result yet
    python benchmarks/ranking.py table               # the tables of docs/ranking.md

Requests are split by time: the last tenth of the candidates is for test, the tenth before it for
validation. All models have the same features, training and budget. The logs:

* kuairand-pure: exposures with clicks, requests are sessions; before them each user's last 50
  exposures, without outcomes and timestamps.
* kuairand-27k-like-hate: likes and dislikes, requests are sessions.
* ml-latest-small, ml-100k: ratings of at least 4 are positive, requests are sessions of rating.

An outcome is never an input for its own label, because a history ends strictly before its request.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import polars as pl
import torch
import typer

from everlong.data.events import Events, read_events
from everlong.data.items import ItemTable, read_items
from everlong.data.requests import (
    RequestDataset,
    Requests,
    RequestSplit,
    requests_from_events,
    split_requests,
)
from everlong.evaluation.candidates import Ranked
from everlong.evaluation.ranker import by_history_length, evaluate_ranking
from everlong.evaluation.requests import score_requests
from everlong.models.device import serving
from everlong.models.ifa import IFA, IFAConfig
from everlong.models.ranker import Ranker
from everlong.models.state import bytes_per_user
from everlong.models.target_attention import TargetAttention, TargetAttentionConfig
from everlong.ops.sets import Sets
from everlong.recommender.fit_ranker import fill_items, item_features
from everlong.system.provenance import hardware, versions
from everlong.training.ranker import add_candidates, train_ranker
from everlong.training.settings import RankerTrainConfig
from quality import DATA_DIR
from record import RESULTS
from tables import insert, spread

RUNS = RESULTS / "ranking"
PAGE = Path(__file__).parents[1] / "docs" / "ranking.md"
SEEDS = (0, 1, 2)
LONG = 500
UNKNOWN = 10
"""The code of an unknown outcome; 0 to 9 are outcomes."""

WEEK_S = 7 * 86_400.0
SHAPE = {"dim": 64, "heads": 4, "dropout": 0.2}
CONTESTANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "rate of the item": ("rate", {}),
    "mean of events": ("target_attention", {"reader": "mean", "window": 500}),
    "DIN": ("target_attention", {"reader": "din", "window": 200}),
    "softmax attention": ("target_attention", {"reader": "softmax", "window": 500}),
    "SIM soft": ("target_attention", {"reader": "sim_soft", "window": 500}),
    "SIM hard": ("target_attention", {"reader": "sim_hard", "window": 500}),
    "IFA": ("ifa", {"half_lives": (0.0, WEEK_S)}),
    "IFA, no candidate attention": (
        "ifa",
        {"half_lives": (0.0, WEEK_S), "candidate_attention": False},
    ),
    "IFA, no recent events": ("ifa", {"half_lives": (0.0, WEEK_S), "window": 0}),
    "IFA, exp": ("ifa", {"half_lives": (0.0, WEEK_S), "feature_map": "exp"}),
    "IFA, larger sets in training": ("ifa", {"half_lives": (0.0, WEEK_S)}),
}
TRAINING: Mapping[str, Mapping[str, Any]] = {
    "IFA, larger sets in training": {"candidate_drop": 0.2, "unexposed": 50},
}
"""Settings of training of some models, in addition to the budget."""
LOGS = ("kuairand-pure", "kuairand-27k-like-hate", "ml-latest-small", "ml-100k")
BUDGETS: Mapping[str, Mapping[str, Any]] = {
    "kuairand-pure": {"epochs": 8, "batch_size": 16_384, "lr": 1e-3, "patience": 3},
    "kuairand-27k-like-hate": {"epochs": 12, "batch_size": 2_048, "lr": 1e-3},
    "ml-latest-small": {"epochs": 12, "batch_size": 1_024, "lr": 1e-3},
    "ml-100k": {"epochs": 12, "batch_size": 1_024, "lr": 1e-3},
}
METRICS = ("AUC", "GAUC", "GAUC@request", "NDCG@10", "MRR", "LogLoss", "ECE")
app = typer.Typer(help=__doc__, add_completion=False)


class Data(NamedTuple):
    """A log with its items, and its requests in three parts."""

    events: Events
    items: ItemTable
    parts: RequestSplit


def read_data(data: str, folder: Path) -> Data:
    """A log by name."""
    path = folder / data
    if data == "kuairand-pure":
        frame, items = kuairand(path)
        features = read_items(items, frame.item_ids, categorical=("tag", "video_type", "author_id"))
    elif data == "kuairand-27k-like-hate":
        rows = pl.read_parquet(path / "interactions.parquet")
        frame = labelled(rows.with_columns(time=pl.col("time_ms"), outcome=pl.col("label")), "ms")
        features = read_items(pl.DataFrame({"item_id": rows["item_id"].unique()}), frame.item_ids)
    else:
        name = {"ml-latest-small": "interactions", "ml-100k": "interactions"}[data]
        rows = pl.read_parquet(path / f"{name}.parquet")
        rows = rows.with_columns(
            time=pl.col("timestamp"),
            label=(pl.col("rating") >= 4).cast(pl.Float32),
            outcome=(pl.col("rating") * 2 - 1).cast(pl.Int64).clip(0, 9),
        )
        frame = labelled(rows, "s")
        table = pl.read_parquet(path / "items.parquet")
        features = read_items(table, frame.item_ids, multi=("genres",))
    requests = requests_from_events(frame, request="request" if data == "kuairand-pure" else None)
    return Data(frame, features, split_requests(requests))


def labelled(rows: pl.DataFrame, unit: str) -> Events:
    return read_events(
        rows.with_columns(pl.col("label").cast(pl.Float32)),
        timestamp="time",
        fields=("label", "outcome"),
        ties="random",
        time_unit=unit,  # type: ignore[arg-type]
    )


def kuairand(path: Path) -> tuple[Events, pl.DataFrame]:
    """Exposures after the retained part of each user's earlier history."""
    shown = pl.read_parquet(path / "exposures.parquet").select(
        "user_id",
        "item_id",
        time=pl.col("time_ms"),
        label=pl.col("label").cast(pl.Float32),
        outcome=pl.col("label").cast(pl.Int64),
        request=pl.col("session_id").rank("dense").cast(pl.Int64),
    )
    past = pl.read_parquet(path / "histories.parquet").select(
        "user_id", "last_time_ms", item_id=pl.col("last50_items")
    )
    # only their order is known: one a second, the last at the time that is known
    past = past.with_columns(place=pl.int_ranges(pl.col("item_id").list.len()))
    past = past.with_columns(number=pl.col("item_id").list.len()).explode("item_id", "place")
    past = past.drop_nulls("item_id").select(
        "user_id",
        "item_id",
        time=pl.col("last_time_ms") - 1_000 * (pl.col("number") - 1 - pl.col("place")),
        label=pl.lit(None, pl.Float32),
        outcome=pl.lit(UNKNOWN, pl.Int64),
        request=pl.lit(0, pl.Int64),
    )
    past = past.join(shown.select("user_id").unique(), on="user_id", how="semi")
    past = past.with_columns(pl.col("item_id").cast(shown["item_id"].dtype))
    rows = pl.concat([past, shown.select(past.columns)], how="vertical_relaxed")
    events = read_events(
        rows.with_columns(pl.col("label").fill_null(float("nan"))),
        timestamp="time",
        fields=("label", "outcome", "request"),
        time_unit="ms",
    )
    return events, pl.read_parquet(path / "items.parquet")


def build(name: str, shape: Mapping[str, Any], data: Data, seed: int) -> Ranker:
    """A fresh ranker, initialised by a seed, with the features of the items."""
    categories, vectors = item_features(data.items)
    common = {
        "num_items": data.events.num_items,
        "fields": (("outcome", UNKNOWN + 1),),
        "categories": categories,
        "vectors": vectors,
        **SHAPE,
        **shape,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Ranker
        if name == "ifa":
            model = IFA(IFAConfig(**common))
        else:
            model = TargetAttention(TargetAttentionConfig(**common))
    fill_items(model, data.items)
    return model


def by_rate(data: Data, requests: Requests) -> Ranked:
    """Scores each candidate by the share of positive labels of its item in training."""
    train = data.parts.train
    known = ~np.isnan(train.labels)
    items, labels = train.items[known], train.labels[known]
    shown = np.bincount(items, minlength=data.events.num_items)
    liked = np.bincount(items, weights=labels, minlength=data.events.num_items)
    mean = labels.mean()
    rate = (liked + 10 * mean) / (shown + 10)
    logits = np.log(rate / (1 - rate))[requests.items]
    lengths = requests.history_lengths(data.events)
    return Ranked(
        logits=logits,
        labels=requests.labels.astype(np.float64),
        request=requests.request_rows,
        user=requests.user,
        history_lengths=lengths,
    )


@app.command()
def run(
    data: str,
    contestant: str,
    seed: int = 0,
    data_dir: Path = DATA_DIR,
    architecture: Annotated[str, typer.Option(help="JSON of changes, for a search")] = "{}",
    training: Annotated[str, typer.Option(help="JSON of changes, for a search")] = "{}",
    name: Annotated[str, typer.Option(help="result file, default by the settings")] = "",
) -> None:
    """Trains and evaluates one contestant on one log."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    found = read_data(data, data_dir)
    kind, shape = CONTESTANTS[contestant]
    name = name or file_name(data, contestant, seed)
    record: dict[str, Any] = {
        "data": data,
        "contestant": contestant,
        "seed": seed,
        "fingerprint": found.events.fingerprint,
        "requests": {
            part: {"requests": r.num_requests, "labels": r.num_labels, "facts": r.facts._asdict()}
            for part, r in zip(found.parts._fields, found.parts, strict=True)
        },
    }
    if kind == "rate":
        scored = {
            part: by_rate(found, getattr(found.parts, part)) for part in ("validation", "test")
        }
    else:
        shape = {**shape, **json.loads(architecture)}
        model = build(kind, shape, found, seed)
        settings = RankerTrainConfig(
            **{
                **BUDGETS[data],
                **TRAINING.get(contestant, {}),
                "seed": seed,
                **json.loads(training),
            }
        )
        began = time.perf_counter()
        result = train_ranker(
            model,
            RequestDataset(found.events, found.parts.train),
            settings,
            validate=lambda trained: means(score(trained, found, "validation")),
            folder=Path("runs") / "ranking" / name,
            resume=True,
        )
        rates = [row["events_per_second"] for row in result.history]
        record |= {
            "architecture": shape,
            "training": settings.model_dump(),
            "best_epoch": result.best_epoch,
            "seconds": round(time.perf_counter() - began, 1),
            "labels_per_second": round(statistics.median(rates)) if rates else None,
            "bytes_per_user": bytes_per_user(model.initial_state(1)),
        }
        scored = {part: score(model, found, part) for part in ("validation", "test")}
        if model.set_dependent:
            record["larger_sets"] = [larger_sets(model, found, extra) for extra in (10, 100)]
    test = scored["test"]
    record |= {
        "validation": means(scored["validation"]),
        "test": evaluate_ranking(test).as_dict(),
        "test_by_history_length": by_history_length(test).to_dicts(),
        "test_long_histories": long_histories(test),
        "versions": versions(),
        "hardware": hardware(),
    }
    path = RUNS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(name, record["validation"], means(test), record["test_long_histories"], flush=True)


def file_name(data: str, contestant: str, seed: int) -> str:
    return f"{data}-{contestant.lower().replace(', ', '_').replace(' ', '_')}-{seed}"


def score(model: Ranker, data: Data, part: str) -> Ranked:
    return score_requests(model, data.events, getattr(data.parts, part))


def larger_sets(model: Ranker, data: Data, extra: int) -> dict[str, Any]:
    """The change of the scores of shown candidates when others are added to their set.

    The others are drawn as often as they were shown in training. Of pairs of shown candidates of a
    request, the share whose order turns round; of single ones, the mean change of the logit.
    """
    train = data.parts.train
    chances = torch.bincount(torch.from_numpy(train.items), minlength=data.events.num_items)
    changes, turned, pairs = [], 0, 0
    with serving(model), torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in RequestDataset(data.events, data.parts.test).in_order(1 << 13):
            everyone = torch.ones(batch.user.numel(), dtype=torch.bool)
            more = add_candidates(batch, everyone, extra, chances.double(), torch.nan)
            before, after = model.rank(batch), model.rank(more)
            sizes, grown = batch.offsets.diff(), more.offsets[:-1]
            # those that were shown come first
            place = torch.arange(before.numel()) - batch.offsets[:-1].repeat_interleave(sizes)
            after = after[grown.repeat_interleave(sizes) + place]
            changes.append((after - before).abs())
            for _, index in Sets.of(batch.offsets).groups:
                a, b = (x[index][:, :, None] - x[index][:, None] for x in (before, after))
                turned += int(((a > 0) & (b < 0)).sum())
                pairs += int((a > 0).sum())
    return {
        "extra": extra,
        "mean change of a logit": float(torch.cat(changes).mean()),
        "pairs turned round": turned / max(1, pairs),
    }


def means(ranked: Ranked) -> dict[str, float]:
    return {name: value.mean for name, value in evaluate_ranking(ranked).metrics.items()}


def long_histories(ranked: Ranked) -> dict[str, Any]:
    """The metrics of requests after more than ``LONG`` events."""
    part = ranked.select(ranked.history_lengths > LONG)
    if len(part.labels) == 0 or np.isnan(part.labels).all():
        return {"candidates": 0}
    return evaluate_ranking(part).as_dict()


@app.command("all")
def run_all(data_dir: Path = DATA_DIR, only: str = "", seeds: int = len(SEEDS)) -> None:
    """Runs everything without a result, seed by seed."""
    for seed in SEEDS[:seeds]:
        for data in LOGS:
            for contestant, (kind, shape) in CONTESTANTS.items():
                name = file_name(data, contestant, seed)
                once = kind == "rate" and seed > 0
                # there are no categories to search by
                without = shape.get("reader") == "sim_hard" and data == "kuairand-27k-like-hate"
                if (
                    only in name
                    and not once
                    and not without
                    and not (RUNS / f"{name}.json").exists()
                ):
                    run(data, contestant, seed, data_dir, "{}", "{}", "")


@app.command()
def table() -> None:
    """Writes the table of the page from the records."""
    records = [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))]
    PAGE.write_text(insert(PAGE.read_text(), text_table(records)))


def text_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One row a log and contestant."""
    header = ("log", "model", *METRICS, f"GAUC, more than {LONG} events", "seeds", "bytes per user")
    lines = [header, ("---",) * len(header)]
    for data in LOGS:
        for contestant in CONTESTANTS:
            mine = [r for r in records if (r["data"], r["contestant"]) == (data, contestant)]
            if not mine:
                continue
            long = [
                r["test_long_histories"].get("metrics", {}).get("GAUC", {}).get("mean")
                for r in mine
            ]
            cells = [spread([r["test"]["metrics"][name]["mean"] for r in mine]) for name in METRICS]
            lines.append(
                (
                    data,
                    contestant,
                    *cells,
                    spread(long) if None not in long else "-",
                    str(len(mine)),
                    f"{mine[0]['bytes_per_user']:,}" if "bytes_per_user" in mine[0] else "-",
                )
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    app()
