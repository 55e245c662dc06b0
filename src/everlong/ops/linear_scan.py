"""The linear scan ``h_t = decay * h_{t-1} + u_t`` over packed histories, in real arithmetic.

Complex numbers are kept planar: the last axis of a tensor ``[.., 2H]`` holds H real parts, then H
imaginary parts. Every user starts from the state that is carried in, so histories packed side by
side never touch, and a user without events keeps the state.

Bytes moved per event and layer, forward: read ``u`` and write ``h``, 16 H (2 KB at H = 128, in
float32); backward: read ``dh`` and ``h``, write ``du``, 24 H. Arithmetic: 8 H operations forward.
Recursive doubling, the published form, moves about log2(T) times as much.

Forms, all equal in values and gradients:

* ``reference_scan``: one event after the other, for reading and for tests.
* ``doubling_scan``: the published algorithm, for comparison.
* ``linear_scan``: what models call; a fused loop on CPU, a Triton kernel on CUDA.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from everlong.ops.layout import pad_left, unpad_left

PARALLEL_NUMBERS = 1 << 17
"""Below so many numbers (512 events at H = 128) waking other threads costs more than it saves."""


def linear_scan(
    inputs: Tensor, decay: Tensor, state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """States after every event and after each user's last event, by the fast form.

    Args:
        inputs: ``[N, 2H]`` float32 or float64, planar complex ``u``.
        decay: ``[2, H]``, real and imaginary part.
        state: ``[B, 2H]`` before each user's first event of the batch.
        offsets: ``[B + 1]`` int64.

    Returns:
        ``h [N, 2H]`` and the final states ``[B, 2H]``.

    Raises:
        ValueError: if shapes, dtypes or offsets do not fit together.
    """
    _check_shapes(inputs, decay, state, offsets)
    if inputs.is_cuda:
        from everlong.ops.linear_scan_triton import TritonScan

        scan: type[torch.autograd.Function] = TritonScan
    else:
        scan = _CpuScan
    hidden: Tensor = scan.apply(inputs, decay, state, offsets)  # type: ignore[no-untyped-call]
    return hidden, last_states(hidden, state, offsets)


def reference_scan(
    inputs: Tensor, decay: Tensor, state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as ``linear_scan``, one user and one event at a time, by autograd."""
    _check_shapes(inputs, decay, state, offsets)
    factor = torch.complex(decay[0], decay[1])
    source, before = as_complex(inputs), as_complex(state)
    outputs = []
    for user, (start, stop) in enumerate(pairwise(offsets.tolist())):
        hidden = before[user]
        for event in range(start, stop):
            hidden = factor * hidden + source[event]
            outputs.append(hidden)
    if not outputs:
        return inputs, state
    packed = as_planar(torch.stack(outputs))
    return packed, last_states(packed, state, offsets)


def doubling_scan(
    inputs: Tensor, decay: Tensor, state: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as ``linear_scan``, by the recursion of arXiv 2310.02367, section 3.3.

    Histories are padded on the left to a power of two; each level halves into pairs of blocks and
    adds the last state of the first half, times the powers of the decay, to the second half.
    """
    _check_shapes(inputs, decay, state, offsets)
    if inputs.shape[0] == 0:
        return inputs, state
    factor = torch.complex(decay[0], decay[1])
    longest = int(offsets.diff().max())
    length = 1 << (longest - 1).bit_length()
    hidden = as_complex(pad_left(inputs, offsets, length))  # [B, T, H]
    # a state that is carried in acts as one more input before the first event
    first = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=inputs.device)
    lengths = offsets.diff()
    busy = lengths > 0
    first[busy, (length - lengths[busy])] = True
    carried = (factor * as_complex(state)).unsqueeze(1)
    hidden = hidden + torch.where(first.unsqueeze(-1), carried, torch.zeros_like(carried))
    users, channels = hidden.shape[0], hidden.shape[2]
    powers = factor.unsqueeze(0)  # [block / 2, H]: decay^1, decay^2, ...
    block = 2
    while block <= length:
        pairs = hidden.reshape(users, length // block, 2, block // 2, channels)
        left, right = pairs[:, :, 0], pairs[:, :, 1]
        right = right + powers * left[:, :, -1:]
        hidden = torch.stack([left, right], dim=2).reshape(users, length, channels)
        powers = torch.cat([powers, powers * powers[-1]])
        block *= 2
    packed = unpad_left(as_planar(hidden), offsets)
    return packed, last_states(packed, state, offsets)


def last_states(hidden: Tensor, state: Tensor, offsets: Tensor) -> Tensor:
    """``[B, 2H]`` the state after each user's last event; unchanged for users without events."""
    if hidden.shape[0] == 0:
        return state
    busy = offsets[1:] > offsets[:-1]
    last = hidden[(offsets[1:] - 1).clamp(min=0)]
    return torch.where(busy.unsqueeze(-1), last, state)


def as_complex(planar: Tensor) -> Tensor:
    """``[.., H]`` complex from ``[.., 2H]`` planar."""
    real, imag = planar.chunk(2, dim=-1)
    return torch.complex(real.contiguous(), imag.contiguous())


def as_planar(values: Tensor) -> Tensor:
    """``[.., 2H]`` planar from ``[.., H]`` complex."""
    return torch.cat([values.real, values.imag], dim=-1)


def _check_shapes(inputs: Tensor, decay: Tensor, state: Tensor, offsets: Tensor) -> None:
    width, users = inputs.shape[-1], offsets.numel() - 1
    if decay.shape != (2, width // 2) or width % 2 or state.shape != (users, width):
        raise ValueError(
            "a scan over inputs [N, 2H] expects decay [2, H] and state [B, 2H] with B + 1 offsets; "
            f"received inputs {tuple(inputs.shape)}, decay {tuple(decay.shape)}, "
            f"state {tuple(state.shape)}, {users + 1} offsets"
        )
    dtypes = [tensor.dtype for tensor in (inputs, decay, state)]
    if len(set(dtypes)) > 1 or dtypes[0] not in (torch.float32, torch.float64):
        raise ValueError(
            "a scan expects inputs, decay and state all float32 or all float64; "
            f"received {dtypes}; cast them first"
        )
    # offsets on another device are trusted: reading them would stall its queue
    if offsets.is_cpu and (
        offsets[0] != 0 or offsets[-1] != inputs.shape[0] or bool((offsets.diff() < 0).any())
    ):
        raise ValueError(
            f"offsets expected from 0 to {inputs.shape[0]} (the number of events) and never "
            f"falling; received {offsets[:5].tolist()} .. {offsets[-1:].tolist()}"
        )


class _CpuScan(torch.autograd.Function):
    """The fused loop: one pass over memory forward, one backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, decay: Tensor, state: Tensor, offsets: Tensor) -> Tensor:
        hidden = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        u, rate, before, cuts = (_array(x) for x in (inputs, decay, state, offsets))
        forward = _forward if inputs.numel() >= PARALLEL_NUMBERS else _forward_alone
        forward(u, rate, before, cuts, _array(hidden), _splits(offsets, inputs))
        ctx.save_for_backward(hidden, decay, state, offsets)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        hidden, decay, state, offsets = ctx.saved_tensors
        d_inputs = torch.empty_like(hidden)
        # filled in place through numpy, so contiguous even where the state that came in is not
        d_state = torch.zeros_like(state, memory_format=torch.contiguous_format)
        # one partial sum a user, added up in a fixed order: equal bits for any thread count
        partial = torch.zeros_like(d_state)
        dh, h = _array(grads[0]), _array(hidden)
        rate, before, cuts = (_array(x) for x in (decay, state, offsets))
        du, ds, sums = (_array(x) for x in (d_inputs, d_state, partial))
        backward = _backward if hidden.numel() >= PARALLEL_NUMBERS else _backward_alone
        backward(dh, h, rate, before, cuts, du, ds, sums, _splits(offsets, hidden))
        d_decay = partial.double().sum(0).to(decay.dtype).reshape(2, -1)
        return d_inputs, d_decay, d_state, None


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().contiguous().numpy()
    return array


def _splits(offsets: Tensor, inputs: Tensor) -> int:
    """Into how many blocks of channels a user's work is cut, so that few users keep all cores."""
    users, channels = offsets.numel() - 1, inputs.shape[1] // 2
    return 1 if users >= 16 or channels % 32 else channels // 32


@njit(cache=True, nogil=True)  # pragma: no cover - compiled
def _forward_part(work, u, decay, state, offsets, h, splits):  # type: ignore[no-untyped-def]
    half = decay.shape[1]
    width = half // splits
    user, lo = work // splits, (work % splits) * width
    a, b = decay[0, lo : lo + width], decay[1, lo : lo + width]
    re = state[user, lo : lo + width].copy()
    im = state[user, half + lo : half + lo + width].copy()
    for event in range(offsets[user], offsets[user + 1]):
        u_re, u_im = u[event, lo : lo + width], u[event, half + lo : half + lo + width]
        h_re, h_im = h[event, lo : lo + width], h[event, half + lo : half + lo + width]
        for c in range(width):
            new_re = a[c] * re[c] - b[c] * im[c] + u_re[c]
            new_im = a[c] * im[c] + b[c] * re[c] + u_im[c]
            re[c] = new_re
            im[c] = new_im
            h_re[c] = new_re
            h_im[c] = new_im


@njit(cache=True, nogil=True)  # pragma: no cover - compiled
def _backward_part(work, dh, h, decay, state, offsets, du, d_state, partial, splits):  # type: ignore[no-untyped-def]
    # g_t = dh_t + conj(decay) g_{t+1}; du_t = g_t; d_decay = sum_t g_t conj(h_{t-1})
    half = decay.shape[1]
    width = half // splits
    user, lo = work // splits, (work % splits) * width
    hi, im_lo, im_hi = lo + width, half + lo, half + lo + width
    a, b = decay[0, lo:hi], decay[1, lo:hi]
    g_re, g_im = d_state[user, lo:hi], d_state[user, im_lo:im_hi]
    s_re, s_im = partial[user, lo:hi], partial[user, im_lo:im_hi]
    first = offsets[user]
    for event in range(offsets[user + 1] - 1, first - 1, -1):
        if event > first:
            p_re, p_im = h[event - 1, lo:hi], h[event - 1, im_lo:im_hi]
        else:
            p_re, p_im = state[user, lo:hi], state[user, im_lo:im_hi]
        d_re, d_im = dh[event, lo:hi], dh[event, im_lo:im_hi]
        o_re, o_im = du[event, lo:hi], du[event, im_lo:im_hi]
        for c in range(width):
            # the running gradient is kept already multiplied by conj(decay)
            new_re = d_re[c] + g_re[c]
            new_im = d_im[c] + g_im[c]
            o_re[c] = new_re
            o_im[c] = new_im
            s_re[c] += new_re * p_re[c] + new_im * p_im[c]
            s_im[c] += new_im * p_re[c] - new_re * p_im[c]
            g_re[c] = a[c] * new_re + b[c] * new_im
            g_im[c] = a[c] * new_im - b[c] * new_re


# Two functions each, not one compiled twice: Numba's cache on disk knows a function by its name and
# its code, so that the first of two compilations would be loaded for both.


@njit(parallel=True, cache=True, nogil=True)  # pragma: no cover - compiled
def _forward(u, decay, state, offsets, h, splits):  # type: ignore[no-untyped-def]
    for work in prange((offsets.shape[0] - 1) * splits):
        _forward_part(work, u, decay, state, offsets, h, splits)


@njit(cache=True, nogil=True)  # pragma: no cover - compiled
def _forward_alone(u, decay, state, offsets, h, splits):  # type: ignore[no-untyped-def]
    for work in range((offsets.shape[0] - 1) * splits):
        _forward_part(work, u, decay, state, offsets, h, splits)


@njit(parallel=True, cache=True, nogil=True)  # pragma: no cover - compiled
def _backward(dh, h, decay, state, offsets, du, d_state, partial, splits):  # type: ignore[no-untyped-def]
    for work in prange((offsets.shape[0] - 1) * splits):
        _backward_part(work, dh, h, decay, state, offsets, du, d_state, partial, splits)


@njit(cache=True, nogil=True)  # pragma: no cover - compiled
def _backward_alone(dh, h, decay, state, offsets, du, d_state, partial, splits):  # type: ignore[no-untyped-def]
    for work in range((offsets.shape[0] - 1) * splits):
        _backward_part(work, dh, h, decay, state, offsets, du, d_state, partial, splits)
