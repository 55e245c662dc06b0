"""LRURec as published: padded rows, complex numbers, recursive doubling, all logits.

Written from the equations of arXiv 2310.02367 and a description of the published code's behaviour.
It uses the parameters of an ``everlong`` LRU, so that both compute the same loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlong.models.lru import LRU, LRUBlock


class PublishedLRU(nn.Module):
    """The published computation on left-padded rows.

    Items are shifted by one: 0 is padding, whose embedding is the start token.
    """

    def __init__(self, model: LRU) -> None:
        super().__init__()
        config = model.config
        self.embedding = nn.Parameter(
            torch.cat([model.start.detach()[None], model.items.table().detach()])
        )
        self.bias = nn.Parameter(model.item_bias.detach().clone())
        self.norm = nn.LayerNorm(config.dim)
        self.norm.load_state_dict(model.norm.state_dict())
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            PublishedBlock(block, config.dropout, config.recurrence_dropout)  # type: ignore[arg-type]
            for block in model.blocks
        )

    def forward(self, items: Tensor) -> Tensor:
        """Logits ``[B, T, I]`` for rows of items ``[B, T]`` with zeros on the left."""
        length = items.shape[1]
        padded = 1 << (length - 1).bit_length()
        values = self.norm(self.dropout(functional.embedding(items, self.embedding)))
        values = functional.pad(values, (0, 0, padded - length, 0))
        mask = functional.pad(items > 0, (padded - length, 0))
        for block in self.blocks:
            values = block(values, mask)
        return values[:, -length:] @ self.embedding[1:].T + self.bias

    def loss(self, items: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy at the positions whose label is not padding."""
        logits = self(items)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten() - 1, ignore_index=-1)


class PublishedBlock(nn.Module):
    """One block, with complex projections and the recursion over a padded row."""

    def __init__(self, block: LRUBlock, dropout: float, recurrence_dropout: float) -> None:
        super().__init__()
        recurrence = block.recurrence
        names = ("nu_log", "theta_log", "gamma_log")
        self.params_log = nn.Parameter(
            torch.stack([getattr(recurrence, name).detach() for name in names])
        )
        half = block.enter.weight.shape[0] // 2
        enter, leave = block.enter, block.leave
        self.enter_weight = nn.Parameter(
            torch.complex(enter.weight.detach()[:half], enter.weight.detach()[half:])
        )
        self.enter_bias = nn.Parameter(
            torch.complex(enter.bias.detach()[:half], enter.bias.detach()[half:])
        )
        # Re(C h) = Re C Re h - Im C Im h
        self.leave_weight = nn.Parameter(
            torch.complex(leave.weight.detach()[:, :half], -leave.weight.detach()[:, half:])
        )
        self.leave_bias = nn.Parameter(
            torch.complex(leave.bias.detach(), torch.zeros_like(leave.bias.detach()))
        )
        self.recurrence_norm, self.ffn_norm = _copy(block.recurrence_norm), _copy(block.ffn_norm)
        self.widen, self.narrow = _copy(block.widen), _copy(block.narrow)
        self.dropout, self.recurrence_dropout = nn.Dropout(dropout), nn.Dropout(recurrence_dropout)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        nu, theta, gamma = self.params_log.exp()
        decay = torch.exp(torch.complex(-nu, theta))
        hidden = functional.linear(values.to(torch.cfloat), self.enter_weight, self.enter_bias)
        hidden = self._recursion(hidden * gamma, decay, mask)
        mixed = functional.linear(hidden, self.leave_weight, self.leave_bias).real
        values = self.recurrence_norm(self.recurrence_dropout(mixed) + values)
        inner = self.dropout(functional.gelu(self.widen(values)))
        return self.ffn_norm(self.dropout(self.narrow(inner)) + values)

    @staticmethod
    def _recursion(hidden: Tensor, decay: Tensor, mask: Tensor) -> Tensor:
        rows, length, channels = hidden.shape
        powers, block = decay[None], 2
        while block <= length:
            pairs = hidden.reshape(rows * length // block, block, channels)
            keep = mask.reshape(rows * length // block, block)[:, block // 2 - 1]
            first, second = pairs[:, : block // 2], pairs[:, block // 2 :]
            carry = first[:, -1:] * keep[:, None, None]
            hidden = torch.cat([first, second + powers * carry], dim=1)
            powers = torch.cat([powers, powers * powers[-1]])
            block *= 2
        return hidden.reshape(rows, length, channels)


def _copy(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.LayerNorm):
        twin: nn.Module = nn.LayerNorm(module.normalized_shape)
    elif isinstance(module, nn.Linear):
        twin = nn.Linear(module.in_features, module.out_features)
    else:
        raise TypeError(f"cannot copy {type(module).__name__}")
    twin.load_state_dict(module.state_dict())
    return twin
