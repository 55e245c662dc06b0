"""Killed at any point, the service loses, doubles and reorders nothing that it acknowledged."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from tests.forms import forms
from tests.server_writer import check_against_log, save_models, write_until_killed

from everlong.server.engine.served_model import ServedModel
from everlong.server.engine.service import Service

FULL_CHECKS = 4
"""How often, over all kills, states are compared with the log in full."""


class History:
    """What a service has promised over all of its lives."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, int] = {}
        self.live: set[str] = set()
        """The model that is live, and the one that may have taken its place since."""
        self.switches = 0

    def note(self, what: str, told: object) -> None:
        # a kill leaves nothing that is damaged, and no states that do not follow from the log
        assert what != "warned", told
        if what == "acknowledged":
            assert isinstance(told, dict)
            for name, offset in told.items():
                # a second delivery is answered with the offset of the first, in any life
                assert self.acknowledged.setdefault(name, offset) == offset
        elif what == "switching":
            self.live = {*self.live, str(told)}
            self.switches += 1
        else:
            assert not self.live or told in self.live
            self.live = {str(told)}


@pytest.fixture(scope="module")
def nursery() -> ForkServerContext:
    """A process that has read the library, from which those to be killed are forked."""
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), before])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.server_writer"])
    return context


def life(
    nursery: ForkServerContext,
    folder: Path,
    models: Sequence[Path],
    number: int,
    draw: random.Random,
    history: History,
) -> None:
    """Starts the service, kills it after it has done some work, and notes what it told."""
    # a number of groups and of changes of the model, not a time: a slow machine does as much
    awaited = {"acknowledged": draw.randint(3, 15), "switching": draw.randint(0, 3)}
    hear, tell = nursery.Pipe(duplex=False)
    process = nursery.Process(target=write_until_killed, args=(folder, models, number, tell))
    process.start()
    tell.close()
    killer: threading.Timer | None = None
    if number and draw.random() < 0.25:
        # while it recovers
        killer = threading.Timer(draw.uniform(0.0, 0.5), process.kill)
        killer.start()
    try:
        while True:
            assert hear.poll(120), "expected a message within two minutes, received none"
            what, told = hear.recv()
            history.note(what, told)
            awaited[what] = awaited.get(what, 0) - 1
            if killer is None and max(awaited.values()) <= 0:
                killer = threading.Timer(draw.uniform(0.0, 0.1), process.kill)
                killer.start()
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()
        hear.close()
    # by the kill, not by an error of its own
    assert process.exitcode == -signal.SIGKILL
    if (folder / "service.json").exists():
        assert not history.live or live_model(folder) in history.live


def live_model(folder: Path) -> str:
    return str(json.loads((folder / "service.json").read_text())["live"]["digest"])


def check(folder: Path, models: Sequence[Path], history: History) -> None:
    """Everything that was acknowledged is there once, and both models have read it in order."""
    known, live = [ServedModel.read(path) for path in models], live_model(folder)
    service = Service(folder, known[0])
    try:
        assert service.live.name == live
        found: dict[str, int] = {}
        stored = [{e.event_key: e for e in shard.log.after(0, 10**7)} for shard in service.shards]
        for name in history.acknowledged:
            for shard, events in zip(service.shards, stored, strict=True):
                event = events.get(shard.log.key_of(name))
                if event is not None:
                    assert name not in found
                    found[name] = event.offset
        assert found == history.acknowledged
        (other,) = [model for model in known if model.name != live]
        service.switch(other)
        service.roll_back()
        for number, shard in enumerate(service.shards):
            events = shard.log.after(0, 10**7)
            # the times of events say in which order they were sent
            assert [event.time for event in events] == sorted(event.time for event in events)
            assert all(service.shard_of(event.user_id) == number for event in events)
            assert len(shard.tables) == 2
            for table in shard.tables.values():
                assert check_against_log(table, shard.log) == shard.log.verify()
    finally:
        service.close()


@pytest.mark.parametrize("kills", forms("KILLS", "3", "40"))
def test_nothing_is_lost_doubled_or_reordered_by_kills(
    tmp_path: Path, nursery: ForkServerContext, kills: str
) -> None:
    history, draw, models = History(), random.Random(0), save_models(tmp_path)
    for number in range(int(kills)):
        life(nursery, tmp_path / "data", models, number, draw, history)
        if number % -(-int(kills) // FULL_CHECKS) == 0:
            check(tmp_path / "data", models, history)
    check(tmp_path / "data", models, history)
    # what `life` waits for; three lives in four are no shorter
    assert len(history.acknowledged) > 20 * int(kills)
    assert history.switches > int(kills) / 4
