"""The map of row tiles of a grouped GEMM: which expert's rows each tile holds, known on the device alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moerouters.kernels.launch import launching_on

TILES = 16  # tiles that one program of the map's kernel finds, comparing each with every expert


class TileMap(NamedTuple):
    """Row tiles of at most `height` rows, sorted by expert; no tile holds rows of two experts, and none is padded."""

    tiles: Tensor
    """int32 [bound, 4]: expert, first row, end of the expert's rows. The expert E has the rows that no expert owns."""
    counts: Tensor
    """int32 [2]: tiles of experts, and all tiles. The rest of `tiles`, up to the bound, is never read."""
    height: int


@triton.jit
def tile_map_kernel(
    load_ptr, tiles_ptr, counts_ptr, num_rows, num_experts,
    HEIGHT: tl.constexpr, EXPERTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Each program finds TILES entries: the expert of tile t is how many experts' tiles end at or before t."""
    experts = tl.arange(0, EXPERTS)
    load = tl.load(load_ptr + experts, mask=experts < num_experts, other=0).to(tl.int32)
    row_ends = tl.cumsum(load, axis=0)
    live_rows = tl.sum(load, axis=0)
    # The rows after the last expert's are those of one more, numbered E.
    load = tl.where(experts == num_experts, num_rows - live_rows, load)
    row_ends = tl.where(experts == num_experts, num_rows, row_ends)
    heights = tl.cdiv(load, HEIGHT)
    tile_ends = tl.cumsum(heights, axis=0)
    if tl.program_id(0) == 0:
        tl.store(counts_ptr, tl.sum(tl.where(experts < num_experts, heights, 0), axis=0))
        tl.store(counts_ptr + 1, tl.sum(heights, axis=0))
    tiles = tl.program_id(0) * TILES + tl.arange(0, TILES)
    passed = (tile_ends[None, :] <= tiles[:, None]) & (experts[None, :] <= num_experts)
    expert = tl.sum(passed.to(tl.int32), axis=1)
    here = experts[None, :] == expert[:, None]
    end = tl.sum(tl.where(here, row_ends[None, :], 0), axis=1)
    start = end - tl.sum(tl.where(here, load[None, :], 0), axis=1)
    first_tile = tl.sum(tl.where(here, (tile_ends - heights)[None, :], 0), axis=1)
    exists = expert <= num_experts
    tl.store(tiles_ptr + tiles * 4, expert, mask=exists)
    tl.store(tiles_ptr + tiles * 4 + 1, start + (tiles - first_tile) * HEIGHT, mask=exists)
    tl.store(tiles_ptr + tiles * 4 + 2, end, mask=exists)


def tile_map(load_e: Tensor, num_rows: int, height: int) -> TileMap:
    """One launch. The bound on tiles, sum over experts of ceil(load / height) and one for the rest, needs no load."""
    load_e = load_e.contiguous()
    num_experts = load_e.numel()
    bound = triton.cdiv(num_rows, height) + num_experts + 1
    tiles = torch.empty(bound, 4, dtype=torch.int32, device=load_e.device)
    counts = torch.empty(2, dtype=torch.int32, device=load_e.device)
    experts = max(32, triton.next_power_of_2(num_experts + 1))
    with launching_on(load_e):
        tile_map_kernel[(triton.cdiv(bound, TILES),)](
            load_e, tiles, counts, num_rows, num_experts, HEIGHT=height, EXPERTS=experts, TILES=TILES
        )
    return TileMap(tiles, counts, height)


@triton.jit
def place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles pass all columns together, and find rows and weights in the L2 cache."""
    group = tile // (GROUP * column_tiles)
    first = group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile - group * GROUP * column_tiles
    return first + within % height, within // height
