"""Loading of a text encoder from its description."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everlong.text.encoder import TextEncoder


def load_encoder(about: Mapping[str, Any]) -> TextEncoder:
    """Loads the encoder of a description.

    Args:
        about: the result of ``TextEncoder.describe``; ``"name"`` may be changed to a new path.

    Raises:
        ImportError: without the extra ``text``.
        ValueError: if it cannot be loaded, or its digest differs from the description.
    """
    kind, name = about.get("kind"), about.get("name", "")
    encoder: TextEncoder
    if kind == "causal":
        from everlong.text.causal import CausalEncoder, is_saved

        saved = is_saved(Path(name))
        encoder = CausalEncoder.load(name) if saved else CausalEncoder(name, **about["settings"])
    elif kind == "sentence":
        from everlong.text.sentence import SentenceEncoder

        encoder = SentenceEncoder(name, **about["settings"])
    else:
        raise ValueError(f'expected an encoder of kind "causal" or "sentence", received {kind!r}')
    if encoder.digest != about["digest"]:
        raise ValueError(
            f"{name!r}: expected the encoder with digest {about['digest'][:12]}, received "
            f"{encoder.digest[:12]}; save a trained encoder before you call describe()"
        )
    return encoder
