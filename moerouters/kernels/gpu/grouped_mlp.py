"""Launches of the expert MLP's kernels: what each takes and gives, with the blocks that suit it."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moerouters.kernels.gpu.grouped_gemm import hidden_kernel, rows_kernel, up_kernel, weight_kernel
from moerouters.kernels.gpu.tiles import TileMap, tile_map
from moerouters.kernels.launch import (
    Blocks,
    Role,
    arch_of,
    blocks_for,
    dot_precision,
    launching_on,
    persistent_programs,
)

GROUP = 8  # row tiles that share a sweep over the weights: 128 x 2048 in bf16 are 0.5 MB each, Hopper's L2 has 50 MB


def map_rows(load_e: Tensor, num_rows: int, dtype: torch.dtype) -> TileMap:
    """The map for the three functions below."""
    height = _blocks("up", load_e, num_rows, dtype).rows
    return tile_map(load_e, num_rows, height)


def up_projection(
    x_TD: Tensor, up_eHD: Tensor, tiles: TileMap, load_e: Tensor, index_R: Tensor | None, slots: int,
    *, gated: bool, keep_h: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h_RH = up @ x[index // slots], H = 2F if gated, and a_RF, its activation; unwritten in rows without an expert."""
    num_rows = x_TD.shape[0] if index_R is None else index_R.numel()
    width, depth = up_eHD.shape[1:]
    columns = width // 2 if gated else width
    h_RH, a_RF = x_TD.new_empty(num_rows if keep_h else 0, width), x_TD.new_empty(num_rows, columns)
    blocks = _blocks("up", load_e, num_rows, x_TD.dtype)
    with launching_on(x_TD):
        up_kernel[_grid(tiles, columns, blocks)](
            x_TD, index_R, up_eHD.contiguous(), h_RH if keep_h else None, a_RF, tiles.tiles, tiles.counts,
            x_TD.stride(0), depth, columns,
            SLOTS=slots, GATED=gated, **meta(blocks, x_TD.dtype, columns, depth),
        )  # fmt: skip
    return h_RH, a_RF


def projection(x_RD: Tensor, weight_eCD: Tensor, tiles: TileMap, load_e: Tensor) -> Tensor:
    """y_RC with y[r] = weight[e] @ x[r], any strides of weight; zeros in rows that no expert owns."""
    num_rows, depth = x_RD.shape
    columns = weight_eCD.shape[1]
    y_RC = x_RD.new_empty(num_rows, columns)
    blocks = _blocks("rows", load_e, num_rows, x_RD.dtype)
    with launching_on(x_RD):
        rows_kernel[_grid(tiles, columns, blocks)](
            x_RD, weight_eCD, y_RC, tiles.tiles, tiles.counts, columns, depth, *weight_eCD.stride(),
            **meta(blocks, x_RD.dtype, columns, depth),
        )  # fmt: skip
    return y_RC


def hidden_gradient(
    slope_TD: Tensor, h_RH: Tensor, down_eDF: Tensor, tiles: TileMap, load_e: Tensor,
    index_R: Tensor | None, weights_N: Tensor | None, slots: int, *, gated: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dh_RH, weight * a_RF, dweights_N in float32 or None) for the slope of y_TD."""
    num_rows = h_RH.shape[0]
    depth, columns = down_eDF.shape[1:]
    blocks = _blocks("hidden", load_e, num_rows, h_RH.dtype)
    dh_RH, a_RF = torch.empty_like(h_RH), h_RH.new_empty(num_rows, columns)
    # One part per tile of columns, added in their order: pairs that no expert owns get none, so these start as zeros.
    parts_CN = None
    if weights_N is not None:
        parts_CN = h_RH.new_zeros(triton.cdiv(columns, blocks.columns), num_rows, dtype=torch.float32)
    with launching_on(h_RH):
        hidden_kernel[_grid(tiles, columns, blocks)](
            slope_TD, index_R, down_eDF.contiguous(), h_RH, weights_N, dh_RH, a_RF, parts_CN, tiles.tiles, tiles.counts,
            slope_TD.stride(0), depth, columns, num_rows,
            SLOTS=slots, WEIGHTED=weights_N is not None, GATED=gated, SPLIT=blocks.columns >= 32,
            **meta(blocks, h_RH.dtype, columns, depth),
        )  # fmt: skip
    return dh_RH, a_RF, None if parts_CN is None else parts_CN.sum(dim=0)


def weight_gradient(
    left: Tensor, left_index_R: Tensor | None, right: Tensor, right_index_R: Tensor | None, slots: int, load_e: Tensor
) -> Tensor:
    """grad_eMC = sum over the expert's rows of left[index // slots, m] * right[index // slots, c]."""
    load_e = load_e.contiguous()
    index_R = left_index_R if right_index_R is None else right_index_R
    num_rows = left.shape[0] if index_R is None else index_R.numel()
    rows, columns = left.shape[1], right.shape[1]
    grad_eMC = left.new_empty(load_e.numel(), rows, columns)
    blocks = _blocks("weight", load_e, num_rows, left.dtype)
    constants = meta(blocks, left.dtype, columns, depth=blocks.depth)
    constants["EVEN"] = constants["EVEN"] and rows % blocks.rows == 0
    grid = load_e.numel() * triton.cdiv(rows, blocks.rows) * triton.cdiv(columns, blocks.columns)
    by_load_e = torch.argsort(load_e, descending=True)
    with launching_on(left):
        weight_kernel[(grid,)](
            left, left_index_R, right, right_index_R, load_e, load_e.cumsum(0), by_load_e, grad_eMC,
            left.stride(0), right.stride(0), rows, columns, SLOTS=slots, **constants,
        )  # fmt: skip
    return grad_eMC


def _blocks(role: Role, load_e: Tensor, num_rows: int, dtype: torch.dtype) -> Blocks:
    return blocks_for(role, arch_of(load_e.device), dtype, num_rows // max(load_e.numel(), 1))


def _grid(tiles: TileMap, columns: int, blocks: Blocks) -> tuple[int]:
    bound = tiles.tiles.shape[0] * triton.cdiv(columns, blocks.columns)
    return (min(bound, persistent_programs(tiles.tiles.device)),)


def meta(blocks: Blocks, dtype: torch.dtype, columns: int, depth: int) -> dict[str, int | bool | str]:
    return {
        "EVEN": columns % blocks.columns == 0 and depth % blocks.depth == 0,
        "PRECISION": dot_precision(dtype),
        "ROWS": blocks.rows,
        "COLUMNS": blocks.columns,
        "DEPTH": blocks.depth,
        "GROUP": GROUP,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
