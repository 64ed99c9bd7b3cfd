"""Noise from a key: the same key and shape give the same numbers, on every device, eager or compiled.

A router's forward is pure and may run twice (recompute), so it must not draw from a global generator. Here noise is a
hash of (key, element index): splitmix64's finalizer (Steele, Lea, Flood, OOPSLA 2014) in wrapping int64 arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_GOLDEN_32 = 0x9E3779B1
"""For element indices: inductor multiplies it by strides at compile time, and 64 bits overflow there."""
_MIX_A = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_B = 0x94D049BB133111EB - (1 << 64)


def uniform_noise(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """float32 in (0, 1), `shape`; key is int64 [n] (seed, step, micro-batch, layer, ...)."""
    state = torch.zeros((), dtype=torch.int64, device=key.device)
    for part in key.unbind():
        state = _mix(state + part * _GOLDEN)
    index = torch.arange(math.prod(shape), device=key.device).reshape(shape)
    bits = _shift_right(_mix(state + index * _GOLDEN_32), 41)
    # 23 bits, centred in their cell: never 0 or 1, so logarithms of the noise stay finite.
    return (bits.to(torch.float32) + 0.5) * 2.0**-23


def normal_noise(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 of `shape`, by the inverse of the distribution function."""
    noise: Tensor = torch.special.ndtri(uniform_noise(key, shape))
    return noise


def digest(values: Tensor) -> Tensor:
    """int64 0-d: a hash of the bits and places of all elements, of 2, 4 or 8 bytes each; 0 for none.

    A sum of integers, so order of summation does not matter: the same bits give the same digest on every device.
    """
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits_N = values.contiguous().view(whole).reshape(-1).long()
    index_N = torch.arange(bits_N.numel(), device=values.device)
    return _mix(bits_N * _GOLDEN + index_N * _GOLDEN_32).sum()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_A
    x = (x ^ _shift_right(x, 27)) * _MIX_B
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
