"""The gain of a place in a list: what ranking metrics of targets and of candidates share."""

from __future__ import annotations

import numpy as np

from everlong.evaluation.interval import Floats


def hit(places: Floats) -> Floats:
    """1 at every place."""
    return np.ones_like(places)


def reciprocal(places: Floats) -> Floats:
    """``1 / place``, places from 1."""
    found: Floats = 1.0 / places
    return found


def discounted(places: Floats, gain: Floats | float = 1.0) -> Floats:
    """``gain / log2(1 + place)``, places from 1, as in Burges et al. 2005 (RankNet)."""
    found: Floats = gain / np.log2(places + 1.0)
    return found
