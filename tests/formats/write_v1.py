"""Writes ``tests/formats/v1``: every format that is stored, as version 0.1.0 wrote it.

It ran once, with the code of commit 10bef9e and ``tests/test_formats.py`` with the imports of that
code, and is kept to say how the files came to be. No test runs it, and later code need not be able
to: formats of later versions get a folder and a script of their own.

    PYTHONPATH=src:tests python tests/formats/write_v1.py tests/formats/v1
"""

# ruff: noqa: I001 - the modules are those of then, which are no part of the project any more
from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import polars as pl
import tokenizers
import torch
import transformers

import everlong
from everlong import pipeline, ranking_pipeline
from everlong.batch import RequestBatch
from everlong.dataset import Dataset, TrainBatch
from everlong.encoders import Encoded
from everlong.encoders.causal import CausalEncoder
from everlong.events import Events
from everlong.models import BUILTIN, config_class, load_model_class
from everlong.progress import Progress
from everlong.requests import RequestDataset
from everlong.service import log as service_log
from everlong.service.deployment import Deployment
from everlong.service.log import Event, Receipt
from everlong.service.service import Service
from everlong.sources.synthetic import exposures
from everlong.vector_cache import encode_cached
from test_formats import (
    TEXTS,
    ask_encoder,
    ask_events,
    ask_items,
    ask_model,
    ask_service_twice,
    ask_with_one_item_more,
    open_service,
    resume,
    resume_ranker,
)

ROOT = Path("/tmp/everlong-formats-v1")
"""Where the files are made; service.json keeps whole paths."""

KINDS = (
    *("events", "items", "vectors", "models", "encoder"),
    *("service", "killed", "checkpoint", "checkpoint_ranker"),
)

SMALL = {
    "dim": 8,
    "hidden": 6,
    "channels": 5,
    "layers": 2,
    "heads": 2,
    "window": 16,
    "segment": 8,
    "keep": 3,
    "placement": ((6, 2),),
    "recent": 5,
}
TRAINING = {"epochs": 1, "batch_events": 32, "lr": 0.04, "precision": "float32"}
KEEP = {"seen": "keep"}
RANKER = {"dim": 8, "heads": 2, "window": 4, "fields": (("outcome", 2),)}

CHECKPOINT: dict[str, Any] = {
    "model": "lru",
    "architecture": {"dim": 8, "channels": 5, "layers": 1},
    "training": {
        "epochs": 4,
        "batch_events": 20,
        "piece_events": 20,
        "lr": 0.02,
        "precision": "float32",
    },
}
CHECKPOINT_RANKER: dict[str, Any] = {
    "model": "ifa",
    "architecture": {"dim": 8, "heads": 2, "layers": 1, "window": 4, "fields": [["outcome", 2]]},
    "training": {"epochs": 4, "batch_size": 100, "lr": 0.01},
    "candidates": 12,
}
STOP_AT, STOP_RANKER_AT = (1, 3), (1, 1)
"""Epoch and piece at which runs are interrupted."""

FIRST = 1_700_000_000


class Hashes:
    """A vector of five numbers from the hash of a text; long texts are cut."""

    width = 5
    digest = "0a" * 32

    def encode(self, texts: Sequence[str], *, progress: Progress | None = None) -> Encoded:
        hashes = [hashlib.sha256(text.encode()).digest() for text in texts]
        vectors = np.array([list(h[:5]) for h in hashes], np.float32).reshape(-1, 5) / 7
        return Encoded(vectors=vectors, cut=np.array([len(text) > 20 for text in texts], bool))

    def describe(self) -> dict[str, Any]:
        return {}


class Stopping(Dataset):
    """Training data that press Ctrl-C before one of their pieces."""

    def batches(
        self, budget: int, *, seed: int, epoch: int, start: int = 0
    ) -> Iterator[TrainBatch]:
        for number, batch in enumerate(
            super().batches(budget, seed=seed, epoch=epoch, start=start)
        ):
            if (epoch, number) == STOP_AT:
                signal.raise_signal(signal.SIGINT)
            yield batch


class StoppingRequests(RequestDataset):
    """The same of requests."""

    def batches(
        self, budget: int, *, seed: int, epoch: int, start: int = 0
    ) -> Iterator[RequestBatch]:
        batches = super().batches(budget, seed=seed, epoch=epoch, start=start)
        for number, batch in enumerate(batches):
            if (epoch, number) == STOP_RANKER_AT:
                signal.raise_signal(signal.SIGINT)
            yield batch


def write_json(kind: str, answers: Any, name: str = "expected.json") -> None:
    text = json.dumps(answers, ensure_ascii=False)
    # one user, item or model a line is enough to read a difference by
    (ROOT / kind / name).write_text(text.replace("}, ", "},\n") + "\n", encoding="utf-8")


def the_log() -> pl.DataFrame:
    """Four users, since each takes 4 KB of a model folder, 24 items, 256 exposures."""
    frame = exposures(num_users=4, num_items=24, sessions=16, shown=4, seed=3).frame
    return frame.with_columns(
        user_id=pl.format("user-{}", pl.col("user_id")),
        item_id=pl.format("item-{}ß", pl.col("item_id").cast(pl.String).str.zfill(2)),
    )


def write_events(frame: pl.DataFrame) -> Events:
    frame.write_csv("log.csv")
    found = everlong.open_events("log.csv", cache_dir="cache", fields=["label", "outcome"])
    (folder,) = Path("cache/events").iterdir()
    (ROOT / "events").mkdir()
    folder.rename(ROOT / "events" / "index")
    found = everlong.open_events(ROOT / "events" / "index")
    write_json("events", ask_events(found))
    return found


def write_items(events: Events) -> everlong.ItemTable:
    ids = events.item_ids.ids(range(events.num_items)).to_list()[:-1]
    count, draw = len(ids), np.random.default_rng(5)
    frame = pl.DataFrame(
        {
            "item_id": [*ids, "nobody knows it"],
            "title": [*(f"Title of {name}" for name in ids[1:]), None, "x"],
            "kind": [["book", "film", None][n % 3] for n in range(count)] + ["game"],
            "tags": [["a|b", "b", "", "c|a|d"][n % 4] for n in range(count)] + ["z"],
            "place": draw.normal(size=(count + 1, 3)).round(3).tolist(),
        }
    )
    table = everlong.read_items(
        frame,
        events.item_ids,
        categorical=["kind"],
        multi=["tags"],
        text=["title"],
        vectors=["place"],
    )
    (ROOT / "items").mkdir()
    table.write(ROOT / "items" / "table")
    write_json("items", ask_items(everlong.ItemTable.read(ROOT / "items" / "table")))
    return table


def write_vectors() -> None:
    (ROOT / "vectors").mkdir()
    made = encode_cached(Hashes(), TEXTS, ROOT / "vectors" / "cache.sqlite")
    answers = {
        "texts": list(TEXTS),
        "vectors": [[round(float(x), 5) for x in vector] for vector in made.vectors],
        "cut": made.cut.tolist(),
    }
    write_json("vectors", answers)


def sizes(name: str) -> dict[str, Any]:
    known = config_class(load_model_class(name)).__dataclass_fields__
    return {key: value for key, value in SMALL.items() if key in known}


def write_models(events: Events, table: everlong.ItemTable) -> None:
    folder = ROOT / "models"
    for name in BUILTIN:
        # the default protocol, but for what would leave no targets of so few items
        protocol = (everlong.PAPER if name == "sasrec" else everlong.TEMPORAL).replace(KEEP)
        everlong.fit(
            events, name, architecture=sizes(name), training=TRAINING, protocol=protocol
        ).save(folder / name)
    everlong.fit(
        events,
        "lru",
        items=table,
        architecture={**sizes("lru"), "ids": False},
        training=TRAINING,
    ).save(folder / "lru_vectors")
    for ranker in ("ifa", "target_attention"):
        known = RANKER if ranker == "target_attention" else {**RANKER, "layers": 1}
        everlong.fit_ranker(
            everlong.load(folder / "lru"),
            events,
            ranker,
            architecture=known,
            training={"epochs": 1, "precision": "float32"},
            candidates=12,
        ).save(folder / f"two_stage_{ranker}")
    names = sorted(path.name for path in folder.iterdir())
    write_json("models", {name: ask_model(everlong.load(folder / name), events) for name in names})
    larger = ask_with_one_item_more(everlong.load(folder / "lru_vectors"), events)
    write_json("models", larger, "one_item_more.json")


def sent(service: Service, events: Sequence[Event]) -> dict[str, Receipt]:
    parts = service.by_shard(events).values()
    futures = service.ingest(events)
    return {
        event.event_id: receipt
        for part, future in zip(parts, futures, strict=True)
        for event, receipt in zip(part, future.result(), strict=True)
    }


def keep_lines(folder: Path, users: Sequence[Any], again: Sequence[Event]) -> None:
    """Beside the data: the users to ask for, and the events to deliver again."""
    (folder.parent / "users.jsonl").write_text("".join(json.dumps(user) + "\n" for user in users))
    (folder.parent / "again.jsonl").write_text("".join(json.dumps(event) + "\n" for event in again))


def write_service(items: Sequence[str]) -> None:
    """Two shards, closed: repeats, a late event, an unknown item, an erased user, a switch."""
    folder, models = ROOT / "service" / "data", ROOT / "models"
    users = [f"visitor-{n}" for n in range(6)]
    events = [
        Event(f"e{user}-{n}", name, items[(3 * user + 2 * n) % len(items)], FIRST + 60 * n + user)
        for n in range(13)
        for user, name in enumerate(users)
    ]
    late = Event("late", users[2], items[1], FIRST - 1_000)
    unknown = Event("unknown", users[3], "no such item", FIRST + 900)
    fields = Event("fields", users[4], items[9], FIRST + 901, {"price": 1.25, "count": 3})
    last = Event("last", users[0], items[4], FIRST + 902)
    service = Service(folder, Deployment.read(models / "lru"), shards=2)
    sent(service, events)
    repeated = sent(service, [*events[:2], late, unknown])
    assert [receipt.new for receipt in repeated.values()].count(False) == 2
    service.hide([items[0], items[7]])
    service.switch(Deployment.read(models / "persrec"))
    assert service.erase(users[5]).result() == 13
    sent(service, [fields, last])
    assert {service.shard_of(user) for user in users} == {0, 1}
    service.close()
    keep_lines(folder, [*users, "somebody else"], [events[0], events[5], late, unknown, last])
    answer(folder)


def number_ids(frame: pl.DataFrame) -> pl.DataFrame:
    """The log with numbers as ids."""
    user = pl.col("user_id").str.strip_prefix("user-").cast(pl.Int64)
    item = pl.col("item_id").str.strip_prefix("item-").str.strip_suffix("ß").cast(pl.Int64)
    return frame.with_columns(user_id=user, item_id=item)


def write_killed(frame: pl.DataFrame) -> None:
    """Numbers as ids, killed: states of a part of the users, behind the log, and its tail."""
    folder = ROOT / "killed"
    for name in ("lru", "sasrec"):
        numbers = number_ids(frame)
        made = everlong.fit(numbers, name, architecture=sizes(name), training=TRAINING)
        made.save(folder / "models" / name)
    service = Service(folder / "data", Deployment.read(folder / "models" / "lru"), shards=2)
    sent(service, killed_events(0, 4, range(9)))
    # users 0 to 4 came before: their states are built when they are asked for
    sent(service, killed_events(4, 8, range(5, 9)))
    service.erase(8).result()
    service.switch(Deployment.read(folder / "models" / "sasrec"), since=FIRST + 4 * 60)
    service.close()
    ended = subprocess.run([sys.executable, __file__, "--until-killed"], check=False)
    assert ended.returncode == -signal.SIGKILL
    for path in (folder / "data").glob("*-shm"):
        # an index of the write-ahead log, which is made anew
        path.unlink()
    tails = list((folder / "data").glob("*-wal"))
    assert len(tails) == 2
    assert all(path.stat().st_size > 0 for path in tails)
    again = [*killed_events(8, 9, [6, 7]), *killed_events(0, 1, [0, 8]), *killed_events(9, 10, [7])]
    keep_lines(folder / "data", range(11), again)
    answer(folder / "data")


def killed_events(first: int, stop: int, users: Sequence[int]) -> list[Event]:
    """Events ``first`` to ``stop`` of each of some users."""
    return [
        Event(f"{user}-{n}", user, (5 * user + 3 * n) % 24, FIRST + 60 * n + user)
        for n in range(first, stop)
        for user in users
    ]


def until_killed() -> None:
    """Goes on with the folder of ``write_killed`` and is killed once all is acknowledged."""
    folder = ROOT / "killed"
    service = Service(folder / "data", Deployment.read(folder / "models" / "lru"))
    sent(service, killed_events(8, 9, [4, 5, 6, 7]))
    assert service.erase(7).result() == 9
    service.hide([11])
    sent(service, killed_events(9, 10, [0, 4, 6, 9]))
    sent(service, killed_events(8, 10, [6]))
    os.kill(os.getpid(), signal.SIGKILL)


def answer(folder: Path) -> None:
    """Keeps what a copy of a data folder answers."""
    kind, copy = folder.parent, ROOT / "copy"
    shutil.copytree(kind, copy / kind.name)
    if not (kind / "models").is_dir():
        shutil.copytree(ROOT / "models", copy / "models")
    service = open_service(copy / kind.name)
    write_json(kind.name, ask_service_twice(service))
    service.close()
    shutil.rmtree(copy)


def write_checkpoint(events: Events) -> None:
    folder, protocol = ROOT / "checkpoint", everlong.TEMPORAL.replace(KEEP)
    with patch.object(pipeline, "Dataset", Stopping), interrupted():
        everlong.fit(events, folder=folder / "run", protocol=protocol, **CHECKPOINT)
    shutil.copytree(folder / "run", ROOT / "run")
    resumed = resume(ROOT / "run", CHECKPOINT, events)
    write_json("checkpoint", {"fit": CHECKPOINT, "resumed": resumed})


def write_checkpoint_ranker(events: Events) -> None:
    folder = ROOT / "checkpoint_ranker"
    retriever = everlong.load(ROOT / "models" / "lru")
    with patch.object(ranking_pipeline, "RequestDataset", StoppingRequests), interrupted():
        everlong.fit_ranker(retriever, events, folder=folder / "run", **CHECKPOINT_RANKER)
    shutil.copytree(folder / "run", ROOT / "run_ranker")
    resumed = resume_ranker(ROOT / "run_ranker", CHECKPOINT_RANKER, events)
    write_json("checkpoint_ranker", {"fit": CHECKPOINT_RANKER, "resumed": resumed})


@contextmanager
def interrupted() -> Iterator[None]:
    """A block that ends by Ctrl-C."""
    try:
        yield
    except everlong.Interrupted as stopped:
        print(stopped)
    else:
        raise AssertionError("the run was not interrupted")


def write_encoder() -> None:
    """A language model of random weights, with adapters that have learned something."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=258,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained("language_model")
    words.save_pretrained("language_model")
    encoder = CausalEncoder("language_model", prompt="item: ", max_tokens=24)
    encoder.add_adapters(rank=2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    (ROOT / "encoder").mkdir()
    encoder.save(ROOT / "encoder" / "folder")
    answers = ask_encoder(CausalEncoder.load(ROOT / "encoder" / "folder"))
    write_json("encoder", {"transformers": transformers.__version__, **answers})


def main(target: Path) -> None:
    torch.set_num_threads(1)
    target = target.absolute()
    ROOT.mkdir()
    os.chdir(ROOT)
    frame = the_log()
    events = write_events(frame)
    write_vectors()
    write_models(events, write_items(events))
    with patch.object(service_log.secrets, "token_bytes", lambda size: bytes(range(size))):
        write_service(events.item_ids.ids(range(events.num_items)).to_list())
        write_killed(frame)
    write_checkpoint(events)
    write_checkpoint_ranker(events)
    write_encoder()
    for kind in KINDS:
        shutil.copytree(ROOT / kind, target / kind)


if __name__ == "__main__":
    if sys.argv[1] == "--until-killed":
        until_killed()
    else:
        main(Path(sys.argv[1]))
