"""A process that writes events to a shard until it is killed, telling what was acknowledged."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import torch

from everlong.ids import IdMap
from everlong.models.lru import LRU, LRUConfig
from everlong.service import shard as module
from everlong.service.arena import Arena
from everlong.service.log import Event
from everlong.service.shard import Shard

ITEMS = 50


def arena() -> Arena:
    """States of a small model, the same in every process."""
    torch.manual_seed(0)
    model = LRU(LRUConfig(num_items=ITEMS, dim=8, channels=4)).eval()
    return Arena(model, IdMap.from_values(list(range(ITEMS))), b"0123456789abcdef")


def opened(path: Path, capacity: int = 10_000) -> Shard:
    """A shard with its states."""
    shard, states = Shard(path, capacity=capacity), arena()
    shard.restore(states).result()
    shard.add(states).result()
    return shard


def main() -> None:
    torch.set_num_threads(1)
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    # checkpoints come again and again, so that kills fall into them
    module.CHECKPOINT_S = 0.02
    shard, draw = opened(folder / "shard.sqlite"), random.Random(seed)
    print("ready", flush=True)
    sent: list[Event] = []
    began = time.monotonic()
    while time.monotonic() - began < 30:
        group = []
        for _ in range(draw.randint(1, 12)):
            if sent and draw.random() < 0.1:
                group.append(draw.choice(sent[-200:]))
            else:
                name = f"{seed}-{len(sent)}"
                # one item in sixty is not known to the model
                event = Event(name, draw.randrange(30), draw.randrange(60), 10**9 + len(sent))
                group.append(event)
                sent.append(event)
        receipts = shard.submit(group).result()
        told = (f"{e.event_id}:{r.offset}" for e, r in zip(group, receipts, strict=True))
        print(" ".join(told), flush=True)


if __name__ == "__main__":
    main()
