"""HLLM (Chen et al., arXiv 2409.12740) on the side of the user: a decoder reads item vectors.

What items are is said elsewhere: vectors of their texts, projected to the width of the decoder
(published: the widths are equal and nothing is projected), with or without an embedding of the id.
The score of an item is the cosine of what the decoder says after the last event and the item's
vector, by a learned temperature.

State: that of ``ring``, with M = ``kv_heads * head_dim``.
"""

from __future__ import annotations

from dataclasses import dataclass

from everlong.models.decoder import Decoder, DecoderConfig
from everlong.models.ring import Ring, RingConfig


@dataclass(frozen=True, kw_only=True)
class HLLMConfig(DecoderConfig, RingConfig):
    """Architecture of the user's side of HLLM with a window."""


class HLLM(Ring):
    """A decoder on packed histories; each event sees the last W events, itself included."""

    config: HLLMConfig
    backbone: Decoder

    def __init__(self, config: HLLMConfig) -> None:
        super().__init__(config, Decoder(config))
