"""Item encoders: from the text of an item to its vector, by a language model.

``V`` is the width of the vectors. The models need the extra ``text``; nothing here does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from everlong.system.progress import Progress


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """Vectors of ``n`` texts.

    Attributes:
        vectors: ``[n, V]`` float32.
        cut: ``[n]`` bool, whether the text was longer than the encoder reads.
    """

    vectors: np.ndarray
    cut: np.ndarray

    @property
    def num_cut(self) -> int:
        """Texts that were longer than the encoder reads."""
        return int(self.cut.sum())


class TextEncoder(Protocol):
    """What turns texts into vectors."""

    @property
    def width(self) -> int:
        """Numbers of a vector, ``V``."""

    @property
    def digest(self) -> str:
        """Sha256 (hex) of the weights and of every setting that changes a vector."""

    def encode(self, texts: Sequence[str], *, progress: Progress | None = None) -> Encoded:
        """The vectors of ``n`` texts, in their order.

        Args:
            texts: any; an empty one is encoded as such.
            progress: where to count texts, default one of its own.
        """

    def describe(self) -> dict[str, Any]:
        """What ``load_encoder`` needs, as plain JSON values."""
