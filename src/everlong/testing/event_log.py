"""The conformance suite of :class:`~everlong.server.store.log.EventLog`."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from everlong.server.store.log import Event, EventLog, EventReader, Id, Receipt, Slice, Stored
from everlong.testing.contract import ContractBroken, expect

USERS: tuple[Id, ...] = ("a", "b", "ä'\"\0c", "", 1, "1", -(1 << 63), (1 << 63) - 1)


class _Model:
    """What a log should hold."""

    def __init__(self) -> None:
        self.events: dict[int, Event] = {}
        self.offset_of: dict[str, int] = {}
        self.last = 0

    def append(self, events: list[Event]) -> list[Receipt]:
        return [self._add(event) for event in events]

    def _add(self, event: Event) -> Receipt:
        if event.event_id in self.offset_of:
            return Receipt(self.offset_of[event.event_id], False)
        self.last += 1
        self.events[self.last] = event
        self.offset_of[event.event_id] = self.last
        return Receipt(self.last, True)

    def erase(self, user_id: Id) -> int:
        gone = [n for n, event in self.events.items() if _same(event.user_id, user_id)]
        for offset in gone:
            self.offset_of[self.events.pop(offset).event_id] = 0
        return len(gone)

    def of_user(self, user_id: Id) -> list[tuple[int, Event]]:
        return [(n, event) for n, event in self.events.items() if _same(event.user_id, user_id)]


def check_event_log(
    open_log: Callable[[Path], EventLog], folder: Path, *, steps: int = 120, seed: int = 0
) -> None:
    """Checks a log against a plain dictionary, over appends, repeats, erasures and new starts.

    Crashes are not part of it: how to make them depends on what a log is kept in.

    Args:
        open_log: opens the log of a folder, empty where there is none.
        folder: an empty folder.
        steps: how many things are done.
        seed: of what is done.

    Raises:
        ContractBroken: names what differs.
    """
    draw = random.Random(seed)  # noqa: S311 - of tests
    model = _Model()
    log = open_log(folder)
    try:
        expect("the total of a new log", tuple(log.total), (0, 0))
        salted = log.key_of("e")
        expect("the length of a key", len(salted), 16)
        for step in range(steps):
            match draw.choices(range(4), [10, 2, 1, 2])[0]:
                case 0:
                    events = _some_events(draw, model, step)
                    expect("receipts", log.append(events), model.append(events))
                case 1:
                    user = draw.choice(USERS)
                    expect(f"events that erase({user!r}) took", log.erase(user), model.erase(user))
                case 2:
                    log.close()
                    log.close()
                    log = open_log(folder)
                case 3:
                    log.probe()
                    log.tidy()
            expect("the total", tuple(log.total), (len(model.events), model.last))
            if step % 10 == 0:
                with closing(log.reader()) as reader:
                    for one in (log, reader):
                        _check_reads(one, model, draw)
        expect("a key after new starts", log.key_of("e"), salted)
        _check_a_reader_beside(log, model)
    finally:
        log.close()
    other = folder / "other"
    other.mkdir()
    with closing(open_log(other)) as log:
        if log.key_of("e") == salted:
            raise ContractBroken("keys of one id in two logs: expected others, received the same")


def _some_events(draw: random.Random, model: _Model, step: int) -> list[Event]:
    events = []
    for n in range(draw.choice([0, 1, 3, 40])):
        item: Id = draw.randrange(5) if draw.random() < 0.5 else f"i{draw.randrange(5)}"
        fields = draw.choice([{}, {"x": draw.randrange(9), "y": draw.random()}])
        time = draw.choice([step, -step, (1 << 62) + step])
        events.append(Event(f"{step}-{n}", draw.choice(USERS), item, time, fields))
    known = [*model.offset_of, *(event.event_id for event in events)]
    for name in draw.sample(known, min(3, len(known))):
        # what comes again need not be the same: the id alone decides
        events.append(Event(name, draw.choice(USERS), 0, 0))
    return events


def _check_reads(log: EventReader, model: _Model, draw: random.Random) -> None:
    expect("look()", tuple(log.look()), (len(model.events), model.last))
    everything = [_stored(log, offset, event) for offset, event in model.events.items()]
    expect("after(0)", log.after(0, 1 << 40), everything)
    offset, limit = draw.randrange(model.last + 1), draw.randrange(1, 20)
    some = [stored for stored in everything if stored.offset > offset][:limit]
    expect(f"after({offset}, {limit})", log.after(offset, limit), some)
    size = draw.choice([1, 7, 1_000])
    slices = list(log.slices(offset, size))
    expect("the largest slice", max((len(one.offsets) for one in slices), default=0) <= size, True)
    rows = [row for one in slices for row in zip(*one, strict=True)]
    before = [stored for stored in everything if stored.offset <= offset]
    expect(f"slices({offset})", rows, list(zip(*Slice.of(before), strict=True)))
    for user in (*USERS, "stranger"):
        mine = [_stored(log, *one) for one in model.of_user(user)]
        expect(f"of_user({user!r})", log.of_user(user), mine)
        expect(f"last_of_user({user!r}, 3)", log.last_of_user(user, 3), mine[::-1][:3])
        later = [(one.offset, one.item_id) for one in mine if one.offset > offset]
        found = [tuple(one) for one in log.items_of_user(user, offset)]
        expect(f"items_of_user({user!r}, {offset})", found, later)
    expect("verify()", log.verify(), len(everything))


def _check_a_reader_beside(log: EventLog, model: _Model) -> None:
    """A reader stands still until it looks, and its writer does not wait for it."""
    with closing(log.reader()) as reader:
        before = reader.total
        new = [Event("beside", "a", 1, 1)]
        expect("receipts beside a reader", log.append(new), model.append(new))
        expect("the total of a reader before it looks", reader.total, before)
        expect("the total of a reader that looks", reader.look(), log.total)
        expect(
            "what it reads then", [one.offset for one in reader.after(before.last, 9)], [model.last]
        )


def _stored(log: EventReader, offset: int, event: Event) -> Stored:
    return Stored(offset, log.key_of(event.event_id), *event[1:])


def _same(a: Id, b: Id) -> bool:
    """Whether two ids are one: a number and its text are two."""
    return type(a) is type(b) and a == b
