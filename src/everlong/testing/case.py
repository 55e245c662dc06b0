"""One law under check: random events, the states they start from, and the comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.state import State
from everlong.models.user_model import UserModel

LAWS: Mapping[int, str] = MappingProxyType(
    {
        1: "fixed size",
        2: "encode = step",
        3: "cut anywhere",
        4: "causal",
        5: "alone = together",
        6: "the state is enough",
        7: "trained = served",
    }
)
"""Number and name of each law."""

TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 1e-9, torch.float32: 1e-4}
)
"""Largest difference allowed, relative to 1 + the largest expected value."""

NO_FIELDS: Mapping[str, int | None] = MappingProxyType({})

PAST_S, NOW_S, LATER_S = 1_500_000_000, 1_600_000_000, 1_700_000_000
"""When the events of carried states, the events under check and their replacements begin."""


class LawBroken(AssertionError):  # noqa: N818 - a law is broken, nothing went wrong in the check
    """A model breaks one of the seven laws; ``law`` is its number."""

    def __init__(self, law: int, message: str) -> None:
        super().__init__(f"law {law} ({LAWS[law]}): {message}")
        self.law = law


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Draws random events, the same ones for the same seed."""

    num_items: int
    num_users: int
    max_events: int
    long_events: int
    fields: Mapping[str, int | None]
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    @property
    def users(self) -> Tensor:
        """``[B]`` every batch row."""
        return torch.arange(self.num_users, device=self.device)

    def order(self) -> Tensor:
        """``[B]`` the batch rows, shuffled."""
        return torch.randperm(self.num_users, generator=self.generator).to(self.device)

    def up_to(self, most: Tensor) -> Tensor:
        """Whole numbers from 0 to ``most [B]``, both included."""
        share = torch.rand(most.shape, generator=self.generator, dtype=torch.float64)
        return (share.to(most.device) * (most + 1)).long().minimum(most)

    def weights(self, *shape: int) -> Tensor:
        """Random weights for a loss."""
        return torch.randn(shape, generator=self.generator, dtype=self.dtype).to(self.device)

    def candidates(self, count: int) -> Tensor:
        """``[count, C]`` item rows, repeats allowed."""
        shape = (count, min(5, self.num_items))
        return torch.randint(self.num_items, shape, generator=self.generator).to(self.device)

    def lengths(self) -> Tensor:
        """``[B]`` history lengths, awkward ones among them, shuffled."""
        lengths = self.up_to(torch.full_like(self.users, self.max_events))
        awkward = [min(length, self.max_events) for length in (1, 0, 63, 2)][: self.num_users]
        lengths[: len(awkward)] = lengths.new_tensor(awkward)
        return lengths[self.order()]

    def events(self, start_s: int, lengths: Tensor) -> Batch:
        """Random events of users with ``lengths [B]``, no earlier than ``start_s``."""
        total, offsets = int(lengths.sum()), offsets_of(lengths)
        # gaps of every size from a tie to days, short enough to stay before the next start
        widest = min(20.0, math.log2((NOW_S - PAST_S) / self.max_events))
        gaps = torch.rand(total, generator=self.generator).mul(widest).exp2().long() - 1
        passed = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)]).to(self.device)
        times = start_s + passed[1:] - passed[offsets[:-1]].repeat_interleave(lengths)
        fields = {
            name: torch.randn(total, generator=self.generator)
            if codes is None
            else torch.randint(codes, (total,), generator=self.generator)
            for name, codes in self.fields.items()
        }
        items = torch.randint(self.num_items, (total,), generator=self.generator)
        moved = {name: values.to(self.device) for name, values in fields.items()}
        return Batch(items=items.to(self.device), times=times, offsets=offsets, fields=moved)


class Case:
    """One law under check on one model; ``worst`` is the largest relative difference so far."""

    def __init__(self, law: int, model: UserModel, draw: Draw) -> None:
        self.law, self.model, self.draw, self.worst = law, model, draw, 0.0

    def starts(self) -> Iterator[tuple[str, State]]:
        """The initial state, then a state after random events."""
        initial = self.model.initial_state(self.draw.num_users)
        yield "from the initial state", initial
        past = self.draw.events(PAST_S, self.draw.lengths())
        yield "from a carried state", self.model.encode(past, initial)[1]

    def events(self, lengths: Tensor | None = None) -> Batch:
        """Random events after those of ``starts``."""
        return self.draw.events(NOW_S, self.draw.lengths() if lengths is None else lengths)

    def breaks(self, message: str) -> LawBroken:
        """The error to raise."""
        return LawBroken(self.law, f"{message} [{type(self.model).__name__}]")

    def same(self, what: str, expected: Tensor, received: Tensor) -> None:
        """Raises unless two tensors agree in shape, dtype and, within the tolerance, values."""
        for fact in ("shape", "dtype"):
            a, b = getattr(expected, fact), getattr(received, fact)
            if a != b:
                raise self.breaks(f"{what}: expected {fact} {a}, received {b}")
        if torch.equal(expected, received):
            return
        tolerance = TOLERANCE[self.draw.dtype] if expected.is_floating_point() else 0.0
        first, second = expected.detach().double(), received.detach().double()
        gap = (first - second).abs().masked_fill(first == second, 0)
        size = first.abs().masked_fill(~first.isfinite(), 0).max()
        worst = float((gap / (1 + size)).max())
        if not worst <= tolerance:  # not "worst > tolerance": a NaN breaks the law too
            raise self.breaks(
                f"{what} differ by {float(gap.max()):.3g}, largest value {float(size):.3g}; "
                f"allowed {tolerance:.0e} of 1 + the largest value"
            )
        self.worst = max(self.worst, worst)

    def same_spec(self, what: str, expected: State, received: State) -> None:
        """Raises unless two states have the same fields, shapes, dtypes and users."""
        try:
            states.check_same(expected, received)
        except (TypeError, ValueError) as error:
            raise self.breaks(f"{what}: {error}") from error

    def same_state(self, what: str, expected: State, received: State) -> None:
        """Raises unless two states agree in spec and values."""
        self.same_spec(what, expected, received)
        names = states.field_names(expected)
        for name, a, b in zip(names, expected, received, strict=True):
            self.same(f"{what}, values of field {name!r}", a, b)


def offsets_of(lengths: Tensor) -> Tensor:
    """``[B + 1]`` where users with ``lengths [B]`` begin and end."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def arrays(events: Batch) -> list[Tensor]:
    """Every tensor of a batch, in a fixed order."""
    return [events.items, events.times, events.offsets, *events.fields.values()]


def pick(events: Batch, users: Tensor, low: Tensor, high: Tensor) -> tuple[Batch, Tensor]:
    """The events ``low .. high - 1 [B']`` of the users at ``users [B']``, and where they stood."""
    lengths = high - low
    offsets = offsets_of(lengths)
    first = events.offsets[users] + low - offsets[:-1]
    index = torch.arange(int(offsets[-1]), device=users.device) + first.repeat_interleave(lengths)
    return events.select(index, offsets), index


def graft(base: Batch, index: Tensor, source: Batch, source_index: Tensor) -> Batch:
    """A copy of ``base`` with the events of ``source`` at ``source_index`` put at ``index``."""
    fields = {
        name: values.index_copy(0, index, source.fields[name][source_index])
        for name, values in base.fields.items()
    }
    return replace(
        base,
        items=base.items.index_copy(0, index, source.items[source_index]),
        times=base.times.index_copy(0, index, source.times[source_index]),
        fields=fields,
    )
