"""Next-item losses in bounded memory: the table of events x items never exists.

A loss takes user vectors ``[N, D]`` and the item head, and returns the mean over the N events. All
losses go through the scores chunk by chunk, while those of a chunk are still in cache, and let them
go. The full softmax computes its gradients in the same sweep; the losses against drawn items, whose
tables are small, compute the scores once more.

Work per event of the full softmax: 6 D I operations in products (scores, gradient of the vectors,
gradient of the items) and I exponentials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from everlong.models.user_model import ItemEmbeddings

CHUNK_BYTES = 4 << 20
"""Size of one chunk of scores; a few times the second-level cache of a core works best."""

Skip = Callable[[slice], tuple[Tensor, Tensor]]
"""Of some events, the scores that do not count: which of these events, and which columns."""


def full_softmax(
    vectors: Tensor,
    head: ItemEmbeddings,
    targets: Tensor,
    *,
    dtype: torch.dtype | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Mean of ``-log softmax(vectors @ weight.T + bias)[target]`` over all I items.

    Args:
        vectors: ``[N, D]``.
        head: ``weight [I, D]`` and ``bias [I]``.
        targets: ``[N]`` int64.
        dtype: of the products, for example bfloat16; default that of ``vectors``. Sums over
            chunks are kept in float32 or better.
        chunk_bytes: bound on the scores that exist at one time, but for at least 16 rows.

    Raises:
        ValueError: if there is no event, or a target outside the catalogue.
    """
    _check(vectors, head, targets)
    dtype = dtype or vectors.dtype
    rows = max(16, chunk_bytes // (head.bias.numel() * dtype.itemsize))
    loss: Tensor = _FullSoftmax.apply(vectors, head.weight, head.bias, targets, dtype, rows)  # type: ignore[no-untyped-call]
    return loss


def reference_softmax(vectors: Tensor, head: ItemEmbeddings, targets: Tensor) -> Tensor:
    """The same as ``full_softmax`` from the whole table of scores, for tests and comparison."""
    return torch.nn.functional.cross_entropy(vectors @ head.weight.T + head.bias, targets)


class Negatives(NamedTuple):
    """Items drawn as wrong answers, shared by all events of a batch."""

    items: Tensor  # [M] distinct, rising
    log_expected: Tensor  # [M] log of the expected number of times that the item is drawn
    target_log_expected: Tensor  # [I] the same for every item, as targets need it too


class NegativeSampler:
    """Draws negatives in proportion to ``counts ** power``, without repeats.

    Args:
        counts: ``[I]`` how often each item occurs in training.
        number: how many draws; repeats are merged, so that fewer distinct items may come.
        power: 1 follows popularity, 0 is uniform.

    Raises:
        ValueError: if a count is negative or ``number`` is not positive.
    """

    def __init__(self, counts: Tensor, number: int, power: float = 0.75) -> None:
        if number < 1 or bool((counts < 0).any()):
            raise ValueError(
                f"a sampler needs number >= 1 and counts >= 0, received number={number}, "
                f"smallest count {int(counts.min())}"
            )
        # one is added so that every item can be drawn
        share = (counts.double() + 1.0) ** power
        share = share / share.sum()
        self.number = number
        self._cumulative = share.cumsum(0)
        # expected number of distinct appearances among the draws: 1 - (1 - q)^M
        self._log_expected = torch.log(-torch.expm1(number * torch.log1p(-share))).float()

    def draw(self, generator: torch.Generator | None = None) -> Negatives:
        """A fresh set, from torch's generator or the one given."""
        uniform = torch.rand(self.number, dtype=torch.float64, generator=generator)
        drawn = torch.searchsorted(self._cumulative, uniform.to(self._cumulative.device))
        items = drawn.clamp(max=self._cumulative.numel() - 1).unique()  # type: ignore[no-untyped-call]
        return Negatives(items, self._log_expected[items], self._log_expected)


def sampled_softmax(
    vectors: Tensor,
    head: ItemEmbeddings,
    targets: Tensor,
    negatives: Negatives,
    *,
    dtype: torch.dtype | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Mean softmax loss against sampled items, with the logQ correction.

    Every score is lowered by the log of how often the sampler is expected to draw the item (Bengio
    and Senecal 2008), targets included, so that the gradient estimates that of the full softmax. A
    negative that is the target of an event does not count for that event.

    Raises:
        ValueError: if there is no event, or a target outside the catalogue.
    """
    _check(vectors, head, targets)
    dtype = dtype or vectors.dtype
    items = negatives.items
    columns = head.weight[items]
    column_bias = head.bias[items] - negatives.log_expected.to(head.bias.dtype)
    answers = (vectors * head.weight[targets]).sum(1) + head.bias[targets]
    answers = answers - negatives.target_log_expected[targets].to(answers.dtype)
    # where each target stands among the negatives, -1 where it is not one of them
    place = torch.searchsorted(items, targets).clamp(max=items.numel() - 1)
    hits = torch.where(items[place] == targets, place, -1)

    def skip(some: slice) -> tuple[Tensor, Tensor]:
        event = (hits[some] >= 0).nonzero().squeeze(1)
        return event, hits[some][event]

    rows = max(16, chunk_bytes // (_even(items.numel()) * dtype.itemsize))
    others = _log_sum_exp(vectors, columns, column_bias, skip, dtype, rows)
    return (torch.logaddexp(answers, others) - answers).mean()


def infonce(
    vectors: Tensor,
    head: ItemEmbeddings,
    targets: Tensor,
    items: Tensor,
    *,
    same: float = 0.99,
    dtype: torch.dtype | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Mean softmax loss of the target against ``items``, without those that are much like it.

    The loss of the code of PerSRec (arXiv 2601.03479) and of HLLM. There is no correction for how
    often an item is drawn, so draw uniformly. Temperature and length of vectors are the model's.

    Args:
        vectors: ``[N, D]``.
        head: ``weight [I, D]`` and ``bias [I]``.
        targets: ``[N]`` int64.
        items: ``[M]`` int64, the negatives of every event; one that comes twice counts twice.
        same: a negative does not count for an event if the cosine of its vector and that of the
            target is above this. The target itself never counts. Carries no gradient.
        dtype: of the products, as in ``full_softmax``; cosines have the dtype of ``weight``.
        chunk_bytes: bound on the scores, and on the cosines, that exist at one time, but for at
            least 16 rows.

    Raises:
        ValueError: if there is no event or no negative, or one of them is outside the catalogue.
    """
    _check(vectors, head, targets)
    _check_rows("negatives", head, items)
    dtype = dtype or vectors.dtype
    weight = head.weight.detach()
    answered, drawn = normalize(weight[targets]), normalize(weight[items])

    def skip(some: slice) -> tuple[Tensor, Tensor]:
        alike = answered[some] @ drawn.T > same
        # by name as well: a vector of zeros has no cosine, not even with itself
        alike |= targets[some].unsqueeze(1) == items
        event, column = alike.nonzero(as_tuple=True)
        return event, column

    answers = (vectors * head.weight[targets]).sum(1) + head.bias[targets]
    widest = max(dtype.itemsize, weight.dtype.itemsize)
    rows = max(16, chunk_bytes // (_even(items.numel()) * widest))
    others = _log_sum_exp(vectors, head.weight[items], head.bias[items], skip, dtype, rows)
    return (torch.logaddexp(answers, others) - answers).mean()


class NextItemLoss(NamedTuple):
    """A loss as training takes it."""

    function: Callable[[Tensor, ItemEmbeddings, Tensor, Any, torch.dtype], Tensor]
    """Of user vectors, item embeddings, targets, negatives (None without) and the dtype."""

    power: float | None
    """Negatives are drawn by ``counts ** power``; None if the loss is of all items."""


NEXT_ITEM_LOSSES: Mapping[str, NextItemLoss] = {
    "full": NextItemLoss(
        lambda user, head, targets, none, dtype: full_softmax(user, head, targets, dtype=dtype),
        power=None,
    ),
    "sampled": NextItemLoss(
        lambda user, head, targets, drawn, dtype: sampled_softmax(
            user, head, targets, drawn, dtype=dtype
        ),
        power=0.75,
    ),
    "infonce": NextItemLoss(
        lambda user, head, targets, drawn, dtype: infonce(
            user, head, targets, drawn.items, dtype=dtype
        ),
        power=0.0,
    ),
}
"""Every next-item loss by its name, as ``TrainConfig.loss`` takes it."""


def _check(vectors: Tensor, head: ItemEmbeddings, targets: Tensor) -> None:
    if vectors.shape[0] == 0 or vectors.shape[0] != targets.numel():
        raise ValueError(
            "a loss needs one target per user vector and at least one of them, received "
            f"{vectors.shape[0]} vectors and {targets.numel()} targets"
        )
    _check_rows("targets", head, targets)


def _check_rows(what: str, head: ItemEmbeddings, rows: Tensor) -> None:
    if rows.numel() == 0:
        raise ValueError(f"a loss needs {what}: expected at least one item row, received none")
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= head.bias.numel():
        raise ValueError(
            f"{what} are item rows 0 .. {head.bias.numel() - 1}, received {low} .. {high}"
        )


class _FullSoftmax(torch.autograd.Function):
    """Loss and gradients in one sweep over chunks of events."""

    @staticmethod
    def forward(
        ctx: Any,
        vectors: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        rows: int,
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=vectors.device)
        grads = _Grads.like(vectors, weight, bias, wide) if any(ctx.needs_input_grad[:3]) else None
        table, offset = weight.to(dtype), bias.to(dtype)
        # one buffer for all chunks: fresh pages for each would cost as much as a product
        buffer = vectors.new_empty(min(rows, _even(vectors.shape[0])), bias.numel(), dtype=dtype)
        for start in range(0, vectors.shape[0], rows):
            target = targets[start : start + rows]
            number = target.numel()
            part = _even_rows(vectors[start : start + rows].to(dtype), rows)
            scores = torch.addmm(offset, part, table.T, out=buffer[: part.shape[0]])
            chance = torch.softmax(scores, dim=1, out=scores)
            answers = chance[:number].gather(1, target.unsqueeze(1)).squeeze(1)
            total += _losses(answers, part, table, offset, target, wide).double().sum()
            if grads is not None:
                chance[torch.arange(number, device=target.device), target] -= 1.0
                chance[number:] = 0.0
                grads.add(slice(start, start + number), part, table, chance)
        count = vectors.shape[0]
        if grads is not None:
            ctx.save_for_backward(*(g.div_(count) for g in grads))
            ctx.vector_dtype = vectors.dtype
        return (total / count).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_vectors, d_weight, d_bias = (outputs[0] * g for g in ctx.saved_tensors)
        return d_vectors.to(ctx.vector_dtype), d_weight, d_bias, None, None, None


def _losses(
    answers: Tensor,
    part: Tensor,
    table: Tensor,
    offset: Tensor,
    target: Tensor,
    wide: torch.dtype,
) -> Tensor:
    """``[n]`` negative log likelihoods from the chances of the targets."""
    losses = -answers.to(wide).log()
    # a chance too small for its type says little or nothing: those few rows go the long way
    lost = (answers < torch.finfo(answers.dtype).tiny).nonzero().squeeze(1)
    if lost.numel():
        rows = torch.addmm(offset, part[lost], table.T).to(wide)
        losses[lost] = rows.logsumexp(1) - rows.gather(1, target[lost].unsqueeze(1)).squeeze(1)
    return losses


class _Grads(NamedTuple):
    """Running gradients of the three inputs of a loss."""

    vectors: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def like(vectors: Tensor, weight: Tensor, bias: Tensor, wide: torch.dtype) -> _Grads:
        return _Grads(
            torch.empty_like(vectors, dtype=wide),
            torch.zeros_like(weight, dtype=wide),
            torch.zeros_like(bias, dtype=wide),
        )

    def add(self, some: slice, part: Tensor, table: Tensor, d_scores: Tensor) -> None:
        """Adds a chunk, whose rows beyond those of ``some`` are filled up and must be zero."""
        self.vectors[some] = (d_scores @ table)[: some.stop - some.start]
        self.weight.add_(d_scores.T @ part)
        # a product with ones: a sum in a wider type would first copy the whole chunk
        self.bias.add_(d_scores.T @ part.new_ones(part.shape[0]))


def _log_sum_exp(
    vectors: Tensor, columns: Tensor, bias: Tensor, skip: Skip, dtype: torch.dtype, rows: int
) -> Tensor:
    """``[N]`` log-sum-exp of ``vectors @ columns.T + bias``, what ``skip`` names left out."""
    # columns that count for nothing, so that products come in few shapes
    extra = _even(bias.numel()) - bias.numel()
    columns = torch.nn.functional.pad(columns, (0, 0, 0, extra))
    bias = torch.nn.functional.pad(bias, (0, extra), value=-torch.inf)
    sums: Tensor = _LogSumExp.apply(vectors, columns, bias, skip, dtype, rows)  # type: ignore[no-untyped-call]
    return sums


class _LogSumExp(torch.autograd.Function):
    """The sums of ``_log_sum_exp``, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        vectors: Tensor,
        columns: Tensor,
        bias: Tensor,
        skip: Skip,
        dtype: torch.dtype,
        rows: int,
    ) -> Tensor:
        table, offset = columns.to(dtype), bias.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        sums = []
        for start in range(0, vectors.shape[0], rows):
            scores = _scores(vectors, table, offset, skip, start, rows)
            number = min(rows, vectors.shape[0] - start)
            sums.append(scores[:number].to(wide).logsumexp(1))
        result = torch.cat(sums).to(vectors.dtype)
        ctx.save_for_backward(vectors, columns, bias, result)
        ctx.skip, ctx.dtype, ctx.rows = skip, dtype, rows
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        # the rows' weights are known only now, so the scores are computed once more
        vectors, columns, bias, sums = ctx.saved_tensors
        # a row whose columns are all skipped has the sum -inf, and no gradient instead of NaN
        sums = sums.clamp(min=-1e30)
        skip, dtype, rows = ctx.skip, ctx.dtype, ctx.rows
        table, offset = columns.to(dtype), bias.to(dtype)
        grads = _Grads.like(vectors, columns, bias, torch.promote_types(dtype, torch.float32))
        for start in range(0, vectors.shape[0], rows):
            some = slice(start, min(start + rows, vectors.shape[0]))
            number = some.stop - start
            chance = _scores(vectors, table, offset, skip, start, rows)
            chance[:number] -= sums[some].unsqueeze(1).to(chance.dtype)
            chance.exp_()
            chance[:number] *= outputs[0][some].unsqueeze(1)
            chance[number:] = 0.0
            part = _even_rows(vectors[some].to(dtype), rows)
            grads.add(some, part, table, chance)
        d_vectors, d_columns, d_bias = grads
        return d_vectors.to(vectors.dtype), d_columns.to(columns.dtype), d_bias, None, None, None


def _scores(
    vectors: Tensor, table: Tensor, offset: Tensor, skip: Skip, start: int, rows: int
) -> Tensor:
    some = slice(start, start + rows)
    scores = torch.addmm(offset, _even_rows(vectors[some].to(table.dtype), rows), table.T)
    scores[skip(some)] = -torch.inf
    return scores


def _even(number: int) -> int:
    """``number`` rounded up to a multiple of 64.

    The library for narrow products on CPU compiles a kernel for every shape and keeps a thousand of
    them: products whose sizes are never the same twice took gigabytes.
    """
    return -(-number // 64) * 64


def _even_rows(values: Tensor, most: int) -> Tensor:
    """The rows, filled up with zeros to an even number of them or to ``most``."""
    number = min(_even(values.shape[0]), most)
    return torch.nn.functional.pad(values, (0, 0, 0, number - values.shape[0]))
