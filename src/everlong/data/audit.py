"""The audit of a log: what its events can and cannot show, in figures and plain words."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import polars as pl

from everlong.data.events import EventFacts, Events

DAY = 86_400
# from here on a share of ascending ids is more than chance: four standard errors and 5 points
CLEAR_ERRORS = 4.0
CLEAR_SHARE = 0.05


@dataclass(frozen=True)
class Quantiles:
    """Minimum, quantiles, mean and maximum of some numbers."""

    min: float
    p10: float
    p50: float
    mean: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class IdOrder:
    """How often the later of two adjacent events has the higher item id; by chance half of them.

    Attributes:
        pairs: adjacent pairs of one user with different items.
        ascending: the share of them that ascend in item id; NaN without pairs.
    """

    pairs: int
    ascending: float

    @property
    def is_clear(self) -> bool:
        """Whether the share differs from one half by more than chance."""
        if self.pairs == 0:
            return False
        off = abs(self.ascending - 0.5)
        return off > CLEAR_SHARE and off > CLEAR_ERRORS * 0.5 / self.pairs**0.5


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Figures of a log. Shares are from 0 to 1, gaps in seconds, times in Unix seconds.

    Attributes:
        pairs: adjacent events of one user.
        long_users: share of users with at least 100, 500 and 1,000 events.
        tied_pairs: share of adjacent pairs with equal times.
        tied_events: share of events that share user and time with another event.
        repeats: events whose user had the item before.
        immediate_repeats: adjacent pairs with the same item.
        duplicates: events equal to an earlier one in user, item, time and all fields.
        id_order: over all adjacent pairs.
        id_order_in_ties: over pairs with equal times.
        id_order_of_last_pairs: over the last pair of each user, where tests are taken.
        gaps: time between adjacent events; None without a clock.
        first_time, last_time: None without a clock.
        top_items_share: share of events on the most popular 1 % of the items.
        items_seen_once: items with a single event.
    """

    facts: EventFacts
    users: int
    items: int
    events: int
    pairs: int
    lengths: Quantiles
    long_users: dict[int, float]
    tied_pairs: float
    tied_events: float
    repeats: int
    immediate_repeats: int
    duplicates: int
    id_order: IdOrder
    id_order_in_ties: IdOrder
    id_order_of_last_pairs: IdOrder
    gaps: Quantiles | None
    first_time: int | None
    last_time: int | None
    top_items_share: float
    items_seen_once: int

    @property
    def has_clock(self) -> bool:
        return self.facts.time_unit != "position"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to beware of, one sentence or two each."""
        found = [*self._order_warnings(), *self._time_warnings(), *self._history_warnings()]
        skipped = sum(self.facts.rows_skipped.values())
        if skipped:
            reasons = ", ".join(f"{n:,} with {why}" for why, n in self.facts.rows_skipped.items())
            found.append(f"{skipped:,} of {self.facts.rows_read:,} rows were skipped: {reasons}.")
        return tuple(found)

    def _order_warnings(self) -> list[str]:
        tied, every = self.id_order_in_ties, self.id_order
        if tied.is_clear:
            return [
                f"The order inside ties follows item id: {tied.ascending:.1%} of "
                f"{tied.pairs:,} tied pairs ascend, against 50 % by chance, so a model can score "
                'by guessing ids. Read the log with ties="random".'
            ]
        if every.is_clear:
            return [
                f"The order of events follows item id: {every.ascending:.1%} of {every.pairs:,} "
                "adjacent pairs ascend, against 50 % by chance, outside of any tie that can still "
                "be seen. This cannot be undone: distrust absolute figures on this log, compare "
                "models only with each other, and confirm claims on a log with true times."
            ]
        return []

    def _time_warnings(self) -> list[str]:
        found = []
        if not self.has_clock:
            found.append(
                "The log has no clock, only positions: time gaps mean nothing, and it cannot be "
                "split by time."
            )
        open_ties = self.tied_pairs - self.facts.finer_pairs / max(self.pairs, 1)
        if open_ties > 0.5:
            found.append(
                f"{open_ties:.1%} of adjacent events share their time: this is basket "
                "data. The order inside a basket has no known meaning; split between baskets, "
                "never inside one."
            )
        elif open_ties > 0.05 and self.facts.ties == "stable":
            found.append(
                f"{open_ties:.1%} of adjacent events share their time, and their order is "
                'that of the file. Compare with ties="random" before trusting next-item figures.'
            )
        if self.first_time is not None and self.first_time <= 0:
            found.append(
                f"The first event is at {_date(self.first_time)}: a time of 0 often stands for "
                "an unknown one."
            )
        return found

    def _history_warnings(self) -> list[str]:
        found = []
        if self.repeats > 0.05 * self.events:
            found.append(
                f"{self.repeats / self.events:.1%} of events repeat an item of the same user: "
                "do not mask seen items, and compare with repeating the last item."
            )
        if self.duplicates:
            found.append(
                f"{self.duplicates:,} events are exact duplicates of an earlier one and are "
                "kept: drop them if they are not real."
            )
        if self.lengths.p50 < 10:
            found.append(
                f"Histories are short: half of the users have {self.lengths.p50:,.0f} events or "
                "fewer. Gains from whole histories can show in few users only."
            )
        if self.items_seen_once > 0.3 * self.items:
            found.append(
                f"{self.items_seen_once:,} of {self.items:,} items have a single event: no model "
                "of ids can learn them."
            )
        return found

    def lines(self) -> list[str]:
        """The audit as text, one line a subject, warnings last."""
        length, order = self.lengths, self.facts
        shares = ", ".join(f">= {n:,}: {share:.1%}" for n, share in self.long_users.items())
        tie_rule = f"random, seed {order.seed}" if order.ties == "random" else "stable"
        finer = f"; fractions of a second order {order.finer_pairs:,}" if order.finer_pairs else ""
        lines = [
            f"events      {self.events:,} of {self.users:,} users on {self.items:,} items",
            f"history     min {length.min:,.0f}, p10 {length.p10:,.0f}, median {length.p50:,.0f}, "
            f"mean {length.mean:,.1f}, p90 {length.p90:,.0f}, p99 {length.p99:,.0f}, "
            f"max {length.max:,.0f}; users {shares}",
            f"ties        {self.tied_pairs:.1%} of adjacent pairs, {self.tied_events:.1%} of "
            f"events (order inside ties: {tie_rule}{finer})",
            f"repeats     {self.repeats:,} events ({self.repeats / self.events:.1%}), "
            f"{self.immediate_repeats:,} at once; exact duplicates {self.duplicates:,}",
            "id order    ascending pairs (chance 50 %): "
            f"all {_order_text(self.id_order)}, in ties {_order_text(self.id_order_in_ties)}, "
            f"last of each user {_order_text(self.id_order_of_last_pairs)}",
            f"popularity  top 1 % of items take {self.top_items_share:.1%} of events; "
            f"{self.items_seen_once:,} items seen once",
        ]
        if self.first_time is not None and self.last_time is not None:
            lines.append(f"time        {_date(self.first_time)} to {_date(self.last_time)} UTC")
        else:
            lines.append("time        positions only")
        if self.gaps is not None:
            gaps = self.gaps
            lines.append(
                f"gaps        p10 {span(gaps.p10)}, median {span(gaps.p50)}, mean "
                f"{span(gaps.mean)}, p90 {span(gaps.p90)}, p99 {span(gaps.p99)}, "
                f"max {span(gaps.max)}"
            )
        lines += [f"note        {message}" for message in order.messages]
        return lines + [f"WARNING     {warning}" for warning in self.warnings]


def audit(events: Events) -> Audit:
    """The audit of events.

    Raises:
        ValueError: if there are none.
    """
    if events.num_events == 0:
        raise ValueError("cannot audit a log without events; expected at least one")
    items, times, offsets = events.items, events.times, events.offsets
    lengths = events.lengths
    last = offsets[1:][lengths > 0] - 1  # [U] the last event of each user
    inside = np.ones(events.num_events - 1, dtype=bool)  # [N - 1] both events of one user
    inside[last[:-1]] = False
    tied = (times[1:] == times[:-1]) & inside
    pairs = int(inside.sum())
    clock = events.facts.time_unit != "position"
    counts = np.bincount(items, minlength=events.num_items)
    final = np.zeros_like(inside)
    final[last[last > 0] - 1] = True
    return Audit(
        facts=events.facts,
        users=events.num_users,
        items=events.num_items,
        events=events.num_events,
        pairs=pairs,
        lengths=_quantiles(lengths),
        long_users={n: float((lengths >= n).mean()) for n in (100, 500, 1000)},
        tied_pairs=_share(tied, inside),
        tied_events=_tied_events(tied) / events.num_events,
        repeats=_repeats(events),
        immediate_repeats=int(((items[1:] == items[:-1]) & inside).sum()),
        duplicates=_duplicates(events, tied),
        id_order=_id_order(items, inside),
        id_order_in_ties=_id_order(items, tied),
        id_order_of_last_pairs=_id_order(items, final & inside),
        gaps=_quantiles(np.diff(times)[inside]) if clock and pairs else None,
        first_time=int(times.min()) if clock else None,
        last_time=int(times.max()) if clock else None,
        top_items_share=_top_share(counts),
        items_seen_once=int((counts == 1).sum()),
    )


def span(seconds: float) -> str:
    """A time span in human words, such as ``3.5 hours``."""
    for size, unit in ((365.25 * DAY, "years"), (DAY, "days"), (3600, "hours"), (60, "minutes")):
        if abs(seconds) >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _order_text(order: IdOrder) -> str:
    return f"{order.ascending:.1%} of {order.pairs:,}" if order.pairs else "none"


def _quantiles(values: np.ndarray) -> Quantiles:
    low, p10, p50, p90, p99, high = np.quantile(values, [0, 0.1, 0.5, 0.9, 0.99, 1]).tolist()
    return Quantiles(low, p10, p50, float(values.mean()), p90, p99, high)


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.sum() / max(int(whole.sum()), 1))


def _id_order(items: np.ndarray, pairs: np.ndarray) -> IdOrder:
    """The id order over the pairs marked in ``pairs [N - 1]``; rows are in the order of ids."""
    different = pairs & (items[1:] != items[:-1])
    count = int(different.sum())
    rising = int((different & (items[1:] > items[:-1])).sum())
    return IdOrder(count, rising / count if count else float("nan"))


def _tied_events(tied: np.ndarray) -> int:
    """How many events are on either side of a tied pair."""
    return int((np.append(tied, False) | np.append(False, tied)).sum())


def _repeats(events: Events) -> int:
    """How many events have an item that their user had before."""
    users = np.repeat(np.arange(events.num_users), events.lengths)
    keys = users * events.num_items + events.items
    keys.sort()
    return int((keys[1:] == keys[:-1]).sum())


def _duplicates(events: Events, tied: np.ndarray) -> int:
    """How many events equal an earlier one in everything; such two are in one tie."""
    index = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
    users = np.searchsorted(events.offsets, index, side="right")
    columns = {"user": users, "time": events.times[index], "item": events.items[index]}
    named = {f"field_{i}": values[index] for i, values in enumerate(events.fields.values())}
    frame = pl.DataFrame(columns | named)
    return frame.height - frame.n_unique()


def _top_share(counts: np.ndarray) -> float:
    """The share of events on the top 1 % of the items, one item at least."""
    top = max(len(counts) // 100, 1)
    return float(np.sort(counts)[-top:].sum() / counts.sum())
