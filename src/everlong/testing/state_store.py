"""The conformance suite of :class:`~everlong.server.store.state_store.StateStore`."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from everlong.server.store.log import Id
from everlong.server.store.state_store import Mark, StateStore
from everlong.testing.contract import ContractBroken, expect

USERS: tuple[Id, ...] = ("a", "ä'\"\0c", "", 1, "1", -(1 << 63), *range(100, 120))
MODELS = ("0" * 32, "f" * 32, "0123456789abcdef" * 2)


def check_state_store(
    open_store: Callable[[Path], AbstractContextManager[StateStore]],
    folder: Path,
    *,
    steps: int = 200,
    seed: int = 0,
) -> None:
    """Checks a store against a plain dictionary, over writes, erasures, deletions and new starts.

    Args:
        open_store: opens the store of a folder, empty where there is none.
        folder: an empty folder.
        steps: how many things are done.
        seed: of what is done.

    Raises:
        ContractBroken: names what differs.
    """
    draw = random.Random(seed)  # noqa: S311 - of tests
    records: dict[str, dict[Id, bytes]] = {}
    marks: dict[str, Mark] = {}
    done = 0
    while done < steps:
        # a new start after every 20 steps
        with open_store(folder) as store:
            _check(store, records, marks)
            for done in range(done, done + 20):  # noqa: B020
                _step(store, records, marks, draw)
                if done % 5 == 0:
                    _check(store, records, marks)
            done += 1


def _step(
    store: StateStore,
    records: dict[str, dict[Id, bytes]],
    marks: dict[str, Mark],
    draw: random.Random,
) -> None:
    model = draw.choice(MODELS)
    match draw.choices(range(3), [8, 2, 1])[0]:
        case 0:
            some = [
                (user, draw.randbytes(draw.choice([0, 80, 9_000])))
                for user in draw.sample(USERS, draw.randrange(len(USERS)))
            ]
            mark = (
                Mark(draw.randrange(1 << 62), draw.random() < 0.5) if draw.random() < 0.4 else None
            )
            store.write(model, some, mark)
            if some:
                records.setdefault(model, {}).update(some)
            if mark is not None:
                marks[model] = mark
        case 1:
            user = draw.choice(USERS)
            store.erase(user)
            for mine in records.values():
                for one in [one for one in mine if type(one) is type(user) and one == user]:
                    del mine[one]
        case 2:
            rounds = 1
            while store.delete_some(model):
                expect("the mark while records are deleted", store.mark(model), None)
                rounds += 1
                if rounds > 100_000:
                    raise ContractBroken("delete_some: expected an end, received none")
            records.pop(model, None)
            marks.pop(model, None)


def _check(store: StateStore, records: dict[str, dict[Id, bytes]], marks: dict[str, Mark]) -> None:
    for model in MODELS:
        expect(f"mark({model})", store.mark(model), marks.get(model))
        for size in (1, 7, 1_000):
            parts = list(store.records(model, size))
            expect("the largest part", max(map(len, parts), default=0) <= size, True)
            found = [(type(user), user, bytes(record)) for part in parts for user, record in part]
            wanted = [(type(user), user, data) for user, data in records.get(model, {}).items()]
            key = lambda one: (one[0].__name__, str(one[1]))
            expect(f"records({model})", sorted(found, key=key), sorted(wanted, key=key))
    there = {model for model, mine in records.items() if mine} | set(marks)
    expect("models()", store.models(), there)
