"""Triton kernel of `moerouters.kernels.bins`: a histogram whose bins follow the bits of a float."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moerouters.kernels.bin_rule import bin_rule, num_bins

TILE = 2048
"""Tokens of one expert that a program counts."""


@triton.jit
def bin_counts_kernel(
    values_ptr, centre_ptr, counts_ptr, num_tokens, num_bins, stride_e, stride_t, base, marks,
    SHIFT: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = tokens < num_tokens
    places = expert.to(tl.int64) * stride_e + tokens.to(tl.int64) * stride_t
    values = tl.load(values_ptr + places, mask=live, other=-float("inf"))
    bits = (values - tl.load(centre_ptr + expert)).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    digits = tl.where(bits < 0, -magnitude, magnitude) >> SHIFT
    above = tl.minimum(tl.maximum(digits, base - 1), base - 1 + marks)
    below = tl.minimum(tl.maximum(digits, -base - marks), -base)
    counts = tl.histogram(above + below + marks + 1, BINS, mask=values > -float("inf"))
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts_ptr + expert * num_bins + bins, counts, mask=(bins < num_bins) & (counts > 0), sem="relaxed")


def bin_counts(values_ET: Tensor, centre_E: Tensor, finest: int, widest: int) -> Tensor:
    """See the public function; float32, at least one value."""
    E, T = values_ET.shape
    bins = num_bins(finest, widest)
    shift, base, marks = bin_rule(4, finest, widest)
    with torch.cuda.device_of(values_ET):
        counts_EB = torch.zeros(E, bins, dtype=torch.int32, device=values_ET.device)
        bin_counts_kernel[triton.cdiv(T, TILE), E](
            values_ET, centre_E.contiguous(), counts_EB, T, bins, *values_ET.stride(), base, marks,
            SHIFT=shift, BINS=triton.next_power_of_2(bins), TILE=TILE,
        )  # fmt: skip
    return counts_EB.long()
