"""Whatever is done to a service, in whatever order: it stands as a plain dictionary says."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.forms import forms
from tests.server_writer import ITEMS, save_models

from everlong.models.batch import Batch
from everlong.models.device import serving
from everlong.server.engine import state_checkpoint as module
from everlong.server.engine.served_model import ServedModel, Wanted
from everlong.server.engine.service import Service
from everlong.server.engine.shard import Shard
from everlong.server.store.log import Event, Receipt
from everlong.server.store.watermark import FACTOR

USERS = st.sampled_from([f"u{n}" for n in range(6)])
# the last of them are not known to the models
NEW = st.lists(st.tuples(USERS, st.integers(0, ITEMS + 3)), min_size=1, max_size=12)
CHAIN = int(FACTOR)


class Taken(NamedTuple):
    """An event that a shard has taken."""

    event: Event
    offset: int


class Story(RuleBasedStateMachine):
    """A service, and beside it what it should hold."""

    models: Sequence[ServedModel] = ()

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.turn = 0
        self.folder = self.root / "data-0"
        self.service = Service(self.folder, self.models[0], shards=2)
        self.users: dict[str, list[Taken]] = {}
        self.late: set[str] = set()
        """Users with a late event: their states depend on when it is read."""
        self.last = [0, 0]
        self.offsets: dict[str, int] = {}
        self.sent: list[Event] = []
        self.live, self.previous = 0, None

    def teardown(self) -> None:
        self.service.close()
        shutil.rmtree(self.root)

    # what is done

    def send(self, events: Sequence[Event]) -> None:
        parts, expected = self.service.by_shard(events), {}
        for number, some in parts.items():
            expected[number] = [self.taken(number, event) for event in some]
        found = [future.result() for future in self.service.ingest(events)]
        assert dict(zip(parts, found, strict=True)) == expected

    def taken(self, number: int, event: Event) -> Receipt:
        if event.event_id in self.offsets:
            return Receipt(self.offsets[event.event_id], False)
        self.last[number] += 1
        mine, offset = self.users.setdefault(str(event.user_id), []), self.last[number]
        if mine and event.time < max(one.event.time for one in mine):
            self.late.add(str(event.user_id))
        mine.append(Taken(event, offset))
        self.offsets[event.event_id] = offset
        self.sent.append(event)
        return Receipt(offset, True)

    @initialize()
    def begin(self) -> None:
        """A service that has nothing."""

    @rule(new=NEW)
    def ingest(self, new: list[tuple[str, int]]) -> None:
        begin = len(self.sent)
        self.send([Event(f"e{n}", *one, 10**6 + n) for n, one in enumerate(new, begin)])

    @rule(new=NEW, twice=st.data())
    def ingest_with_repeats(self, new: list[tuple[str, int]], twice: st.DataObject) -> None:
        begin = len(self.sent)
        events = [Event(f"e{n}", *one, 10**6 + n) for n, one in enumerate(new, begin)]
        again = twice.draw(st.lists(st.sampled_from([*self.sent, *events]), max_size=6))
        self.send([*events, *again])

    @rule(user=USERS, item=st.integers(0, ITEMS - 1), back=st.integers(1, 30))
    def come_late(self, user: str, item: int, back: int) -> None:
        number = len(self.sent)
        self.send([Event(f"e{number}", user, item, 10**6 + number - back)])

    @rule(user=USERS)
    def erase(self, user: str) -> None:
        gone = self.users.pop(user, [])
        assert self.service.erase(user).result() == len(gone)
        # what comes again is known, and has no place
        self.offsets |= {one.event.event_id: 0 for one in gone}
        self.late.discard(user)

    @rule(slices=st.integers(0, 8), shard=st.integers(0, 1))
    def checkpoint(self, slices: int, shard: int) -> None:
        """Some of the states are written, and none of them after that."""
        chosen = self.service.shards[shard]
        chosen.between(lambda: _write_some(chosen, slices)).result()

    @rule()
    def restart(self) -> None:
        self.service.close()
        self.service = Service(self.folder, self.models[0])

    @rule()
    def crash(self) -> None:
        """The service goes on from what is on the disk at this moment."""
        self.turn += 1
        after = self.root / f"data-{self.turn}"
        shutil.copytree(self.folder, after)
        self.service.close()
        shutil.rmtree(self.folder)
        self.folder = after
        self.service = Service(self.folder, self.models[0])

    @rule()
    def switch(self) -> None:
        self.service.switch(self.models[1 - self.live])
        self.live, self.previous = 1 - self.live, self.live

    @precondition(lambda self: self.previous is not None)
    @rule()
    def roll_back(self) -> None:
        self.service.roll_back()
        self.live, self.previous = self.previous, self.live

    @rule(user=USERS, k=st.integers(1, 5))
    def recommend(self, user: str, k: int) -> None:
        found = self.service.recommend(user, Wanted(k=k)).result()
        seen = {one.event.item_id for one in self.users.get(user, [])}
        assert len(found.items) == min(k, ITEMS - len(seen & set(range(ITEMS))))
        assert not seen & set(found.items)
        if user in self.late:
            return
        model = self.models[self.live].model
        with serving(model):
            scores = model.score(model.final_state(Batch.from_histories([self.known(user)])))[0]
        torch.testing.assert_close(
            torch.tensor(found.scores), scores[found.items], rtol=1e-3, atol=1e-4
        )
        left = [item for item in range(ITEMS) if item not in {*seen, *found.items}]
        assert not left or scores[left].max() <= min(found.scores) + 1e-4

    def known(self, user: str) -> list[int]:
        items = [one.event.item_id for one in self.users.get(user, [])]
        return [int(item) for item in items if int(item) < ITEMS]

    # what holds at any time

    @invariant()
    def states_are_those_of_the_plain_model(self) -> None:
        for user in (f"u{n}" for n in range(6)):
            number, mine = self.service.shard_of(user), self.users.get(user, [])
            log = self.service.shards[number].log
            info, history = self.service.info(user), self.service.history(user, 1_000)
            assert [event.offset for event in history[::-1]] == [one.offset for one in mine]
            assert [(event.item_id, event.time) for event in history[::-1]] == [
                (one.event.item_id, one.event.time) for one in mine
            ]
            keys = [log.key_of(one.event.event_id) for one in mine]
            numbers = [int.from_bytes(key[:8], "little") for key in keys]
            for table in self.service.shards[number].tables.values():
                assert (user in table) == bool(mine)
            if not mine:
                assert info is None
                continue
            chain = functools.reduce(lambda chain, one: (chain * CHAIN + one) % 2**64, numbers, 0)
            newest = max(one.event.time for one in mine)
            expected = (mine[-1].offset, len(mine), chain, newest)
            for table in self.service.shards[number].tables.values():
                assert table.watermark(user) == expected
        assert self.service.num_users == len(self.users)

    @invariant()
    def states_are_what_the_models_read(self) -> None:
        users = [user for user in self.users if user not in self.late]
        for number, shard in enumerate(self.service.shards):
            mine = [user for user in users if self.service.shard_of(user) == number]
            for table in shard.tables.values() if mine else ():
                with serving(table.model):
                    expected = table.model.final_state(
                        Batch.from_histories([self.known(user) for user in mine])
                    )
                for a, b in zip(table.read(mine), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    @invariant()
    def models_are_those_that_were_chosen(self) -> None:
        before = None if self.previous is None else self.models[self.previous].name
        found = self.service.previous
        assert self.service.live.name == self.models[self.live].name
        assert (None if found is None else found.name) == before


def _write_some(shard: Shard, slices: int) -> None:
    shard.checkpoint.begin()
    for _ in range(slices):
        shard.checkpoint.write_slice(1)
    shard.checkpoint.abandon()


@pytest.fixture
def _slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    # states are written when the story says so, one at a time
    monkeypatch.setattr(module, "CHECKPOINT_S", 1e6)
    monkeypatch.setattr(module, "SLICE", 1)


@pytest.mark.usefixtures("_slowly")
@pytest.mark.parametrize("steps", forms("STEPS", "10x20", "60x30"))
def test_a_service_agrees_with_the_plain_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: str
) -> None:
    """``10x20`` is 10 stories of 20 steps."""
    stories, length = map(int, steps.split("x"))
    Story.models = [ServedModel.read(folder) for folder in save_models(tmp_path)]
    run_state_machine_as_test(
        Story,
        settings=settings(
            max_examples=stories,
            stateful_step_count=length,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # nothing had to be repaired on the way
    assert not [record for record in caplog.records if record.name.startswith("everlong.server")]
