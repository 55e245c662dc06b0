"""PerSRec over HLLM: learned tokens compress a history that a decoder of item vectors reads.

The stream of ``persrec`` and the cut of ``persrec_paper`` over the decoder of ``hllm``. Published:
one segment, tokens from N(0, 1), and a cached form that is not the one-pass form, because cached
tokens are given a bias of 1 and recent events do not see all of them; here the two are one.
"""

from __future__ import annotations

from dataclasses import dataclass

from everlong.models.decoder import Decoder, DecoderConfig
from everlong.models.persrec import StreamingPerSRec, StreamingPerSRecConfig
from everlong.models.persrec_paper import PublishedPerSRec, PublishedPerSRecConfig


@dataclass(frozen=True, kw_only=True)
class PerSRecHLLMConfig(StreamingPerSRecConfig, DecoderConfig):
    """Architecture of PerSRec on a stream, over a decoder."""


class PerSRecHLLM(StreamingPerSRec):
    """PerSRec on a stream, over a decoder."""

    config: PerSRecHLLMConfig

    def __init__(self, config: PerSRecHLLMConfig) -> None:
        super().__init__(config, Decoder(config))


@dataclass(frozen=True, kw_only=True)
class PublishedPerSRecHLLMConfig(PublishedPerSRecConfig, DecoderConfig):
    """Architecture of PerSRec as published, over a decoder."""


class PublishedPerSRecHLLM(PublishedPerSRec):
    """PerSRec as published, over a decoder."""

    config: PublishedPerSRecHLLMConfig

    def __init__(self, config: PublishedPerSRecHLLMConfig) -> None:
        super().__init__(config, Decoder(config))
