"""The protocol of text encoders, which compute the vector of an item from its text.

``V`` is the width of the vectors. The encoders need the extra ``text``; this module does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from everlong.system.progress import Progress


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """The vectors of ``n`` texts.

    Attributes:
        vectors: ``[n, V]`` float32.
        cut: ``[n]`` bool, whether the text was truncated.
    """

    vectors: np.ndarray
    cut: np.ndarray

    @property
    def num_cut(self) -> int:
        """The number of truncated texts."""
        return int(self.cut.sum())


class TextEncoder(Protocol):
    """A model that computes vectors of texts."""

    @property
    def width(self) -> int:
        """The width of the vectors, ``V``."""

    @property
    def digest(self) -> str:
        """Sha256 (hex) of the weights and of every setting that changes a vector."""

    def encode(self, texts: Sequence[str], *, progress: Progress | None = None) -> Encoded:
        """Encodes ``n`` texts, in order.

        Args:
            texts: the texts; empty ones are allowed.
            progress: counts the encoded texts; by default a new one.
        """

    def describe(self) -> dict[str, Any]:
        """A description for ``load_encoder``, as JSON values."""
