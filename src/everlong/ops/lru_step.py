"""One event of a few users through a stack of LRU blocks, compiled as one loop.

A step of a few users is so little work that to call its thirty operations one by one takes many
times longer than the work. ``models/lru.py`` has the readable form, which is used for many users
and for gradients; the two agree to the last bits of float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit


class StepParameters(NamedTuple):
    """Parameters of ``L`` blocks as a step reads them: float32, contiguous.

    Matrices are transposed, so that the inner loop runs along a row.
    """

    decay: np.ndarray  # [L, 2, H]
    enter: np.ndarray  # [L, D, 2H], scaled by gamma
    enter_bias: np.ndarray  # [L, 2H], scaled by gamma
    leave: np.ndarray  # [L, 2H, D]
    leave_bias: np.ndarray  # [L, D]
    widen: np.ndarray  # [L, D, 4D]
    widen_bias: np.ndarray  # [L, 4D]
    narrow: np.ndarray  # [L, 4D, D]
    narrow_bias: np.ndarray  # [L, D]
    norms: np.ndarray  # [L, 2, 2, D]: after recurrence and network, their scale and shift


# sums in any order; NaN and infinity stay what they are
_FLAGS: Any = {"cache": True, "nogil": True, "fastmath": {"reassoc", "contract", "nsz"}}
_HALF_ROOT = np.float32(math.sqrt(0.5))
_ONE, _HALF, _ZERO = np.float32(1.0), np.float32(0.5), np.float32(0.0)


@njit(**_FLAGS)  # pragma: no cover - compiled
def lru_step(
    values: np.ndarray, hidden: np.ndarray, parameters: StepParameters, epsilon: np.float32
) -> None:
    """Moves users past one event each, in place.

    Args:
        values: ``[B, D]`` normalised item vectors; afterwards the outputs of the last block.
        hidden: ``[B, L, 2H]`` recurrent states.
        parameters: of the blocks.
        epsilon: of their norms.
    """
    dim, layers, channels = values.shape[1], hidden.shape[1], hidden.shape[2] // 2
    inputs = np.empty(2 * channels, np.float32)
    mixed, wide = np.empty(dim, np.float32), np.empty(4 * dim, np.float32)
    for user in range(values.shape[0]):
        own = values[user]
        for layer in range(layers):
            state = hidden[user, layer]
            _affine(own, parameters.enter[layer], parameters.enter_bias[layer], inputs)
            re, im = parameters.decay[layer, 0], parameters.decay[layer, 1]
            for n in range(channels):
                a, b = state[n], state[channels + n]
                state[n] = inputs[n] + re[n] * a - im[n] * b
                state[channels + n] = inputs[channels + n] + re[n] * b + im[n] * a
            _affine(state, parameters.leave[layer], parameters.leave_bias[layer], mixed)
            _add_and_normalise(own, mixed, parameters.norms[layer, 0], epsilon)
            _affine(own, parameters.widen[layer], parameters.widen_bias[layer], wide)
            for n in range(wide.size):
                wide[n] *= _HALF * (_ONE + np.float32(math.erf(wide[n] * _HALF_ROOT)))
            _affine(wide, parameters.narrow[layer], parameters.narrow_bias[layer], mixed)
            _add_and_normalise(own, mixed, parameters.norms[layer, 1], epsilon)


@njit(**_FLAGS)  # pragma: no cover - compiled
def _affine(source: np.ndarray, matrix: np.ndarray, bias: np.ndarray, target: np.ndarray) -> None:
    target[:] = bias
    whole = source.size // 4 * 4
    for m in range(0, whole, 4):
        # four rows at once, so that the target is read and written a quarter as often
        a, b, c, d = source[m], source[m + 1], source[m + 2], source[m + 3]
        first, second, third, fourth = matrix[m], matrix[m + 1], matrix[m + 2], matrix[m + 3]
        for n in range(target.size):
            target[n] += a * first[n] + b * second[n] + c * third[n] + d * fourth[n]
    for m in range(whole, source.size):
        for n in range(target.size):
            target[n] += source[m] * matrix[m, n]


@njit(**_FLAGS)  # pragma: no cover - compiled
def _add_and_normalise(
    values: np.ndarray, more: np.ndarray, norm: np.ndarray, epsilon: np.float32
) -> None:
    size, mean, spread = np.float32(values.size), _ZERO, _ZERO
    for n in range(values.size):
        values[n] += more[n]
        mean += values[n]
    mean /= size
    for n in range(values.size):
        spread += (values[n] - mean) * (values[n] - mean)
    scale = _ONE / np.float32(math.sqrt(spread / size + epsilon))
    for n in range(values.size):
        values[n] = (values[n] - mean) * scale * norm[0, n] + norm[1, n]
