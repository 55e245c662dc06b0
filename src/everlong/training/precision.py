"""The dtype of matrix products in training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

log = logging.getLogger(__name__)

TOLERANCE = 1e-2
"""Relative difference of the first loss at which narrow products are no longer used."""


class Precision:
    """The dtype of products, as the settings ask for it and the first batch allows it.

    Args:
        name: as in the settings.
        device: where the products are computed.
    """

    def __init__(self, name: Literal["auto", "float32", "bfloat16"], device: torch.device) -> None:
        self.device = device
        self.dtype = _named_dtype(name, device)

    @property
    def narrow(self) -> bool:
        """Whether products are narrower than float32."""
        return self.dtype != torch.float32

    @property
    def name(self) -> str:
        """The dtype as text, as checkpoints have it."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[Any]:
        """A block whose products are of the dtype."""
        return torch.autocast(self.device.type, dtype=self.dtype) if self.narrow else nullcontext()

    def choose(self, model: nn.Module, loss: Callable[[], float]) -> None:
        """Falls back to float32 if narrow products change the loss of a batch.

        Args:
            model: put into eval mode.
            loss: computes the loss of one batch under ``autocast``.
        """
        narrow, losses = self.dtype, {}
        model.eval()
        for dtype in (narrow, torch.float32):
            self.dtype = dtype
            # both losses are of the same draws, which come from the CPU's generator
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                losses[dtype] = loss()
        difference = abs(losses[narrow] - losses[torch.float32])
        agrees = difference <= TOLERANCE * losses[torch.float32]
        self.dtype = narrow if agrees else torch.float32
        log.info(
            "first loss %.4f in %s, %.4f in float32: training in %s",
            losses[narrow],
            narrow,
            losses[torch.float32],
            self.dtype,
        )


def _named_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a setting names: bfloat16 for ``auto`` only where it is fast."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = any(capabilities.get(n) is True for n in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32
