"""The optimizer: which parameters decay, at which rate each learns, and when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from everlong.models.user_model import UserModel
from everlong.training.settings import LoopConfig


def adamw(
    model: UserModel, config: LoopConfig, encoder: nn.Module | None = None
) -> torch.optim.AdamW:
    """AdamW over the parameters of a model that require gradients."""
    groups = parameter_groups(model, config, encoder)
    return torch.optim.AdamW(groups, lr=config.lr, eps=1e-9, fused=True)


def parameter_groups(
    model: UserModel, config: LoopConfig, encoder: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Parameters with and without weight decay, those of an item encoder apart, for AdamW.

    Parameters of two and more dimensions decay, others do not, but for those that their module
    names in ``weight_decay``.

    Args:
        model: whose parameters.
        config: settings.
        encoder: the part of the model that learns at the rate ``encoder_lr``.
    """
    exceptions = _exceptions(model)
    slow = set() if encoder is None else {id(parameter) for parameter in encoder.parameters()}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = exceptions.get(name, parameter.ndim >= 2)
        if name.rsplit(".", 1)[-1] in model.recurrence_parameters:
            decays = config.decay_recurrence
        decay = config.weight_decay if decays else 0.0
        rate = config.encoder_lr if id(parameter) in slow else config.lr
        groups.setdefault((rate, decay), []).append(parameter)
    # decayed ones first: checkpoints number the parameters in this order
    return [
        {"params": parameters, "weight_decay": decay, "full_lr": rate}
        for (rate, decay), parameters in sorted(groups.items(), key=lambda x: x[0], reverse=True)
    ]


def rate_share(done: float, config: LoopConfig) -> float:
    """The share of the learning rate that holds after a share ``done`` of the run."""
    share = min(1.0, (done + 1e-6) / config.warmup) if config.warmup > 0 else 1.0
    if config.schedule == "cosine":
        share *= 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    return share


def _exceptions(model: UserModel) -> dict[str, bool]:
    """Full names of the parameters that modules declare in ``weight_decay``."""
    found = {}
    for prefix, module in model.named_modules():
        declared: Mapping[str, bool] = getattr(module, "weight_decay", {})
        found.update({f"{prefix}.{name}".lstrip("."): decays for name, decays in declared.items()})
    return found
