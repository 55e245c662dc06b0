"""The linear scan on CUDA: Triton kernels for packed histories, planar complex as in `linear_scan`.

The work is cut into units, each a run of events of one user; one program walks one unit in one
block of channels, event after event, and neighbouring programs read neighbouring channels. The two
forms differ only in what a unit is:

* single pass: a unit is a user. Bytes moved are the least possible, but few users with long
  histories leave the device idle.
* chunked: a unit is at most ``CHUNK`` events. Forward, the end of every chunk is first computed
  from an empty state, then a walk over each user's chunks gives the state before each chunk
  (``decay^CHUNK`` times the state before, plus that end), then every chunk is scanned from its
  right state. Backward is the same with time reversed and the conjugate decay. The first pass skips
  the last chunk of each user, so it costs at most one more read of the input.

Lengths are known to the device alone and asking for them would stall its queue, so ``chunk_length``
chooses by shapes, and the chunk table is made on the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the scan of CUDA tensors needs the package triton, which is not installed; "
        "run `pip install triton`, or move the model and the batch to the CPU"
    ) from error

BLOCK = 32
"""Channels of one program: one warp, one channel a thread."""

CHUNK = 64
"""Events of one chunk; a power of two. ``2 CHUNK + T / CHUNK`` steps in a row are least near
``sqrt(T / 2)``, and 64 is that for T = 8192."""

FULL_DEVICE = 4096
"""Programs that keep a device busy: 132 multiprocessors of an H100 hold 32 one-warp programs."""

# events in flight in each program: hides the latency of memory behind the walk
STAGES = tl.constexpr(8)


def chunk_length(num_events: int, num_users: int, channels: int) -> int:
    """Events per chunk, or 0 for the single pass.

    The single pass is taken where no history can be longer than a chunk, and where users alone
    fill the device and are not longer than four chunks on average.
    """
    programs = num_users * triton.cdiv(channels, BLOCK)
    fits = num_events <= CHUNK
    full = programs >= FULL_DEVICE and num_events <= 4 * CHUNK * num_users
    return 0 if fits or full else CHUNK


class TritonScan(torch.autograd.Function):
    """``hidden [N, 2H]`` from ``inputs, decay, state, offsets`` as in ``linear_scan``.

    The fifth, optional argument is the chunk length (a power of two, 0 for the single pass);
    without it ``chunk_length`` chooses. Equal inputs give equal bits, gradients included.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        decay: Tensor,
        state: Tensor,
        offsets: Tensor,
        chunk: int | None = None,
    ) -> Tensor:
        inputs, decay, state = inputs.contiguous(), decay.contiguous(), state.contiguous()
        offsets = offsets.contiguous()
        channels = decay.shape[1]
        if chunk is None:
            chunk = chunk_length(inputs.shape[0], state.shape[0], channels)
        if chunk < 0 or chunk & (chunk - 1):
            raise ValueError(
                f"the chunk length is 0 or a power of two, received {chunk}; leave it out to choose"
            )
        hidden = torch.empty_like(inputs)
        ctx.chunk = chunk
        ctx.save_for_backward(hidden, decay, state, offsets)
        if hidden.numel() == 0:
            return hidden
        # kernels start on the current device, which need not be that of the tensors
        with torch.cuda.device_of(inputs):  # type: ignore[no-untyped-call]
            units = _cut(offsets, inputs.shape[0], chunk)
            before = state
            if chunk:
                before = _carry(inputs, decay, state, offsets, units, chunk, reverse=False)
            tensors = (inputs, decay, before, units.starts, units.stops, hidden)
            grid = (units.number, triton.cdiv(channels, BLOCK))
            _forward[grid](*tensors, channels, BLOCK, num_warps=1)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        hidden, decay, state, offsets = ctx.saved_tensors
        d_hidden = grads[0].contiguous()
        d_inputs, d_state = torch.empty_like(hidden), torch.zeros_like(state)
        if hidden.numel() == 0:
            return d_inputs, torch.zeros_like(decay), d_state, None, None
        channels = decay.shape[1]
        with torch.cuda.device_of(hidden):  # type: ignore[no-untyped-call]
            units = _cut(offsets, hidden.shape[0], ctx.chunk)
            after = d_state
            if ctx.chunk:
                after = _carry(d_hidden, decay, state, offsets, units, ctx.chunk, reverse=True)
            partial = state.new_empty(units.number, 2 * channels)
            tensors = (d_hidden, hidden, decay, state, offsets, after, *units)
            grid = (units.number, triton.cdiv(channels, BLOCK))
            _backward[grid](*tensors, d_inputs, d_state, partial, channels, BLOCK, num_warps=1)
        # one partial sum a unit, added up without atomics: equal bits on every run
        d_decay = partial.double().sum(0).to(decay.dtype).reshape(2, -1)
        return d_inputs, d_decay, d_state, None, None


class _Units(NamedTuple):
    """Runs of events ``[starts, stops)`` and the user of each; unused ones are empty."""

    starts: Tensor  # [M] int64
    stops: Tensor
    users: Tensor

    @property
    def number(self) -> int:
        return self.users.numel()


def _cut(offsets: Tensor, num_events: int, chunk: int) -> _Units:
    """Users themselves as units, or their chunks, without waiting for the device."""
    num_users = offsets.numel() - 1
    if not chunk:
        users = torch.arange(num_users, device=offsets.device)
        return _Units(offsets[:-1], offsets[1:], users)
    table = offsets.new_zeros(3, num_events // chunk + num_users)
    _chunks[(num_users,)](offsets, *table, chunk, BLOCK, num_warps=1)
    return _Units(*table)


def _carry(
    values: Tensor,
    decay: Tensor,
    state: Tensor,
    offsets: Tensor,
    units: _Units,
    chunk: int,
    *,
    reverse: bool,
) -> Tensor:
    """``[M, 2H]`` what enters each chunk: the state before it, or the gradient after it."""
    channels = decay.shape[1]
    blocks = triton.cdiv(channels, BLOCK)
    ends = values.new_empty(units.number, 2 * channels)
    _ends[(units.number, blocks)](
        values, decay, offsets, *units, ends, channels, BLOCK, reverse, num_warps=1
    )
    carried = torch.empty_like(ends)
    _carries[(offsets.numel() - 1, blocks)](
        ends, decay, state, offsets, carried, channels, chunk, BLOCK, reverse, num_warps=1
    )
    return carried


@triton.jit
def _slot(first, user, chunk):  # type: ignore[no-untyped-def]
    # where a user's chunks begin in the table. from one user to the next this grows by at least
    # the number of chunks in between, so no two users meet and no running sum is needed
    return first // chunk + user


@triton.jit
def _chunks(offsets, starts, stops, users, CHUNK_LENGTH: tl.constexpr, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    user = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + user), tl.load(offsets + user + 1)
    slot = _slot(first, user, CHUNK_LENGTH)
    count = (last - first + CHUNK_LENGTH - 1) // CHUNK_LENGTH
    for lo in tl.range(0, count, LANES):
        place = lo + tl.arange(0, LANES)
        mask = place < count
        start = first + place * CHUNK_LENGTH
        tl.store(starts + slot + place, start, mask=mask)
        tl.store(stops + slot + place, tl.minimum(start + CHUNK_LENGTH, last), mask=mask)
        tl.store(users + slot + place, user, mask=mask)


@triton.jit
def _ends(  # type: ignore[no-untyped-def]
    values, decay, offsets, starts, stops, users, ends,
    channels, LANES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    # the last value of the scan of one chunk that starts from zero; time runs back in REVERSE
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = lane < channels
    a = tl.load(decay + lane, mask=mask, other=0.0)
    b = tl.load(decay + channels + lane, mask=mask, other=0.0)
    start, stop, user = tl.load(starts + unit), tl.load(stops + unit), tl.load(users + unit)
    if REVERSE:
        b = -b
        used = start > tl.load(offsets + user)
    else:
        used = stop < tl.load(offsets + user + 1)
    # nothing follows the user's last chunk, so its end is not needed
    count = tl.where(used, stop - start, 0)
    re = tl.full([LANES], 0, values.dtype.element_ty)
    im = re
    for place in tl.range(0, count, num_stages=STAGES):
        event = start + place
        if REVERSE:
            event = stop - 1 - place
        row = values + event * 2 * channels + lane
        new_re = a * re - b * im + tl.load(row, mask=mask, other=0.0)
        im = a * im + b * re + tl.load(row + channels, mask=mask, other=0.0)
        re = new_re
    row = ends + unit * 2 * channels + lane
    tl.store(row, re, mask=mask)
    tl.store(row + channels, im, mask=mask)


@triton.jit
def _carries(  # type: ignore[no-untyped-def]
    ends, decay, state, offsets, carried,
    channels, CHUNK_LENGTH: tl.constexpr, LANES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    # from chunk to chunk of one user. every chunk but the last has the full length, and whatever
    # the last one is multiplied with is zero (in REVERSE) or not asked for
    user = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = lane < channels
    # decay^chunk by squaring, in float64 because rounding doubles at each step
    wide_a = tl.load(decay + lane, mask=mask, other=0.0).to(tl.float64)
    wide_b = tl.load(decay + channels + lane, mask=mask, other=0.0).to(tl.float64)
    power = 1
    while power < CHUNK_LENGTH:
        squared = wide_a * wide_a - wide_b * wide_b
        wide_b = 2 * wide_a * wide_b
        wide_a = squared
        power *= 2
    a, b = wide_a.to(decay.dtype.element_ty), wide_b.to(decay.dtype.element_ty)
    first, last = tl.load(offsets + user), tl.load(offsets + user + 1)
    slot = _slot(first, user, CHUNK_LENGTH)
    count = (last - first + CHUNK_LENGTH - 1) // CHUNK_LENGTH
    if REVERSE:
        b = -b
        re = tl.full([LANES], 0, ends.dtype.element_ty)
        im = re
    else:
        row = state + user * 2 * channels + lane
        re = tl.load(row, mask=mask, other=0.0)
        im = tl.load(row + channels, mask=mask, other=0.0)
    for place in tl.range(0, count, num_stages=STAGES):
        unit = slot + place
        if REVERSE:
            unit = slot + count - 1 - place
        shift = unit * 2 * channels + lane
        tl.store(carried + shift, re, mask=mask)
        tl.store(carried + shift + channels, im, mask=mask)
        new_re = a * re - b * im + tl.load(ends + shift, mask=mask, other=0.0)
        im = a * im + b * re + tl.load(ends + shift + channels, mask=mask, other=0.0)
        re = new_re


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    inputs, decay, before, starts, stops, hidden, channels, LANES: tl.constexpr
):
    # h_t = decay h_{t-1} + u_t over one unit, from the state before it
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = lane < channels
    a = tl.load(decay + lane, mask=mask, other=0.0)
    b = tl.load(decay + channels + lane, mask=mask, other=0.0)
    row = before + unit * 2 * channels + lane
    re = tl.load(row, mask=mask, other=0.0)
    im = tl.load(row + channels, mask=mask, other=0.0)
    start, stop = tl.load(starts + unit), tl.load(stops + unit)
    for event in tl.range(start, stop, num_stages=STAGES):
        shift = event * 2 * channels + lane
        new_re = a * re - b * im + tl.load(inputs + shift, mask=mask, other=0.0)
        im = a * im + b * re + tl.load(inputs + shift + channels, mask=mask, other=0.0)
        re = new_re
        tl.store(hidden + shift, re, mask=mask)
        tl.store(hidden + shift + channels, im, mask=mask)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    d_hidden, hidden, decay, state, offsets, after, starts, stops, users,
    d_inputs, d_state, partial, channels, LANES: tl.constexpr,
):  # fmt: skip
    # g_t = dh_t + conj(decay) g_{t+1}; du_t = g_t; d_decay = sum_t g_t conj(h_{t-1});
    # d_state = conj(decay) g_first
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask = lane < channels
    a = tl.load(decay + lane, mask=mask, other=0.0)
    b = tl.load(decay + channels + lane, mask=mask, other=0.0)
    start, stop, user = tl.load(starts + unit), tl.load(stops + unit), tl.load(users + unit)
    # nothing was ever written for the unused rows of the table
    used = mask & (stop > start)
    row = after + unit * 2 * channels + lane
    g_re = tl.load(row, mask=used, other=0.0)
    g_im = tl.load(row + channels, mask=used, other=0.0)
    first = tl.load(offsets + user)
    row = user * 2 * channels + lane
    h_re = tl.load(state + row, mask=mask, other=0.0)
    h_im = tl.load(state + row + channels, mask=mask, other=0.0)
    sum_re = tl.full([LANES], 0, hidden.dtype.element_ty)
    sum_im = sum_re
    for place in tl.range(0, stop - start, num_stages=STAGES):
        event = stop - 1 - place
        shift = event * 2 * channels + lane
        new_re = a * g_re + b * g_im + tl.load(d_hidden + shift, mask=mask, other=0.0)
        g_im = a * g_im - b * g_re + tl.load(d_hidden + shift + channels, mask=mask, other=0.0)
        g_re = new_re
        tl.store(d_inputs + shift, g_re, mask=mask)
        tl.store(d_inputs + shift + channels, g_im, mask=mask)
        # what precedes the user's first event is the state that was carried in
        inside = event > first
        shift -= 2 * channels
        p_re = tl.load(hidden + shift, mask=mask & inside, other=0.0)
        p_im = tl.load(hidden + shift + channels, mask=mask & inside, other=0.0)
        p_re, p_im = tl.where(inside, p_re, h_re), tl.where(inside, p_im, h_im)
        sum_re += g_re * p_re + g_im * p_im
        sum_im += g_im * p_re - g_re * p_im
    write = used & (start == first)
    tl.store(d_state + row, a * g_re + b * g_im, mask=write)
    tl.store(d_state + row + channels, a * g_im - b * g_re, mask=write)
    row = partial + unit * 2 * channels + lane
    tl.store(row, sum_re, mask=mask)
    tl.store(row + channels, sum_im, mask=mask)
