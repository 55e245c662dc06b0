"""Small shards and services for tests, and a process that writes to one until it is killed."""

from __future__ import annotations

import functools
import logging
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from everlong.data.ids import IdMap
from everlong.data.split import PAPER
from everlong.models.batch import Batch
from everlong.models.device import serving
from everlong.models.lru import LRU, LRUConfig
from everlong.recommender.origin import Origin
from everlong.recommender.recommender import Recommender
from everlong.server.engine import state_checkpoint as module
from everlong.server.engine.served_model import ServedModel
from everlong.server.engine.service import Service
from everlong.server.engine.shard import Shard
from everlong.server.store.log import Event, EventReader, Stored
from everlong.server.store.state_table import StateTable
from everlong.server.store.watermark import FACTOR
from everlong.training.settings import TrainConfig

ITEMS = 50
CHAIN = int(FACTOR)


def lru(seed: int = 0) -> LRU:
    """A small model, the same in every process."""
    torch.manual_seed(seed)
    return LRU(LRUConfig(num_items=ITEMS, dim=8, channels=4)).eval()


def table() -> StateTable:
    """States of a small model."""
    return StateTable(lru(), IdMap.from_values(list(range(ITEMS))), b"0123456789abcdef")


def opened(path: Path, capacity: int = 10_000) -> Shard:
    """A shard with its states."""
    shard, states = Shard.open(path, capacity=capacity), table()
    shard.bring_up(states)
    return shard


def save_models(folder: Path) -> list[Path]:
    """Folders of two small models without training."""
    folders = [folder / "model-0", folder / "model-1"]
    for seed, place in enumerate(folders):
        origin = Origin(
            model="lru",
            train=TrainConfig(),
            protocol=PAPER,
            time_unit="seconds",
            data={"events": 0, "users": 0, "fingerprint": ""},
            metrics={},
        )
        Recommender(lru(seed), IdMap.from_values(list(range(ITEMS))), origin).save(place)
    return folders


def number_of(event: Stored) -> int:
    """What an event adds to the hash of its user."""
    return int.from_bytes(event.event_key[:8], "little")


def check_against_log(table: StateTable, log: EventReader) -> int:
    """Watermark and states are those of the events of the log, each once and in order.

    Returns:
        How many events the log has.
    """
    events, users = log.after(0, 10_000_000), defaultdict[object, list[Stored]](list)
    for event in events:
        users[event.user_id].append(event)
    assert len(table) == len(users)
    for user_id, mine in users.items():
        found, numbers = table.watermark(user_id), [number_of(event) for event in mine]
        assert found is not None
        assert (found.offset, found.events) == (mine[-1].offset, len(mine))
        chain = functools.reduce(lambda chain, number: chain * CHAIN + number, numbers, 0)
        assert found.chain == chain % 2**64
        assert found.newest == max(event.time for event in mine)
    if users:
        # items that the model does not know are counted above, and in no state
        known = [[e.item_id for e in mine if e.item_id < ITEMS] for mine in users.values()]
        with serving(table.model):
            expected = table.model.final_state(Batch.from_histories(known))
        for a, b in zip(table.read(list(users)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return len(events)


def write_until_killed(folder: Path, models: Sequence[Path], seed: int, tell: Connection) -> None:
    """Serves a folder, telling what was acknowledged, while models change places.

    What it tells: ``("live", name)`` once it is up, ``("acknowledged", {event id: offset})``,
    ``("switching", name)`` before a model is made live and ``("live", name)`` after, and
    ``("warned", text)`` if something had to be repaired or failed.
    """
    torch.set_num_threads(1)
    # states are written again and again, so that kills fall into that
    module.CHECKPOINT_S = 0.02
    telling = threading.Lock()

    class Tell(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            _tell(tell, telling, "warned", record.getMessage())

    complaints = logging.getLogger("everlong.server")
    complaints.addHandler(Tell(logging.WARNING))
    # errors that the kill would hide
    threading.excepthook = lambda error: complaints.error("%r", error.exc_value)
    try:
        _write(folder, models, seed, lambda what, told: _tell(tell, telling, what, told))
    except Exception as error:
        complaints.error("%r", error)


def _tell(tell: Connection, telling: threading.Lock, what: str, told: object) -> None:
    with telling:
        tell.send((what, told))


def _write(
    folder: Path, models: Sequence[Path], seed: int, tell: Callable[[str, object], None]
) -> None:
    draw, known = random.Random(seed), [ServedModel.read(path) for path in models]
    service = Service(folder, known[0], shards=2)
    tell("live", service.live.name)

    def switch() -> None:
        turns = random.Random(-seed)
        while True:
            time.sleep(turns.uniform(0.0, 0.1))
            (other,) = [model for model in known if model.name != service.live.name]
            tell("switching", other.name)
            if service.previous is not None and turns.random() < 0.5:
                service.roll_back()
            else:
                service.switch(other)
            tell("live", service.live.name)

    threading.Thread(target=switch, daemon=True).start()
    sent: list[Event] = []
    while True:
        group: dict[str, Event] = {}
        for _ in range(draw.randint(1, 40)):
            # one in ten is delivered again, one item in sixty is not known to the models
            name, user = f"{seed}-{len(sent)}", f"u{draw.randrange(30)}"
            # later than all of the lives before, so that the order of times is that of arrival
            new = Event(name, user, draw.randrange(60), 10**6 * seed + len(sent))
            event = draw.choice(sent[-200:]) if sent and draw.random() < 0.1 else new
            if event is new:
                sent.append(event)
            group[event.event_id] = event
        parts = service.by_shard(list(group.values()))
        futures = service.ingest(list(group.values()))
        told = {
            event.event_id: receipt.offset
            for events, future in zip(parts.values(), futures, strict=True)
            for event, receipt in zip(events, future.result(), strict=True)
        }
        tell("acknowledged", told)
