"""The audit of a log: statistics and warnings about what can be measured on it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import polars as pl

from everlong.data.events import EventFacts, Events

DAY = 86_400
# a share of ascending ids that exceeds one half by both is more than chance: standard errors, share
CLEAR_ERRORS = 4.0
CLEAR_SHARE = 0.05


@dataclass(frozen=True)
class Quantiles:
    """Minimum, quantiles, mean and maximum of a sample."""

    min: float
    p10: float
    p50: float
    mean: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class IdOrder:
    """The share of adjacent events in ascending order of item id; one half by chance.

    Attributes:
        pairs: adjacent pairs of one user with different items.
        ascending: the share of pairs whose later event has the higher item id; NaN without pairs.
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
    """Statistics of a log. Shares are from 0 to 1, gaps in seconds, timestamps in Unix seconds.

    Attributes:
        pairs: adjacent events of one user.
        long_users: share of users with at least 100, 500 and 1,000 events.
        tied_pairs: share of adjacent pairs with equal timestamps.
        tied_events: share of events that share user and timestamp with another event.
        repeats: events whose item occurs earlier in the user's history.
        immediate_repeats: adjacent pairs with the same item.
        duplicates: events equal to an earlier one in user, item, timestamp and all fields.
        id_order: over all adjacent pairs.
        id_order_in_ties: over pairs with equal timestamps.
        id_order_of_last_pairs: over the last pair of each user, where test targets are.
        gaps: time between adjacent events; None without timestamps.
        first_time, last_time: None without timestamps.
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
    def has_timestamps(self) -> bool:
        return self.facts.time_unit != "position"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about the log, one or two sentences each."""
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
                f"{tied.pairs:,} tied pairs ascend, against 50 % by chance, so a model scores by "
                'learning the order of ids. Read the log with ties="random".'
            ]
        if every.is_clear:
            return [
                f"The order of events follows item id: {every.ascending:.1%} of {every.pairs:,} "
                "adjacent pairs ascend, against 50 % by chance, outside of the ties in this file. "
                "This cannot be undone: do not trust absolute metrics on this log, compare models "
                "only with each other, and confirm claims on a log with original timestamps."
            ]
        return []

    def _time_warnings(self) -> list[str]:
        found = []
        if not self.has_timestamps:
            found.append(
                "The log has positions instead of timestamps: time gaps are undefined, and it "
                "cannot be split by time."
            )
        open_ties = self.tied_pairs - self.facts.finer_pairs / max(self.pairs, 1)
        if open_ties > 0.5:
            found.append(
                f"{open_ties:.1%} of adjacent events share their timestamp: this is basket "
                "data. The order inside a basket is arbitrary; split between baskets, "
                "never inside one."
            )
        elif open_ties > 0.05 and self.facts.ties == "stable":
            found.append(
                f"{open_ties:.1%} of adjacent events share their timestamp, and their order is "
                'that of the file. Compare with ties="random" before trusting next-item metrics.'
            )
        if self.first_time is not None and self.first_time <= 0:
            found.append(
                f"The first event is at {_date(self.first_time)}: a timestamp of 0 often means an "
                "unknown one."
            )
        return found

    def _history_warnings(self) -> list[str]:
        found = []
        if self.repeats > 0.05 * self.events:
            found.append(
                f"{self.repeats / self.events:.1%} of events repeat an item of the same user: "
                'use seen="keep", and compare with repeating the last item.'
            )
        if self.duplicates:
            found.append(
                f"{self.duplicates:,} events are exact duplicates of an earlier event and are "
                "kept: remove them if they are recording errors."
            )
        if self.lengths.p50 < 10:
            found.append(
                f"Histories are short: half of the users have {self.lengths.p50:,.0f} events or "
                "fewer. Only the other half can benefit from whole histories."
            )
        if self.items_seen_once > 0.3 * self.items:
            found.append(
                f"{self.items_seen_once:,} of {self.items:,} items have a single event: a model "
                "of ids cannot learn them."
            )
        return found

    def lines(self) -> list[str]:
        """The audit as lines of text, warnings last."""
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
    """Audits a log.

    Raises:
        ValueError: if it has no events.
    """
    if events.num_events == 0:
        raise ValueError("expected a log with at least one event, received none")
    items, times, offsets = events.items, events.times, events.offsets
    lengths = events.lengths
    last = offsets[1:][lengths > 0] - 1  # [U] the last event of each user
    inside = np.ones(events.num_events - 1, dtype=bool)  # [N - 1] both events of one user
    inside[last[:-1]] = False
    tied = (times[1:] == times[:-1]) & inside
    pairs = int(inside.sum())
    timed = events.facts.time_unit != "position"
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
        gaps=_quantiles(np.diff(times)[inside]) if timed and pairs else None,
        first_time=int(times.min()) if timed else None,
        last_time=int(times.max()) if timed else None,
        top_items_share=_top_share(counts),
        items_seen_once=int((counts == 1).sum()),
    )


def span(seconds: float) -> str:
    """Formats a time span, for example ``3.5 hours``."""
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
    """Counts the events that belong to a tied pair."""
    return int((np.append(tied, False) | np.append(False, tied)).sum())


def _repeats(events: Events) -> int:
    """Counts the events whose item occurs earlier in the user's history."""
    users = np.repeat(np.arange(events.num_users), events.lengths)
    keys = users * events.num_items + events.items
    keys.sort()
    return int((keys[1:] == keys[:-1]).sum())


def _duplicates(events: Events, tied: np.ndarray) -> int:
    """Counts exact duplicates of earlier events; duplicates always lie in one tie."""
    index = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
    users = np.searchsorted(events.offsets, index, side="right")
    columns = {"user": users, "time": events.times[index], "item": events.items[index]}
    named = {f"field_{i}": values[index] for i, values in enumerate(events.fields.values())}
    frame = pl.DataFrame(columns | named)
    return frame.height - frame.n_unique()


def _top_share(counts: np.ndarray) -> float:
    """The share of events on the top 1 % of the items, at least one item."""
    top = max(len(counts) // 100, 1)
    return float(np.sort(counts)[-top:].sum() / counts.sum())
