"""Triton kernels of `moerouters.kernels.counting_sort`: histogram per tile, prefix per expert, stable scatter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moerouters.kernels.launch import launching_on

TILE = 128  # pairs a program ranks by comparing all with all: 16384 comparisons, 128 a thread of four warps
PREFIX = 1024  # tiles that the prefix takes in one step


@triton.jit
def histogram_kernel(ids_ptr, counts_ptr, load_ptr, num_pairs, num_experts, TILE: tl.constexpr, BINS: tl.constexpr):
    """counts[e, tile]: how often the tile holds e, for e <= E; load[e] by atomics, in integers."""
    tile = tl.program_id(0)
    pairs = tile * TILE + tl.arange(0, TILE)
    ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=0).to(tl.int32)
    counts = tl.histogram(ids, BINS, mask=pairs < num_pairs)
    bins = tl.arange(0, BINS)
    known = bins <= num_experts
    tl.store(counts_ptr + bins.to(tl.int64) * tl.num_programs(0) + tile, counts, mask=known)
    tl.atomic_add(load_ptr + bins, counts, mask=known & (counts > 0), sem="relaxed")


@triton.jit
def prefix_kernel(counts_ptr, load_ptr, num_tiles, PREFIX: tl.constexpr, BINS: tl.constexpr):
    """counts[e, tile] becomes the row of the tile's first pair of e: all smaller experts, and e in earlier tiles."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    loads = tl.load(load_ptr + bins, mask=bins < expert, other=0)
    first = tl.sum(loads, axis=0)
    row_ptr = counts_ptr + expert.to(tl.int64) * num_tiles
    for step in range(0, num_tiles, PREFIX):
        tiles = step + tl.arange(0, PREFIX)
        counts = tl.load(row_ptr + tiles, mask=tiles < num_tiles, other=0)
        tl.store(row_ptr + tiles, first + tl.cumsum(counts, axis=0) - counts, mask=tiles < num_tiles)
        first += tl.sum(counts, axis=0)


@triton.jit
def scatter_kernel(ids_ptr, firsts_ptr, order_ptr, inverse_ptr, num_pairs, TILE: tl.constexpr):
    """The row of a pair: its tile's first row of the expert, and the pairs of that expert before it in the tile."""
    tile = tl.program_id(0)
    within = tl.arange(0, TILE)
    pairs = tile * TILE + within
    live = pairs < num_pairs
    ids = tl.load(ids_ptr + pairs, mask=live, other=0)
    before = (ids[:, None] == ids[None, :]) & (within[None, :] < within[:, None])
    rank = tl.sum(before.to(tl.int32), axis=1)
    rows = tl.load(firsts_ptr + ids * tl.num_programs(0) + tile, mask=live, other=0) + rank
    tl.store(order_ptr + rows, pairs.to(tl.int64), mask=live)
    tl.store(inverse_ptr + pairs, rows.to(tl.int64), mask=live)


def counting_sort(expert_ids_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order_N, inverse_N and load_E: three launches, no host synchronisation."""
    ids_N = expert_ids_N.contiguous()
    num_pairs = ids_N.numel()
    num_tiles = triton.cdiv(num_pairs, TILE)
    bins = max(64, triton.next_power_of_2(num_experts + 1))  # a histogram has at least as many bins as a warp lanes
    order_N, inverse_N = torch.empty_like(ids_N), torch.empty_like(ids_N)
    load = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids_N.device)
    if num_tiles:
        counts = torch.empty(num_experts + 1, num_tiles, dtype=torch.int32, device=ids_N.device)
        with launching_on(ids_N):
            histogram_kernel[(num_tiles,)](ids_N, counts, load, num_pairs, num_experts, TILE=TILE, BINS=bins)
            prefix_kernel[(num_experts + 1,)](counts, load, num_tiles, PREFIX=PREFIX, BINS=bins)
            scatter_kernel[(num_tiles,)](ids_N, counts, order_N, inverse_N, num_pairs, TILE=TILE)
    return order_N, inverse_N, load[:num_experts].to(torch.int64)
