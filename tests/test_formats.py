"""Folders and files that earlier versions wrote are opened, and answer as they did then.

``tests/formats/v1`` was written once, by ``tests/formats/write_v1.py``, and stays as it is; each
``expected.json`` holds the answers of the code that wrote it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import everlong
from everlong.data.events import Events
from everlong.data.ids import IdMap
from everlong.recommender.recommender import Recommender
from everlong.server.engine.served_model import ServedModel, Wanted, state_digest
from everlong.server.engine.service import Service
from everlong.server.store.log import Event
from everlong.system.progress import Progress
from everlong.text.encoder import Encoded
from everlong.text.vector_cache import encode_cached
from everlong.training.migrations import training_2

STORED = Path(__file__).parent / "formats" / "v1"
MODELS = sorted(path.parent.name for path in (STORED / "models").glob("*/config.json"))

TOLERANCE = 1e-4
AT = 1_674_100_000
"""A time after the last event of the log."""

TEXTS = ("a red kite", "a kite", "", "the text with more words than the encoder reads", "Käse")


class Stub:
    """An encoder by its digest and width: it must never be asked, all is in the cache."""

    width = 5
    digest = "0a" * 32

    def encode(self, texts: Sequence[str], *, progress: Progress | None = None) -> Encoded:
        raise AssertionError(f"not found in the cache: {texts}")

    def describe(self) -> dict[str, Any]:
        return {}


# what is asked; write_v1.py asked the same


def rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 5) for value in values]


def lists_of(frame: pl.DataFrame) -> dict[str, Any]:
    """Lists by user, from a frame of recommendations."""
    return {
        str(user): {"items": rows["item_id"].to_list(), "scores": rounded(rows["score"])}
        for (user,), rows in frame.group_by("user_id", maintain_order=True)
    }


def metrics_of(evaluation: Any) -> dict[str, float]:
    return {name: round(value.mean, 5) for name, value in evaluation.metrics.items()}


def ask_events(events: Events) -> dict[str, Any]:
    """All that a log says."""
    return {
        "user_ids": events.user_ids.ids(range(events.num_users)).to_list(),
        "item_ids": events.item_ids.ids(range(events.num_items)).to_list(),
        "items": events.items.tolist(),
        "times": events.times.tolist(),
        "offsets": events.offsets.tolist(),
        "fields": {name: rounded(values) for name, values in events.fields.items()},
        "fingerprint": events.fingerprint,
        "time_unit": events.facts.time_unit,
        "rows_read": events.facts.rows_read,
        "rows_skipped": dict(events.facts.rows_skipped),
    }


def ask_items(table: everlong.ItemTable) -> dict[str, Any]:
    """All that an item table says."""
    return {
        "item_ids": table.item_ids.ids(range(table.num_items)).to_list(),
        "known": table.known.tolist(),
        "rows_ignored": table.rows_ignored,
        "categories": {
            name: {
                "names": list(column.names),
                "codes": column.codes.tolist(),
                "offsets": column.offsets.tolist(),
            }
            for name, column in table.categories.items()
        },
        "text": {name: values.to_list() for name, values in table.text.items()},
        "vectors": {name: [rounded(v) for v in values] for name, values in table.vectors.items()},
    }


def check_metrics(found: dict[str, float], stored: dict[str, float], model: str) -> None:
    """Metrics are what they were; of counts, which are often equal, they are no worse, because
    version 1 counted equal scores against the target."""
    if model not in ("markov", "popularity", "recent_popularity"):
        assert found == pytest.approx(stored, abs=TOLERANCE)
    assert found.keys() == stored.keys()
    assert all(found[name] >= stored[name] - TOLERANCE for name in stored)


def ask_model(recommender: Recommender, events: Events) -> dict[str, Any]:
    """Lists of users whose states are stored, of histories, and after events that are new."""
    users = events.user_ids.ids([0, 2]).to_list()
    items = events.item_ids.ids(range(events.num_items)).to_list()
    two_stage = recommender.origin.model == "two_stage"
    found: dict[str, Any] = {
        "model": recommender.origin.model,
        "users": len(recommender.users),
        "items": len(recommender.item_ids),
        # as version 1 counted them: with two counters and a ring of 1,024 seen items
        "bytes_per_user": recommender.bytes_per_user.state + 16 + 4 * 1024,
        "trained_on": recommender.origin.data["fingerprint"],
        "new": lists_of(recommender.recommend(users, k=5, filter_seen=True, at=AT)),
        "all": lists_of(recommender.recommend(users, k=10, filter_seen=False, at=AT)),
        "rank": lists_of(recommender.rank(users, [items[3:9], items[10:14]], at=AT)),
    }
    if two_stage:
        ranking = recommender.origin.metrics["ranking"]["metrics"]
        found["metrics"] = {name: round(value["mean"], 5) for name, value in ranking.items()}
    else:
        history = {"somebody": [*items[2:12], items[2]]}
        found["history"] = lists_of(recommender.recommend(history, k=10, filter_seen=False, at=AT))
        found["metrics"] = metrics_of(recommender.evaluate(events))
        stored = recommender.origin.metrics["test"]["metrics"]
        means = {name: value["mean"] for name, value in stored.items()}
        check_metrics(found["metrics"], means, recommender.origin.model)
    more = pl.DataFrame(
        {
            "user_id": [users[0], users[0], "somebody new", "somebody new"],
            "item_id": [items[5], "not in the catalogue", items[0], items[7]],
            "timestamp": [AT + 10, AT + 20, AT + 30, AT + 40],
            "outcome": [1, 0, 0, 1],
        }
    )
    report = recommender.update(more, time_unit="s")
    found["update"] = [report.events, report.users, report.new_users, report.unknown_items]
    asked = [users[0], "somebody new"]
    found["updated"] = lists_of(
        recommender.recommend(asked, k=10, filter_seen=False, at=AT + 3_600)
    )
    return found


def ask_with_one_item_more(recommender: Recommender, events: Events) -> dict[str, Any]:
    """Lists after an item has come by its vector alone."""
    frame = pl.DataFrame({"item_id": ["just made"], "place": [[0.5, -1.0, 2.0]]})
    table = everlong.read_items(frame, IdMap.from_values(["just made"]), vectors=["place"])
    added = recommender.add_items(table)
    users = events.user_ids.ids([0, 2]).to_list()
    count = len(recommender.item_ids)
    lists = lists_of(recommender.recommend(users, k=count, filter_seen=False, at=AT))
    return {"added": added, "lists": lists}


def ask_service(service: Service) -> dict[str, Any]:
    """What is in a data folder, by shard and by user."""
    lines = (service.folder.parent / "users.jsonl").read_text().splitlines()
    users = [json.loads(line) for line in lines]
    found: dict[str, Any] = {
        "live": service.live.name,
        "previous": None if service.previous is None else service.previous.name,
        "hidden": list(service.hidden),
        "users_with_a_state": service.num_users,
        "shards": [
            {"events": shard.log.total.events, "last_offset": shard.log.total.last}
            for shard in service.shards
        ],
        "users": [],
    }
    for user in users:
        info = service.info(user)
        told: dict[str, Any] = {"user": user, "known": info is not None}
        if info is not None:
            watermark = info.watermark
            told["shard"] = info.shard
            told["standing"] = [watermark.offset, watermark.events, watermark.newest]
        told["history"] = [
            [event.offset, event.item_id, event.time, dict(event.fields)]
            for event in service.history(user, 1_000)
        ]
        for name, filter_seen in (("new", True), ("all", False)):
            wanted = Wanted(k=12, at=AT)
            listed = service.recommend(user, wanted, filter_seen=filter_seen).result()
            told[name] = {"items": list(listed.items), "scores": rounded(listed.scores)}
        found["users"].append(told)
    return found


def ask_again(service: Service) -> list[list[Any]]:
    """Receipts of the events of ``again.jsonl``, most of which were delivered before."""
    lines = (service.folder.parent / "again.jsonl").read_text().splitlines()
    receipts = []
    for event in (Event(*json.loads(line)) for line in lines):
        (future,) = service.ingest([event])
        (receipt,) = future.result()
        receipts.append([event.event_id, service.shard_of(event.user_id), *receipt])
    return receipts


def ask_service_twice(service: Service) -> dict[str, Any]:
    """What is there, what a second delivery is answered, and the lists of the model before."""
    found = {"live": ask_service(service), "again": ask_again(service)}
    service.roll_back()
    return {**found, "rolled_back": ask_service(service)}


def open_service(folder: Path) -> Service:
    """The service of a copied folder, asked for the model that it was asked for the last time."""
    path = folder / "data" / "service.json"
    about = json.loads(path.read_text())
    models = folder / "models" if (folder / "models").is_dir() else folder.parent / "models"
    for name in ("live", "previous"):
        about[name]["folder"] = str(models / Path(about[name]["folder"]).name)
    path.write_text(json.dumps(about))
    return Service(folder / "data", ServedModel.read(models / "lru"))


def resume(folder: Path, settings: dict[str, Any], events: Events) -> dict[str, Any]:
    """What a run comes to that goes on from its checkpoint."""
    protocol = everlong.TEMPORAL.replace({"seen": "keep"})
    recommender = everlong.fit(events, folder=folder, resume=True, protocol=protocol, **settings)
    users = events.user_ids.ids([0, 2]).to_list()
    lines = (folder / "train.jsonl").read_text().splitlines()
    return {
        "epochs": [json.loads(line) for line in lines],
        "best_epoch": recommender.origin.metrics["test"]["best_epoch"],
        "metrics": metrics_of(recommender.evaluate(events)),
        "lists": lists_of(recommender.recommend(users, k=10, filter_seen=False, at=AT)),
    }


def resume_ranker(folder: Path, settings: dict[str, Any], events: Events) -> dict[str, Any]:
    """The same of a ranker behind the stored model ``lru``."""
    retriever = everlong.load(STORED / "models" / "lru")
    both = everlong.fit_ranker(retriever, events, folder=folder, resume=True, **settings)
    users = events.user_ids.ids([0, 2]).to_list()
    lines = (folder / "train.jsonl").read_text().splitlines()
    ranking = both.origin.metrics["ranking"]
    return {
        "epochs": [json.loads(line) for line in lines],
        "best_epoch": ranking["best_epoch"],
        "metrics": {name: round(value["mean"], 5) for name, value in ranking["metrics"].items()},
        "lists": lists_of(both.recommend(users, k=10, filter_seen=False, at=AT)),
    }


def ask_encoder(encoder: Any) -> dict[str, Any]:
    """Vectors of texts, and which of these were cut."""
    found = encoder.encode(TEXTS)
    return {
        "digest": encoder.digest,
        "vectors": [rounded(vector) for vector in found.vectors],
        "cut": found.cut.tolist(),
    }


# the comparison


def check(found: Any, expected: Any, where: str = "") -> None:
    """Asserts that answers are those of then; items of equal scores may have changed places."""
    if isinstance(expected, dict) and expected.keys() == {"items", "scores"}:
        check(found["scores"], expected["scores"], f"{where}.scores")
        check_order(found["items"], expected, where)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            check(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, value in enumerate(expected):
            check(found[place], value, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE), (
            f"{where}: expected {expected}, received {found}"
        )
    else:
        assert type(found) is type(expected), where
        assert found == expected, f"{where}: expected {expected!r}, received {found!r}"


def check_order(items: list[Any], expected: dict[str, Any], where: str) -> None:
    assert len(set(items)) == len(items), where
    scores = dict(zip(expected["items"], expected["scores"], strict=True))
    for place, item in enumerate(items):
        # one that is not among those of then may stand where the scores of the last are
        score = scores.get(item, expected["scores"][-1])
        assert math.isclose(
            score, expected["scores"][place], rel_tol=2 * TOLERANCE, abs_tol=2 * TOLERANCE
        ), f"{where}: expected {expected['items']}, received {items}"


def expected_of(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STORED / kind / "expected.json").read_text("utf-8"))
    return found


def through_json(answers: Any) -> Any:
    return json.loads(json.dumps(answers))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """All of it, to be written to."""
    shutil.copytree(STORED, tmp_path / "v1")
    return tmp_path / "v1"


@pytest.fixture(scope="module")
def events() -> Events:
    return everlong.open_events(STORED / "events" / "index")


# the tests


def test_an_index_of_events(copied: Path) -> None:
    found = ask_events(everlong.open_events(copied / "events" / "index"))
    check(through_json(found), expected_of("events"))


def test_an_item_table(copied: Path) -> None:
    found = ask_items(everlong.ItemTable.read(copied / "items" / "table"))
    check(through_json(found), expected_of("items"))


def test_a_cache_of_vectors(copied: Path) -> None:
    found = encode_cached(Stub(), TEXTS, copied / "vectors" / "cache.sqlite")
    expected = expected_of("vectors")
    assert expected["texts"] == list(TEXTS)
    np.testing.assert_allclose(found.vectors, expected["vectors"], atol=TOLERANCE)
    assert found.cut.tolist() == expected["cut"]


def check_model(answers: dict[str, Any], name: str) -> None:
    found, expected = through_json(answers), dict(expected_of("models")[name])
    if "history" in found:
        check_metrics(found.pop("metrics"), expected.pop("metrics"), found["model"])
    check(found, expected, name)


def test_the_models_are_all_there() -> None:
    assert sorted(expected_of("models")) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder(name: str, copied: Path, events: Events) -> None:
    recommender = everlong.load(copied / "models" / name)
    check_model(ask_model(recommender, events), name)
    # and as today's code stores it
    again = everlong.load(copied / "models" / name)
    again.save(copied / "again")
    moved = everlong.load(copied / "again")
    check_model(ask_model(moved, events), name)


DIGESTS = {
    "gru4rec": "2739dfa1bd91d0f01f5be34da3647f2d",
    "hllm": "23f28d79800fca5b6b1545c390748314",
    "hstu": "331bc2c0377fb73bedced5a835b71ccc",
    "lru": "29dc38cd8b48cf704087944c53800fd9",
    "lru_vectors": "45ea536ae6f9e37d0aa364b957642af2",
    "markov": "512ff1c5dc81efb99912b81345f77b45",
    "persrec": "55a124eb4f437177c5ca356cff00baaf",
    "persrec_hllm": "ba9964ae33e4da60b08a76547f291474",
    "persrec_paper": "293883ec48c668d99a1eba517aaf5c23",
    "persrec_paper_hllm": "49f14548057dc162f6c33859c4fe1da3",
    "popularity": "82a893b34c7f130c47026ed16041b6fe",
    "recent_popularity": "e6a3bcb7b63775e130dd24919d9c31fb",
    "sasrec": "bb1856c1c8f79d1bd5ef9be4b01b78e5",
    "two_stage_ifa": "bd710ec78d12bfc61cdd8cbf5389919e",
    "two_stage_target_attention": "e305d4324e356b65eb3f125660e3ac49",
}
"""What version 1 called each model in the records of states and in the file of the service."""


def test_a_model_is_found_by_the_digest_that_it_had() -> None:
    for name, digest in DIGESTS.items():
        recommender = everlong.load(STORED / "models" / name)
        assert state_digest(recommender.model, recommender.item_ids).hex() == digest, name


def test_a_model_takes_items_by_the_vectors_that_it_was_trained_with(
    copied: Path, events: Events
) -> None:
    recommender = everlong.load(copied / "models" / "lru_vectors")
    found = ask_with_one_item_more(recommender, events)
    check(through_json(found), json.loads((STORED / "models" / "one_item_more.json").read_text()))


@pytest.mark.parametrize("kind", ["service", "killed"])
def test_a_data_folder(kind: str, copied: Path) -> None:
    service = open_service(copied / kind)
    try:
        found = ask_service_twice(service)
    finally:
        service.close()
    check(through_json(found), expected_of(kind))


@pytest.mark.parametrize("kind", ["service", "killed"])
def test_a_data_folder_that_was_opened_is_opened_again(kind: str, copied: Path) -> None:
    open_service(copied / kind).close()
    service = open_service(copied / kind)
    try:
        found = ask_service_twice(service)
    finally:
        service.close()
    check(through_json(found), expected_of(kind))


@pytest.mark.parametrize(
    ("kind", "go_on"), [("checkpoint", resume), ("checkpoint_ranker", resume_ranker)]
)
def test_a_run_goes_on_from_its_checkpoint(
    kind: str, go_on: Callable[..., Any], copied: Path, events: Events
) -> None:
    expected = expected_of(kind)
    settings = expected["fit"]
    settings = {**settings, "training": training_2(settings["training"])}
    found = through_json(go_on(copied / kind / "run", settings, events))
    first, *rest = (STORED / kind / "run" / "train.jsonl").read_text().splitlines()
    # with its time: this epoch was not run again
    assert found["epochs"][0] == json.loads(first)
    assert len(rest) + 1 < len(found["epochs"])
    for epoch in (*found["epochs"], *expected["resumed"]["epochs"]):
        del epoch["seconds"], epoch["events_per_second"]
    check(found, expected["resumed"])


def test_an_encoder_with_adapters(copied: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from everlong.text.causal import CausalEncoder

    expected = expected_of("encoder")
    version = expected.pop("transformers")
    if transformers.__version__ != version:
        pytest.skip(f"the digest of an encoder is of the settings that transformers {version} has")
    found = ask_encoder(CausalEncoder.load(copied / "encoder" / "folder"))
    check(through_json(found), expected)
