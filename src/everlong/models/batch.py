"""A packed batch of events: flat arrays and the places where each user's events begin.

Shape alphabet of the whole package: ``B`` users in the batch, ``N`` events of all of them,
``T`` events of one user, ``I`` items of the catalogue, ``C`` candidates, ``D`` model width,
``H`` recurrent channels, ``L`` layers, ``W`` window length, ``K`` results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """``N`` events of ``B`` users, one user after the other, without padding.

    User ``b`` owns the events ``offsets[b]:offsets[b + 1]``, oldest first; a user may own none.

    Attributes:
        items: ``[N]`` int64, item rows (0 .. I-1).
        times: ``[N]`` int64, Unix seconds (or plain positions where the log has no clock).
        offsets: ``[B + 1]`` int64, from 0 to N, never falling.
        fields: named event fields, ``[N]`` each.
    """

    items: Tensor
    times: Tensor
    offsets: Tensor
    fields: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_users(self) -> int:
        return self.offsets.numel() - 1

    @property
    def num_events(self) -> int:
        return self.items.numel()

    @property
    def lengths(self) -> Tensor:
        """``[B]`` events of each user."""
        return self.offsets.diff()

    @property
    def user_rows(self) -> Tensor:
        """``[N]`` the batch row that owns each event."""
        rows = torch.arange(self.num_users, device=self.offsets.device)
        return rows.repeat_interleave(self.lengths, output_size=self.num_events)

    @property
    def next_times(self) -> Tensor:
        """``[N]`` the time of the user's next event of the batch; of the last event its own."""
        following = torch.arange(1, self.num_events + 1, device=self.times.device)
        last = self.offsets[1:][self.lengths > 0] - 1
        return self.times[following.index_copy(0, last, last)]

    @property
    def first_times(self) -> Tensor:
        """``[B]`` the time of each user's first event; of a user without events any time."""
        return self.times[self.offsets[:-1].clamp(max=self.num_events - 1)]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            items=self.items.to(device),
            times=self.times.to(device),
            offsets=self.offsets.to(device),
            fields={name: values.to(device) for name, values in self.fields.items()},
        )

    def select(self, index: Tensor, offsets: Tensor) -> Batch:
        """The events at ``index [M]`` under new ``offsets [B' + 1]``."""
        return replace(
            self,
            items=self.items[index],
            times=self.times[index],
            offsets=offsets,
            fields={name: values[index] for name, values in self.fields.items()},
        )

    @staticmethod
    def from_histories(
        histories: Sequence[Sequence[int]], times: Sequence[Sequence[int]] | None = None
    ) -> Batch:
        """A batch from one list of item rows per user; times default to positions.

        Raises:
            ValueError: if a history and its times differ in length.
        """
        lengths = [len(history) for history in histories]
        if times is None:
            times = [range(n) for n in lengths]
        if [len(t) for t in times] != lengths:
            raise ValueError(
                "each history needs one time per item: "
                f"expected lengths {lengths[:5]}, received {[len(t) for t in times][:5]}"
            )
        return Batch(
            items=torch.tensor([i for h in histories for i in h], dtype=torch.int64),
            times=torch.tensor([t for ts in times for t in ts], dtype=torch.int64),
            offsets=torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0),
        )

    @staticmethod
    def one_event_each(
        items: Tensor, times: Tensor, fields: Mapping[str, Tensor] | None = None
    ) -> Batch:
        """A batch of one event per user, the input of ``step``: ``items [B]``, ``times [B]``."""
        offsets = torch.arange(items.numel() + 1, device=items.device)
        return Batch(items=items, times=times, offsets=offsets, fields=fields or {})


@dataclass(frozen=True, kw_only=True)
class RequestBatch:
    """Requests of B users and the histories that they need, each read once.

    Attributes:
        events: one row a user, up to the last event that one of its requests sees.
        user: ``[Q]`` row of each request's user, never falling.
        cut: ``[Q]`` events of that row before the request, never falling within a user.
        times: ``[Q]`` when it is.
        offsets: ``[Q + 1]``.
        items: ``[P]``.
        labels: ``[P]`` float32, NaN where there is none.
        rows: ``[Q]`` where the request stands among all.
    """

    events: Batch
    user: Tensor
    cut: Tensor
    times: Tensor
    offsets: Tensor
    items: Tensor
    labels: Tensor
    rows: Tensor

    def to(self, device: torch.device | str) -> RequestBatch:
        """The same batch on another device."""
        names = ("user", "cut", "times", "offsets", "items", "labels", "rows")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, events=self.events.to(device), **moved)
