"""Sequential recommendation over whole user histories at a constant cost per event."""

from everlong.events import Events, read_events
from everlong.fit import fit
from everlong.index import open_events
from everlong.interrupt import Interrupted
from everlong.recommender import Recommender, UpdateReport, load
from everlong.split import PAPER, TEMPORAL, Protocol
from everlong.train import TrainConfig

__version__ = "0.1.0"

__all__ = [
    "PAPER",
    "TEMPORAL",
    "Events",
    "Interrupted",
    "Protocol",
    "Recommender",
    "TrainConfig",
    "UpdateReport",
    "fit",
    "load",
    "open_events",
    "read_events",
]
