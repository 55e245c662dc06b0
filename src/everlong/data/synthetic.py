"""Synthetic logs whose best possible scores are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from everlong.data.arrays import FloatArray, IntArray

FIRST_DAY = 1_672_531_200  # 2023-01-01 00:00 UTC
DAY_S = 86_400


@dataclass(frozen=True, kw_only=True)
class SyntheticLog:
    """A synthetic log with the scores of an oracle.

    Attributes:
        frame: ``user_id, item_id, timestamp`` (Unix seconds, increasing within a user) and further
            columns of some logs; sorted by timestamp, then user.
        best: expected scores of an oracle that knows the generator, for the last event of each user
            given all events before it.
        best_without_cue: the same for an oracle without access to the cue, for logs with one.
        description: a description of the log for users.
    """

    frame: pl.DataFrame
    best: dict[str, float]
    best_without_cue: dict[str, float] = field(default_factory=dict)
    description: str


def best_scores(probabilities: FloatArray) -> dict[str, float]:
    """The expected scores of the best possible ranking, averaged over rows.

    Args:
        probabilities: ``[Q, I]``, the true probability of each item, one event per row. The best
            ranking is by decreasing probability, because all metrics decrease with the rank.
    """
    top = -np.sort(-probabilities, axis=1)[:, :10]
    rank = np.arange(1, top.shape[1] + 1)
    return {
        "HitRate@1": float(top[:, 0].mean()),
        # rounding can move a sum of probabilities to just above or below 1
        "HitRate@10": float(np.round(top.sum(axis=1), 12).mean()),
        "NDCG@10": float((top / np.log2(rank + 1)).sum(axis=1).mean()),
        "MRR@10": float((top / rank).sum(axis=1).mean()),
    }


def markov_transitions(num_items: int, *, num_next: int = 5, seed: int = 0) -> FloatArray:
    """Transition probabilities ``[I, I]`` between items, ``num_next`` non-zero in each row."""
    if not 1 <= num_next <= num_items:
        raise ValueError(
            f"expected num_next between 1 and num_items={num_items}, received {num_next}"
        )
    random = np.random.default_rng([1, seed])
    following = np.argsort(random.random((num_items, num_items)), axis=1)[:, :num_next]
    chances = random.dirichlet(np.ones(num_next), size=num_items)
    matrix = np.zeros((num_items, num_items))
    np.put_along_axis(matrix, following, chances, axis=1)
    return matrix


def markov_chain(
    num_users: int, num_items: int, length: int, *, num_next: int = 5, seed: int = 0
) -> SyntheticLog:
    """Generates a log in which each item depends only on the item before it.

    The transition matrix is ``markov_transitions(num_items, num_next=num_next, seed=seed)``; item
    ids are its rows. Items repeat, so evaluate with ``seen="keep"``.

    Raises:
        ValueError: if a size is invalid.
    """
    _check_least("num_users", num_users, 1)
    _check_least("length", length, 2)
    matrix = markov_transitions(num_items, num_next=num_next, seed=seed)
    random = np.random.default_rng([2, seed])
    items = np.empty((num_users, length), dtype=np.int64)
    items[:, 0] = random.integers(num_items, size=num_users)
    for position in range(1, length):
        items[:, position] = _draw(random, matrix[items[:, position - 1]])
    lengths = np.full(num_users, length)
    return SyntheticLog(
        frame=_frame(random, lengths, {"item_id": items.ravel()}),
        best=best_scores(matrix[items[:, -2]]),
        description=(
            f"{num_users} users with {length} events each; one of {num_next} items follows each of "
            f"the {num_items} items, with probabilities that depend only on that item."
        ),
    )


def long_dependency(
    num_users: int,
    *,
    distances: Sequence[int] = (1000,),
    num_cues: int = 8,
    num_fillers: int = 100,
    episodes: int = 2,
    seed: int = 0,
) -> SyntheticLog:
    """Generates a log whose answers depend only on an event exactly ``distance`` events before.

    A history consists of ``episodes`` episodes: two cues, one of ``num_cues`` for each of two
    kinds, random fillers, an ``ask`` item, and two answers, each determined by its cue and exactly
    ``distance`` events after it. There are two answers, so that the last two events of a history
    are answers: one for validation, one for test. No user has a cue twice, so the best scores hold
    with and without masking of seen items. User ``u`` has the distance at ``u % len(distances)``.

    Further columns: ``is_answer`` (0 or 1) and ``distance`` (0 for other events). Item ids do not
    reveal the role of an item.

    Raises:
        ValueError: if a size is invalid.
    """
    _check_least("num_users", num_users, 1)
    _check_least("num_fillers", num_fillers, 1)
    _check_least("episodes", episodes, 1)
    _check_least("num_cues", num_cues, episodes)
    _check_least("the smallest of distances", min(distances, default=0), 3)
    random = np.random.default_rng([3, seed])
    distance = np.resize(np.asarray(distances, dtype=np.int64), num_users)
    lengths = (distance + 2) * episodes
    first = np.cumsum(lengths) - lengths
    # [num_users, episodes] the first position of each episode
    begin = first[:, None] + np.arange(episodes) * (distance + 2)[:, None]
    answer = begin + distance[:, None]

    num_items = 4 * num_cues + 1 + num_fillers
    fillers = num_items - num_fillers + random.integers(num_fillers, size=lengths.sum())
    rows = fillers.astype(np.int64)
    rows[answer - 1] = 4 * num_cues
    for kind in range(2):
        cue = np.argsort(random.random((num_users, num_cues)), axis=1)[:, :episodes]
        rows[begin + kind] = 2 * kind * num_cues + cue
        rows[answer + kind] = (2 * kind + 1) * num_cues + random.permutation(num_cues)[cue]
    is_answer = np.zeros(len(rows), dtype=np.int8)
    is_answer[answer] = is_answer[answer + 1] = 1

    # an oracle without the cue can only exclude the user's earlier answers
    open_answers = num_cues - episodes + 1
    return SyntheticLog(
        frame=_frame(
            random,
            lengths,
            {
                "item_id": random.permutation(num_items)[rows],
                "is_answer": is_answer,
                "distance": np.repeat(distance, lengths) * is_answer,
            },
        ),
        best=best_scores(np.ones((1, 1))),
        best_without_cue=best_scores(np.full((1, open_answers), 1 / open_answers)),
        description=(
            f"{num_users} users; two items follow each 'ask' item, each determined by a cue "
            f"exactly {', '.join(map(str, sorted(set(distances))))} events before it, with random "
            "items between."
        ),
    )


def demo_log(
    seed: int = 0,
    *,
    num_users: int = 1500,
    num_items: int = 500,
    mean_length: int = 120,
    cycle: int = 24,
    num_titles: int = 6,
    answer_share: float = 0.7,
) -> SyntheticLog:
    """Generates a log with popular items, dependencies on the last item, and long dependencies.

    Each user follows one of ``num_titles`` titles for each of four kinds. Every ``cycle`` events
    the item ``evening`` occurs, followed with high probability by the next part of each of the four
    titles, ``cycle`` events after the part before. The events between are everyday items, drawn by
    popularity or by the item before. No item except ``evening`` repeats for a user, so the best
    scores hold with and without masking of seen items. For a share ``answer_share`` of the users
    the last two events are parts of titles, for the others everyday items. Further column:
    ``is_answer`` (1 for the parts of all evenings except the first). ``best_without_cue`` is for an
    oracle that knows everything except the titles of users.

    Raises:
        ValueError: if a size is invalid.
    """
    _check_least("num_users", num_users, 1)
    _check_least("cycle", cycle, 2 * len(KINDS))
    _check_least("mean_length", mean_length, 2 * cycle)
    _check_least("num_titles", num_titles, 1)
    if not 0 <= answer_share <= 1:
        raise ValueError(f"expected answer_share between 0 and 1, received {answer_share}")
    random = np.random.default_rng([4, seed])
    longest = mean_length + mean_length // 4
    readers = _Readers(
        random, num_users, num_items, cycle=cycle, longest=longest, num_titles=num_titles
    )
    lengths = random.integers(mean_length - mean_length // 4, longest + 1, size=num_users)
    # the position of each last event in the cycle: its end, or between two evenings
    everyday_slot = random.integers(1, readers.evening_slot, size=num_users)
    last_slot = np.where(random.random(num_users) < answer_share, cycle - 1, everyday_slot)

    # all histories end at the same step; shorter ones begin later
    rows = np.zeros((num_users, longest), dtype=np.int64)
    is_answer = np.zeros((num_users, longest), dtype=np.int8)
    for events_left in range(longest - 1, -1, -1):
        slot = (last_slot - events_left) % cycle
        chances = readers.chances(slot, readers.titles)
        column = longest - 1 - events_left
        rows[:, column] = _draw(random, chances)
        is_answer[:, column] = readers.answers(slot)
        if events_left:
            readers.take(np.flatnonzero(lengths > events_left), rows[:, column])
    alive = np.arange(longest) >= longest - lengths[:, None]
    names = pl.Series(readers.names())
    return SyntheticLog(
        frame=_frame(
            random, lengths, {"item_id": names[rows[alive]], "is_answer": is_answer[alive]}
        ),
        best=best_scores(chances),
        best_without_cue=best_scores(
            readers.chances(slot, np.full_like(readers.titles, 1 / num_titles))
        ),
        description=(
            f"{num_users} users with about {mean_length} events of {num_items} items: everyday "
            f"items by popularity and habit, and every {cycle} events the next parts of the "
            f"{', '.join(KINDS)} that the user follows, which only the parts before can tell."
        ),
    )


KINDS = ("novel", "comic", "album", "show")
FOLLOW = 0.9  # probability that the next event is the next part and not an everyday item
HABIT = 0.7  # share of the everyday events that depend on the item before
HABIT_CHANCES = (0.5, 0.25, 0.15, 0.1)


def exposures(
    num_users: int = 500,
    *,
    num_items: int = 200,
    num_groups: int = 10,
    sessions: int = 12,
    shown: int = 5,
    seed: int = 0,
) -> SyntheticLog:
    """Generates a log of exposures with outcomes, for rankers.

    Each item belongs to one group, and each user likes three groups. Exposures are drawn uniformly;
    the outcome is 1 with probability 0.85 for a liked group and 0.15 for another. So only past
    outcomes are informative about the preferences of a user.

    Args:
        num_users, num_items, num_groups: sizes; item ``i`` belongs to group ``i % num_groups``.
        sessions: sessions of each user, about a day apart.
        shown: exposures of a session.
        seed: the random seed.

    Returns:
        A log with the columns ``label`` (float) and ``outcome`` (the same as an integer). ``best``
        has the ``AUC`` of an oracle that knows the liked groups of each user.

    Raises:
        ValueError: if a number is below 1, or there are fewer than four groups.
    """
    for name, value in (("num_users", num_users), ("sessions", sessions), ("shown", shown)):
        _check_least(name, value, 1)
    _check_least("num_groups", num_groups, 4)
    _check_least("num_items", num_items, num_groups)
    random = np.random.default_rng(seed)
    likes = random.random((num_users, num_groups)).argsort(axis=1)[:, :3]
    shape = (num_users, sessions, shown)
    items = random.integers(num_items, size=shape)
    liked = (items[..., None] % num_groups == likes[:, None, None, :]).any(-1)
    outcome = random.random(shape) < np.where(liked, 0.85, 0.15)
    start = DAY_S * np.arange(sessions)[None, :] + random.integers(DAY_S // 2, size=shape[:2])
    times = FIRST_DAY + start[..., None] + np.sort(random.integers(900, size=shape), axis=-1)
    frame = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(num_users), sessions * shown),
            "item_id": items.flatten(),
            "timestamp": times.flatten(),
            "label": outcome.flatten().astype(np.float32),
            "outcome": outcome.flatten().astype(np.int64),
        }
    ).sort("timestamp", "user_id", maintain_order=True)
    # the oracle ranks a pair of outcomes 1 and 0 by liking; equal liking is a tie
    share = liked.mean()
    ones, zeros = share * 0.85, share * 0.15
    one, zero = ones / (ones + (1 - share) * 0.15), zeros / (zeros + (1 - share) * 0.85)
    best = one * (1 - zero) + 0.5 * (one * zero + (1 - one) * (1 - zero))
    return SyntheticLog(
        frame=frame,
        best={"AUC": float(best)},
        description=(
            f"{num_users} users with {shown} exposures in each of {sessions} sessions; they like "
            f"three of {num_groups} groups, which only past outcomes reveal"
        ),
    )


class _Readers:
    """The users of the demo log during generation, with the exact distribution of the next event.

    Item rows: the parts of all titles, kind by kind, the evening, the everyday items.
    """

    def __init__(
        self,
        random: np.random.Generator,
        num_users: int,
        num_items: int,
        *,
        cycle: int,
        longest: int,
        num_titles: int,
    ) -> None:
        self.num_titles = num_titles
        self.evening_slot = cycle - 1 - len(KINDS)
        self.num_parts = (longest - 1 - len(KINDS)) // cycle + 1
        self.evening = len(KINDS) * num_titles * self.num_parts
        num_everyday = num_items - self.evening - 1
        # twice the longest history, so that everyday items remain at the end of every history
        _check_least("num_items", num_items, self.evening + 1 + 2 * longest)
        self.weights = _everyday_weights(random, num_everyday)
        self.seen = np.zeros((num_users, num_everyday), dtype=np.bool_)
        self.previous = np.full(num_users, num_everyday)
        self.evenings = np.zeros(num_users, dtype=np.int64)
        self.part = np.zeros((num_users, len(KINDS)), dtype=np.int64)
        # [num_users, kinds, titles] probability of each title: uniform until the first evening
        self.titles = np.full((num_users, len(KINDS), num_titles), 1 / num_titles)

    def names(self) -> list[str]:
        """The id of each item row, ``[I]``."""
        parts = [
            f"{kind}-{title + 1:02d}-part-{part + 1}"
            for kind in KINDS
            for title in range(self.num_titles)
            for part in range(self.num_parts)
        ]
        return [*parts, "evening", *(f"item-{n:03d}" for n in range(self.seen.shape[1]))]

    def answers(self, slot: IntArray) -> NDArray[np.bool_]:
        """Whether the events at these slots depend on an earlier evening, ``[num_users]``."""
        return (slot > self.evening_slot) & (self.evenings >= 2)

    def chances(self, slot: IntArray, titles: FloatArray) -> FloatArray:
        """Probabilities of each user's next item, ``[num_users, I]``."""
        everyday = self.weights[self.previous] * ~self.seen
        everyday /= everyday.sum(axis=1, keepdims=True)
        chances = np.zeros((len(slot), self.evening + 1 + everyday.shape[1]))
        chances[:, self.evening + 1 :] = everyday
        asked = slot == self.evening_slot
        chances[asked] = 0
        chances[asked, self.evening] = 1
        for kind in range(len(KINDS)):
            # a history may begin after the evening of its cycle; then no parts follow
            due = np.flatnonzero((slot == self.evening_slot + 1 + kind) & (self.evenings > 0))
            follow = np.where(self.evenings[due] == 1, 1.0, FOLLOW)[:, None]
            chances[due] *= 1 - follow
            title = kind * self.num_titles + np.arange(self.num_titles)
            part = title * self.num_parts + self.part[due, kind, None]
            chances[due[:, None], part] = follow * titles[due, kind]
        return chances

    def take(self, users: IntArray, rows: IntArray) -> None:
        """Updates ``users [M]`` with their items of ``rows [num_users]``."""
        rows = rows[users]
        self.evenings[users[rows == self.evening]] += 1
        everyday = rows > self.evening
        choice = rows[everyday] - self.evening - 1
        self.seen[users[everyday], choice] = True
        self.previous[users[everyday]] = choice
        reads = rows < self.evening
        kind, title = np.divmod(rows[reads] // self.num_parts, self.num_titles)
        self.part[users[reads], kind] += 1
        self.titles[users[reads], kind] = np.eye(self.num_titles)[title]


def _everyday_weights(random: np.random.Generator, num_items: int) -> FloatArray:
    """Weights after each everyday item, ``[I + 1, I]``; the last row is for the first event."""
    popularity = random.permutation(1 / (np.arange(num_items) + 5.0))
    popularity /= popularity.sum()
    weights = np.tile((1 - HABIT) * popularity, (num_items + 1, 1))
    weights[-1] = popularity
    following = np.argsort(random.random((num_items, num_items)), axis=1)[:, : len(HABIT_CHANCES)]
    weights[np.arange(num_items)[:, None], following] += HABIT * np.array(HABIT_CHANCES)
    return weights


def _draw(random: np.random.Generator, chances: FloatArray) -> IntArray:
    """Draws an item from each row of ``chances [Q, I]``."""
    reached = np.cumsum(chances, axis=1)
    # scale by the last sum and stay below it, so that rounding cannot draw an impossible item
    total = reached[:, -1]
    threshold = np.minimum(random.random(len(chances)) * total, np.nextafter(total, 0))
    return np.asarray((reached <= threshold[:, None]).sum(axis=1), dtype=np.int64)


def _frame(
    random: np.random.Generator,
    lengths: IntArray,
    columns: dict[str, NDArray[np.generic] | pl.Series],
) -> pl.DataFrame:
    """A log of users with ``lengths`` events each, sorted by timestamp."""
    first = np.cumsum(lengths) - lengths
    # gaps of at least a second, a quarter of a day on average
    gaps = 1 + random.exponential(DAY_S / 4, size=lengths.sum()).astype(np.int64)
    gaps[first] = FIRST_DAY + random.integers(365 * DAY_S, size=len(lengths))
    elapsed = np.cumsum(gaps)
    before = elapsed[first] - gaps[first]
    users = np.repeat(np.arange(len(lengths)), lengths)
    frame = pl.DataFrame(
        {"user_id": users, "item_id": columns["item_id"], "timestamp": elapsed - before[users]}
        | {name: values for name, values in columns.items() if name != "item_id"}
    )
    return frame.sort("timestamp", "user_id")


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"expected {name} of at least {least}, received {value}")
