"""Triton kernels of `moerouters.kernels.order_statistic`: radix selection, 8 bits at a time from the top.

A float's bits, turned round where it is negative, sort like the float. Four passes count which next digit the values
have that share the digits found so far; the last kernel reads the value off. Every program finds the earlier digits
anew from the counts: cheaper than a launch. Counts are integers, so the order of the atomic additions does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
"""Tokens of one expert that a program counts."""
DIGITS = tl.constexpr(256)
PASSES = 4


@triton.jit
def sortable(values):
    """uint32 that sort as these float32 do; 0.0 after -0.0."""
    bits = values.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def unsortable(keys):
    bits = tl.where((keys >> 31) != 0, keys ^ 0x80000000, keys ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def counts_of(counts_ptr, expert, neighbour, num_experts, depth, COUNT: tl.constexpr):
    """Where the 256 counts of a digit stand. The first digit's do not depend on the place: one set for both."""
    table = tl.where(depth == 0, 0, 1 + (depth - 1) * COUNT + neighbour)
    return counts_ptr + (table * num_experts + expert).to(tl.int64) * DIGITS + tl.arange(0, DIGITS)


@triton.jit
def descend(
    counts_ptr, number_ptr, expert, neighbour, num_experts, factor, summand, divisor,
    DEPTH: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The first DEPTH digits of the value at place (number * factor + summand) // divisor - 1 + neighbour, from 0."""
    digits = tl.arange(0, DIGITS)
    places = tl.sum(tl.load(counts_of(counts_ptr, expert, 0, num_experts, 0, COUNT)), axis=0)
    place = (tl.load(number_ptr) * factor + summand) // divisor - 1 + neighbour
    place = tl.maximum(tl.minimum(place, (places - 1).to(tl.int64)), 0).to(tl.int32)
    key = (place * 0).to(tl.uint32)
    for depth in range(DEPTH):  # unrolled, its scans spill scalar registers on CDNA
        counts = tl.load(counts_of(counts_ptr, expert, neighbour, num_experts, depth, COUNT))
        larger = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
        here = (larger <= place) & (place < larger + counts)
        key = (key << 8) | tl.sum(tl.where(here, digits, 0), axis=0).to(tl.uint32)
        place -= tl.sum(tl.where(here, larger, 0), axis=0)
    return key, places


@triton.jit
def count_digits_kernel(
    values_ptr, offset_ptr, number_ptr, counts_ptr,
    num_tokens, num_experts, stride_t, stride_e, factor, summand, divisor,
    DEPTH: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Count digit DEPTH of values - offset, -inf and NaN left out. An offset of +inf leaves its token out."""
    expert, neighbour = tl.program_id(1), tl.program_id(2)
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = tokens < num_tokens
    values = tl.load(values_ptr + tokens.to(tl.int64) * stride_t + expert * stride_e, mask=live, other=0.0)
    values -= tl.load(offset_ptr + tokens, mask=live, other=0.0)
    live = live & (values > -float("inf"))
    keys = sortable(values)
    digits = ((keys >> (24 - 8 * DEPTH)) & 255).to(tl.int32)
    if DEPTH > 0:
        found, _ = descend(
            counts_ptr, number_ptr, expert, neighbour, num_experts, factor, summand, divisor, DEPTH, COUNT
        )
        live = live & ((keys >> (32 - 8 * DEPTH)) == found)
    counts = tl.histogram(digits, DIGITS, mask=live)
    counts_ptrs = counts_of(counts_ptr, expert, neighbour, num_experts, DEPTH, COUNT)
    tl.atomic_add(counts_ptrs, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def read_off_kernel(counts_ptr, number_ptr, found_ptr, num_experts, COUNT: tl.constexpr):
    expert = tl.program_id(0)
    for neighbour in tl.static_range(COUNT):
        key, places = descend(counts_ptr, number_ptr, expert, neighbour, num_experts, 1, 0, 1, 4, COUNT)
        value = tl.where(places > 0, unsortable(key), 0.0)
        tl.store(found_ptr + neighbour * num_experts + expert, value)


def new_counts(num_experts: int, count: int, device: torch.device) -> Tensor:
    return torch.zeros(1 + (PASSES - 1) * count, num_experts, 256, dtype=torch.int32, device=device)


def count_digits(
    values_TE: Tensor, offset_T: Tensor, number: Tensor, counts: Tensor, *, rank: tuple[int, int, int], count: int
) -> None:
    """Four launches that fill `counts`, zeros before; rank: factor, summand and divisor of `descend`."""
    T, E = values_TE.shape
    for depth in range(PASSES):
        count_digits_kernel[triton.cdiv(T, TILE), E, count if depth else 1](
            values_TE, offset_T, number, counts, T, E, *values_TE.stride(), *rank,
            DEPTH=depth, COUNT=count, TILE=TILE,
        )  # fmt: skip


def kth_largest_per_expert(values_TE: Tensor, rank: Tensor, valid_T: Tensor | None, count: int) -> Tensor:
    """See the public function; float32, at least one value, count 1 or 2."""
    T, E = values_TE.shape
    with torch.cuda.device_of(values_TE):
        counts = new_counts(E, count, values_TE.device)
        offset_T = values_TE.new_zeros(T) if valid_T is None else torch.where(valid_T, 0.0, float("inf"))
        found = values_TE.new_empty(count, E)
        count_digits(values_TE, offset_T, rank, counts, rank=(1, 0, 1), count=count)
        read_off_kernel[(E,)](counts, rank, found, E, COUNT=count)
    return found
