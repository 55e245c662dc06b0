"""The newest events of users, whatever order they arrive in: sorted by time, then by item.

A row holds the newest of a user's events without a gap. As many as it has places; fewer if the user
has fewer, or if some were removed. An event that comes late finds its place among them, or is older
than all and not held.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max


class Newest(NamedTuple):
    """The newest events of B users in S places, the newest last, unused places first."""

    items: Tensor  # [B, S] int32
    times: Tensor  # [B, S] int64
    codes: Tensor  # [B, S, X] int32
    filled: Tensor  # [B] int64, how many are there

    @property
    def present(self) -> Tensor:
        """``[B, S]`` which places hold an event."""
        size = self.items.shape[1]
        return torch.arange(size, device=self.filled.device) >= size - self.filled[:, None]


def insert(held: Newest, count: Tensor, new: Newest) -> Newest:
    """The newest of those held and new ones.

    Args:
        held: B users.
        count: ``[B]`` events that each has had so far.
        new: the newest of the events to add.
    """
    # what is older than all that are held, where something older is held no more, may not be next
    oldest = _oldest(held, count)
    return _newest(held, new, new.present & ~_older(new, oldest), held.present)


def merge(a: Newest, count_a: Tensor, b: Newest, count_b: Tensor) -> Newest:
    """The newest events of both, as far back as nothing is missing from either."""
    floors = zip(_oldest(a, count_a), _oldest(b, count_b), strict=True)
    (time_a, time_b), (item_a, item_b) = floors
    later = (time_b > time_a) | ((time_b == time_a) & (item_b > item_a))
    floor = torch.where(later, time_b, time_a), torch.where(later, item_b, item_a)
    return _newest(a, b, b.present & ~_older(b, floor), a.present & ~_older(a, floor))


def remove(held: Newest, count: Tensor, gone: Newest) -> Newest:
    """Those held without some events, one of ``gone [B, 1]`` a row.

    Raises:
        ValueError: if an event is as new as those held but not among them.
    """
    same = (held.times == gone.times) & (held.items == gone.items) & held.present
    same &= (held.codes == gone.codes).all(-1)
    asked = gone.present[:, 0]
    missing = asked & ~same.any(1) & ~_older(gone, _oldest(held, count))[:, 0]
    if bool(missing.any()):
        row = int(missing.nonzero()[0])
        raise ValueError(
            f"row {row}: expected an event of the history, received item {int(gone.items[row, 0])} "
            f"at {int(gone.times[row, 0])}, which is as new as the events that are held but not "
            "among them; check item, time and fields"
        )
    first = same & (same.cumsum(1) == 1) & asked[:, None]
    none = torch.zeros_like(held.filled)
    nothing = Newest(held.items[:, :0], held.times[:, :0], held.codes[:, :0], none)
    return _newest(held, nothing, nothing.present, held.present & ~first)


def last_of(items: Tensor, times: Tensor, codes: Tensor, offsets: Tensor, size: int) -> Newest:
    """The newest ``size`` of packed events ``[N]`` of each user, in whatever order they come."""
    lengths, order = offsets.diff(), sorted_order(items, times, codes, offsets)
    filled = lengths.clamp(max=size)
    place = offsets[1:, None] - size + torch.arange(size, device=items.device)
    there = place >= offsets[1:, None] - filled[:, None]
    if items.numel() == 0:
        order, place = items.new_zeros(1, dtype=torch.int64), torch.zeros_like(place)
        items, times = items.new_zeros(1), times.new_zeros(1)
        codes = codes.new_zeros(1, codes.shape[1])
    index = order[place.clamp(min=0)]
    return Newest(
        items[index].to(torch.int32).masked_fill(~there, 0),
        times[index].masked_fill(~there, 0),
        codes[index].masked_fill(~there[..., None], 0),
        filled,
    )


def sorted_order(items: Tensor, times: Tensor, codes: Tensor, offsets: Tensor) -> Tensor:
    """``[N]`` which event stands at each place when the events of each user are sorted."""
    lengths = offsets.diff()
    user = torch.arange(lengths.numel(), device=items.device).repeat_interleave(
        lengths, output_size=items.numel()
    )
    order = torch.arange(items.numel(), device=items.device)
    inside = user[1:] == user[:-1]
    if not bool((inside & (times[1:] <= times[:-1])).any()):
        return order  # sorted already, and without ties
    for key in (*codes.unbind(1), items, times, user):
        order = order[key[order].argsort(stable=True)]
    return order


def _oldest(held: Newest, count: Tensor) -> tuple[Tensor, Tensor]:
    """Time and item ``[B]`` of the oldest that is held, before all times where all are held."""
    size, partial = held.items.shape[1], count > held.filled
    place = (size - held.filled).clamp(max=max(size - 1, 0))[:, None]
    if size == 0:
        time, item = torch.full_like(count, NEVER), torch.zeros_like(count)
    else:
        time = held.times.gather(1, place)[:, 0]
        item = held.items.gather(1, place)[:, 0].long()
    # all were removed and there are older ones: nothing at all is known of the newest
    time = torch.where(held.filled == 0, torch.full_like(time, NEVER), time)
    return torch.where(partial, time, torch.full_like(time, -NEVER)), item


def _older(events: Newest, than: tuple[Tensor, Tensor]) -> Tensor:
    """``[B, S]`` which events come before a time and item ``[B]``."""
    time, item = (value[:, None] for value in than)
    return (events.times < time) | ((events.times == time) & (events.items < item))


def _newest(a: Newest, b: Newest, use_b: Tensor, use_a: Tensor) -> Newest:
    """The newest of the events of ``a`` and ``b`` that are to be used, in the places of ``a``."""
    size = a.items.shape[1]
    items, times, codes = (torch.cat(both, dim=1) for both in zip(a[:3], b[:3], strict=True))
    used = torch.cat([use_a, use_b], dim=1)
    order = torch.arange(items.shape[1], device=items.device).expand_as(items)
    for key in (*codes.unbind(2), items, times, used.to(torch.int8)):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    order = order[:, order.shape[1] - size :]
    kept = used.gather(1, order)
    return Newest(
        items.gather(1, order).masked_fill(~kept, 0),
        times.gather(1, order).masked_fill(~kept, 0),
        codes.gather(1, order[..., None].expand(-1, -1, codes.shape[2])).masked_fill(
            ~kept[..., None], 0
        ),
        kept.sum(1),
    )
