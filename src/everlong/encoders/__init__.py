"""Item encoders: from the text of an item to its vector, by a language model.

``V`` is the width of the vectors. The models need the extra ``text``; nothing here does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from everlong.progress import Progress


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


class ItemEncoder(Protocol):
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


def load_encoder(about: Mapping[str, Any]) -> ItemEncoder:
    """The encoder that ``describe`` told of.

    Args:
        about: what it told; another ``"name"`` in it is where the files are now.

    Raises:
        ImportError: without the extra ``text``.
        ValueError: if it cannot be loaded, or what is there now is another encoder.
    """
    kind, name = about.get("kind"), about.get("name", "")
    encoder: ItemEncoder
    if kind == "causal":
        from everlong.encoders.causal import CausalEncoder, is_saved

        saved = is_saved(Path(name))
        encoder = CausalEncoder.load(name) if saved else CausalEncoder(name, **about["settings"])
    elif kind == "sentence":
        from everlong.encoders.sentence import SentenceEncoder

        encoder = SentenceEncoder(name, **about["settings"])
    else:
        raise ValueError(f'expected an encoder of kind "causal" or "sentence", received {kind!r}')
    if encoder.digest != about["digest"]:
        raise ValueError(
            f"{name!r} is another encoder now: expected digest {about['digest'][:12]}, received "
            f"{encoder.digest[:12]}; save an encoder after training and before describing it"
        )
    return encoder
