"""Sequential recommendation over whole user histories at a constant cost per event."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from everlong.system.threads import limit_libraries

if TYPE_CHECKING:
    from everlong.data.event_cache import open_events
    from everlong.data.events import Events, read_events
    from everlong.data.items import ItemTable, read_items
    from everlong.data.split import PAPER, TEMPORAL, Protocol
    from everlong.recommender.fit import fit
    from everlong.recommender.fit_ranker import fit_ranker
    from everlong.recommender.recommender import Recommender, UpdateReport, load
    from everlong.system.interrupt import Interrupted
    from everlong.training.settings import RankerTrainConfig, TrainConfig

__version__ = "0.1.0"

__all__ = [
    "PAPER",
    "TEMPORAL",
    "Events",
    "Interrupted",
    "ItemTable",
    "Protocol",
    "RankerTrainConfig",
    "Recommender",
    "TrainConfig",
    "UpdateReport",
    "fit",
    "fit_ranker",
    "load",
    "open_events",
    "read_events",
    "read_items",
]

# before torch and numba are loaded, which read the environment only once
limit_libraries()

# imported at first use, so that `import everlong` and `everlong --help` do not wait for torch
_HOMES = {
    "PAPER": "everlong.data.split",
    "TEMPORAL": "everlong.data.split",
    "Events": "everlong.data.events",
    "Interrupted": "everlong.system.interrupt",
    "ItemTable": "everlong.data.items",
    "Protocol": "everlong.data.split",
    "RankerTrainConfig": "everlong.training.settings",
    "Recommender": "everlong.recommender.recommender",
    "TrainConfig": "everlong.training.settings",
    "UpdateReport": "everlong.recommender.recommender",
    "fit": "everlong.recommender.fit",
    "fit_ranker": "everlong.recommender.fit_ranker",
    "load": "everlong.recommender.recommender",
    "open_events": "everlong.data.event_cache",
    "read_events": "everlong.data.events",
    "read_items": "everlong.data.items",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
