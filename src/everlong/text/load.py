"""An encoder by the plain values that describe it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from everlong.text.encoder import TextEncoder


def load_encoder(about: Mapping[str, Any]) -> TextEncoder:
    """The encoder that ``describe`` told of.

    Args:
        about: what it told; another ``"name"`` in it is where the files are now.

    Raises:
        ImportError: without the extra ``text``.
        ValueError: if it cannot be loaded, or what is there now is another encoder.
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
            f"{name!r} is another encoder now: expected digest {about['digest'][:12]}, received "
            f"{encoder.digest[:12]}; save an encoder after training and before describing it"
        )
    return encoder
