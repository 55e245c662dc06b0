"""Linear attention of candidates to histories, packed on both sides (arXiv 2406.09742, abstract).

A candidate with query features ``q`` reads of the events before its request, with key features
``f_i``, values ``v_i`` and ages ``T - t_i``, in every head and for every rate of forgetting

    weighted = sum_i  (q . f_i) exp(-rate (T - t_i)) v_i        mass = sum_i (q . f_i) exp(..)

The quotient of both is what attention gives. The sums over events do not depend on the candidate:
``W = sum_i f_i v_i^T`` and ``z = sum_i f_i`` are all that is kept of a history, they can be added
and taken apart in any order, and one pass over a history serves all of its requests.

Work per event, head and rate: F (E + 1) multiply-adds forward and three times as much backward;
per candidate the same. No matrix of candidates by events exists, and sums are not stored per event:
going backward they are made again.

Forms, equal in values and gradients:

* ``reference_attention``: the matrix of candidates and events of each user, for reading, for tests
  and for devices without a kernel.
* ``linear_attention``: what models call; fused loops on CPU.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from everlong.ops.attention_types import Asked, History, Sums


def linear_attention(
    history: History, queries: Tensor, asked: Asked, rates: Tensor, before: Sums
) -> tuple[Tensor, Tensor]:
    """Weighted sums and masses for every candidate, by the fast form.

    Args:
        history: N events of B users.
        queries: ``[P, H, F]`` features of the candidates, not negative.
        asked: the requests that they belong to.
        rates: ``[M]`` rates of forgetting, 1 / seconds; 0 forgets nothing.
        before: sums of the events before those of ``history``.

    Returns:
        ``[P, H, M, E]`` and ``[P, H, M]``. Both are zero where nothing was seen. Sums are of
        float32 or wider, whatever the inputs are.

    Raises:
        ValueError: if shapes do not fit together, or requests are not in order.
    """
    check(history, queries, asked, rates, before)
    # sums over a whole history in bfloat16 would lose what each event adds
    with torch.autocast(queries.device.type, enabled=False):
        history = history._replace(features=wide(history.features), values=wide(history.values))
        before = before._replace(weighted=wide(before.weighted), mass=wide(before.mass))
        queries = wide(queries)
        if queries.device.type != "cpu" or queries.numel() == 0:
            return reference_attention(history, queries, asked, rates, before)
    from everlong.ops.linear_attention_cpu import CpuLinearAttention

    weighted, mass = CpuLinearAttention.apply(  # type: ignore[no-untyped-call]
        history.features,
        history.values,
        queries,
        before.weighted,
        before.mass,
        (history.times, history.offsets, asked, rates, before.at),
    )
    return weighted, mass


def wide(values: Tensor) -> Tensor:
    """The values in float32, or as they are if they are wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def reference_attention(
    history: History, queries: Tensor, asked: Asked, rates: Tensor, before: Sums
) -> tuple[Tensor, Tensor]:
    """The same as ``linear_attention`` from the weights of all pairs, by autograd."""
    check(history, queries, asked, rates, before)
    rows, rate = asked.request_rows, rates.to(queries.dtype)
    owner = asked.user[rows]
    # how much of what was summed up before is left at the time of the request
    kept = torch.exp(-rate * (asked.at[rows] - before.at[owner])[:, None].to(queries.dtype))
    weighted = torch.einsum("phf,phmfe,pm->phme", queries, before.weighted[owner], kept)
    mass = torch.einsum("phf,phmf,pm->phm", queries, before.mass[owner], kept)
    parts = []
    for user, (start, stop) in enumerate(pairwise(history.offsets.tolist())):
        mine = (owner == user).nonzero().flatten()
        request = rows[mine]
        features, values = history.features[start:stop], history.values[start:stop]
        place = torch.arange(stop - start, device=queries.device)
        seen = place < asked.cut[request, None]
        age = (asked.at[request, None] - history.times[start:stop]).to(queries.dtype)
        forgotten = torch.exp(-rate[:, None, None] * age.clamp(min=0)) * seen  # [M, p, n]
        scores = torch.einsum("phf,nhf->hpn", queries[mine], features)
        weights = torch.einsum("hpn,mpn->phmn", scores, forgotten)
        parts.append((mine, torch.einsum("phmn,nhe->phme", weights, values), weights.sum(-1)))
    for mine, more, much in parts:
        weighted, mass = weighted.index_add(0, mine, more), mass.index_add(0, mine, much)
    return weighted, mass


def add_events(before: Sums, history: History, rates: Tensor, *, sign: int = 1) -> Sums:
    """The sums with the events of a history added, or with ``sign=-1`` taken out again.

    Events may come in any order and may be older than what was summed up already. The sums are
    as of the newest time that they ever had.
    """
    newest = latest(before.at, history)
    if history.times.numel() == 0:
        return before
    rate, dtype = rates.to(before.mass.dtype), before.mass.dtype
    kept = torch.exp(-rate * (newest - before.at)[:, None].to(dtype))  # [B, M]
    weighted = before.weighted * kept[:, None, :, None, None]
    mass = before.mass * kept[:, None, :, None]
    lengths = history.offsets.diff()
    owner = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(
        lengths, output_size=history.times.numel()
    )
    age = (newest[owner] - history.times)[:, None].to(dtype)
    weights = sign * torch.exp(-rate * age)  # [N, M]
    more, much = [], []
    for start, stop in pairwise(history.offsets.tolist()):
        part = slice(start, stop)
        # [H, M F, n] x [H, n, E]: one product a head, whatever the number of events
        left = torch.einsum("nhf,nm->hmfn", history.features[part], weights[part])
        more.append(torch.einsum("hmfn,nhe->hmfe", left, history.values[part]))
        much.append(left.sum(-1))
    return Sums(weighted + torch.stack(more), mass + torch.stack(much), newest)


def add_one_each(before: Sums, history: History, rates: Tensor) -> Sums:
    """``add_events`` for exactly one event a user: one product for all users."""
    newest = torch.maximum(before.at, history.times)
    dtype = before.mass.dtype
    if bool((rates == 0).all()):
        more = history.features[:, :, None, :]
        weighted = before.weighted + more[..., None] * history.values[:, :, None, None, :]
        return Sums(weighted, before.mass + more, newest)
    rate = rates.to(dtype)
    kept = torch.exp(-rate * (newest - before.at)[:, None].to(dtype))
    weight = torch.exp(-rate * (newest - history.times)[:, None].to(dtype))
    more = history.features[:, :, None, :] * weight[:, None, :, None]  # [B, H, M, F]
    weighted = torch.addcmul(
        before.weighted * kept[:, None, :, None, None],
        more[..., None],
        history.values[:, :, None, None, :],
    )
    return Sums(weighted, before.mass * kept[:, None, :, None] + more, newest)


def merged(a: Sums, b: Sums, rates: Tensor) -> Sums:
    """The sums of all events of both, of which none may be in both."""
    newest, rate = torch.maximum(a.at, b.at), rates.to(a.mass.dtype)
    kept_a, kept_b = (
        torch.exp(-rate * (newest - sums.at)[:, None].to(a.mass.dtype)) for sums in (a, b)
    )
    weighted = (
        a.weighted * kept_a[:, None, :, None, None] + b.weighted * kept_b[:, None, :, None, None]
    )
    return Sums(
        weighted, a.mass * kept_a[:, None, :, None] + b.mass * kept_b[:, None, :, None], newest
    )


def latest(at: Tensor, history: History) -> Tensor:
    """``[B]`` the newest time of each user, of the sums or of the events."""
    lengths = history.offsets.diff()
    owner = torch.arange(lengths.numel(), device=at.device).repeat_interleave(
        lengths, output_size=history.times.numel()
    )
    return at.scatter_reduce(0, owner, history.times, "amax")


def check(history: History, queries: Tensor, asked: Asked, rates: Tensor, before: Sums) -> None:
    """Raises ``ValueError`` unless everything fits together."""
    events, heads, width = history.features.shape
    users, depth = history.offsets.numel() - 1, history.values.shape[-1]
    expected = {
        "values": (history.values, (events, heads, depth)),
        "times": (history.times, (events,)),
        "queries": (queries, (queries.shape[0], heads, width)),
        "before.weighted": (before.weighted, (users, heads, rates.numel(), width, depth)),
        "before.mass": (before.mass, (users, heads, rates.numel(), width)),
        "before.at": (before.at, (users,)),
        "cut": (asked.cut, asked.user.shape),
        "at": (asked.at, asked.user.shape),
        "candidate offsets": (asked.offsets, (asked.user.numel() + 1,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"linear attention over features {tuple(history.features.shape)} of {users} users "
                f"expects {name} {tuple(shape)}, received {tuple(tensor.shape)}"
            )
    # what is on another device is trusted: reading it would stall its queue
    if not asked.user.is_cpu or asked.user.numel() == 0:
        return
    if int(asked.offsets[-1]) != queries.shape[0]:
        raise ValueError(
            f"expected candidate offsets up to {queries.shape[0]}, the number of queries, "
            f"received {int(asked.offsets[-1])}"
        )
    step, more = asked.user.diff(), asked.cut.diff()
    if bool((step < 0).any()) or bool(((step == 0) & (more < 0)).any()):
        raise ValueError("requests must be in order of user and, within a user, of their cut")
    lengths = history.offsets.diff()[asked.user]
    if bool((asked.cut < 0).any()) or bool((asked.cut > lengths).any()):
        raise ValueError("a request can see 0 up to all events of its user: its cut is outside")
