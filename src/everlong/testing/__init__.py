"""The seven laws of a :class:`~everlong.models.user_model.UserModel`, checked on random events.

A model that passes :func:`check_model` can be trained, evaluated and served by the rest of the
package. Outside models call it in their own tests.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from everlong.models.user_model import UserModel
from everlong.testing.case import LAWS, NO_FIELDS, TOLERANCE, Case, Draw, LawBroken
from everlong.testing.laws import CHECKS

__all__ = ["LAWS", "TOLERANCE", "LawBroken", "LawReport", "check_model"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LawReport:
    """What was checked: per kept law the largest relative difference, per exempt law the reason."""

    model: str
    dtype: torch.dtype
    kept: Mapping[int, float]
    exempt: Mapping[int, str]

    def __str__(self) -> str:
        lines = [f"{self.model} in {str(self.dtype).removeprefix('torch.')}"]
        for law, name in LAWS.items():
            verdict = (
                f"exempt: {self.exempt[law]}"
                if law in self.exempt
                else f"kept, largest difference {self.kept[law]:.1e}"
            )
            lines.append(f"  {law} {name}: {verdict}")
        return "\n".join(lines)


def check_model(
    model: UserModel,
    *,
    num_users: int = 8,
    max_events: int = 64,
    long_events: int = 2_000,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    fields: Mapping[str, int | None] = NO_FIELDS,
) -> LawReport:
    """A report that the model keeps the seven laws on random events.

    The model itself is not touched: a copy is cast to ``dtype`` and put in eval mode. Choose a
    small configuration, because the laws score the whole catalogue for every event. Laws named
    in ``model.exemptions`` are not checked; they are logged and stand in the report.

    Args:
        model: the model to check, with random weights or trained.
        num_users: users in a batch; their lengths are 1, 0, 63, 2, then random, shuffled.
        max_events: longest history of a batch.
        long_events: length of the one long history of law 1.
        seed: seed of the random events.
        dtype: float64 (tolerance 1e-9) or float32 (1e-4).
        fields: named event fields that the model reads: a number n draws codes 0 .. n-1,
            None draws real numbers.

    Raises:
        LawBroken: names a broken law, what differed and by how much.
        ValueError: if ``dtype`` has no tolerance or a size is too small.
    """
    if dtype not in TOLERANCE:
        raise ValueError(f"expected dtype float64 or float32, received {dtype}")
    if num_users < 2 or max_events < 1:
        raise ValueError(
            "the laws compare users with events: expected num_users >= 2 and max_events >= 1, "
            f"received {num_users} and {max_events}"
        )
    name, exempt = type(model).__name__, dict(model.exemptions)
    for law, reason in exempt.items():
        logger.warning("%s is exempt from law %d (%s): %s", name, law, LAWS[law], reason)
    model = copy.deepcopy(model).to(dtype).eval()
    draw = Draw(
        num_items=model.num_items,
        num_users=num_users,
        max_events=max_events,
        long_events=long_events,
        fields=fields,
        device=device_of(model),
        dtype=dtype,
        generator=torch.Generator().manual_seed(seed),
    )
    kept: dict[int, float] = {}
    with torch.no_grad():
        for law, check in CHECKS:
            if law not in exempt:
                case = Case(law, model, draw)
                check(case)
                kept[law] = max(case.worst, kept.get(law, 0.0))
    return LawReport(model=name, dtype=dtype, kept=dict(sorted(kept.items())), exempt=exempt)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's tensors are; the CPU if it has none."""
    for value in (*model.parameters(), *model.buffers()):
        return value.device
    return torch.device("cpu")
