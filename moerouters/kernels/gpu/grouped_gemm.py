"""Triton kernels of the expert MLP over rows grouped by expert: up-projection, any projection, gradient of the hidden.

All are persistent: a program takes every so-many-th tile of the map, whose tiles cost the same whatever an expert's
load. Rows are gathered by index while they are loaded. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moerouters.kernels.gpu.tiles import place


@triton.jit
def activate(gate, up, GATED: tl.constexpr):
    """(activation, its slope along gate, along up) in float32: silu(gate) * up, or gelu(gate)."""
    if GATED:
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        return silu * up, up * sigmoid * (1 + gate * (1 - sigmoid)), silu
    else:
        below = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        return gate * below, below + gate * density, gate


@triton.jit
def load_tile(ptrs, mask, EVEN: tl.constexpr):
    """Without a mask where the sizes are multiples of the blocks: it would keep wide loads apart."""
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def sources_of(index_ptr, rows, live, SLOTS: tl.constexpr):
    """int64, the row of the input that each row is read from; rows that are not live read row 0, which exists."""
    if index_ptr is not None:
        return tl.load(index_ptr + rows, mask=live, other=0) // SLOTS
    else:
        return tl.where(live, rows, 0).to(tl.int64)


@triton.jit
def up_kernel(
    x_ptr, index_ptr, up_ptr, h_ptr, a_ptr, tiles_ptr, counts_ptr, x_stride, D, F,
    SLOTS: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """h[r] = up[e] @ x[index[r] // SLOTS], if wanted, and a[r] = silu(gate half of h[r]) * up half or gelu(h[r])."""
    width = 2 * F if GATED else F
    num_tiles = tl.load(counts_ptr)
    column_tiles = tl.cdiv(F, COLUMNS)
    depth = tl.arange(0, DEPTH)
    for tile in tl.range(tl.program_id(0), num_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = place(tile, num_tiles, column_tiles, GROUP)
        expert = tl.load(tiles_ptr + row_tile * 4).to(tl.int64)
        rows = tl.load(tiles_ptr + row_tile * 4 + 1) + tl.arange(0, ROWS)
        live = rows < tl.load(tiles_ptr + row_tile * 4 + 2)
        columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        sources = sources_of(index_ptr, rows, live, SLOTS)
        x_ptrs = x_ptr + sources[:, None] * x_stride + depth[None, :]
        gate_ptrs = up_ptr + (expert * width + columns[None, :]) * D + depth[:, None]
        up_ptrs = up_ptr + (expert * width + F + columns[None, :]) * D + depth[:, None]
        gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, D, DEPTH):
            inside = start + depth < D
            mask = inside[:, None] & (columns < F)[None, :]
            x = load_tile(x_ptrs, inside[None, :], EVEN)
            gate = tl.dot(x, load_tile(gate_ptrs, mask, EVEN), gate, input_precision=PRECISION)
            if GATED:
                up = tl.dot(x, load_tile(up_ptrs, mask, EVEN), up, input_precision=PRECISION)
                up_ptrs += DEPTH
            x_ptrs += DEPTH
            gate_ptrs += DEPTH
        mask = live[:, None] & (columns < F)[None, :]
        # The activation of the rounded products, as the backward pass, which has only these, takes it again.
        gate, up = gate.to(a_ptr.dtype.element_ty), up.to(a_ptr.dtype.element_ty)
        if h_ptr is not None:
            h_ptrs = h_ptr + rows.to(tl.int64)[:, None] * width + columns[None, :]
            tl.store(h_ptrs, gate, mask=mask)
            if GATED:
                tl.store(h_ptrs + F, up, mask=mask)
        a, _, _ = activate(gate.to(tl.float32), up.to(tl.float32), GATED)
        a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :]
        tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rows_kernel(
    x_ptr, weight_ptr, y_ptr, tiles_ptr, counts_ptr, C, D, weight_stride_e, weight_stride_c, weight_stride_d,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y[r, c] = sum over d of x[r, d] * weight[e, c, d]; zeros in rows that no expert owns, whatever x holds."""
    num_tiles = tl.load(counts_ptr + 1)
    owned_tiles = tl.load(counts_ptr)
    column_tiles = tl.cdiv(C, COLUMNS)
    depth = tl.arange(0, DEPTH)
    for tile in tl.range(tl.program_id(0), num_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = place(tile, num_tiles, column_tiles, GROUP)
        expert = tl.load(tiles_ptr + row_tile * 4).to(tl.int64)
        rows = tl.load(tiles_ptr + row_tile * 4 + 1) + tl.arange(0, ROWS)
        live = rows < tl.load(tiles_ptr + row_tile * 4 + 2)
        columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        x_ptrs = x_ptr + tl.where(live, rows, 0).to(tl.int64)[:, None] * D + depth[None, :]
        weight_ptrs = weight_ptr + expert * weight_stride_e + columns[None, :].to(tl.int64) * weight_stride_c
        weight_ptrs += depth[:, None] * weight_stride_d
        y = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, tl.where(row_tile < owned_tiles, D, 0), DEPTH):
            inside = start + depth < D
            x = load_tile(x_ptrs, inside[None, :], EVEN)
            w = load_tile(weight_ptrs, inside[:, None] & (columns < C)[None, :], EVEN)
            y = tl.dot(x, w, y, input_precision=PRECISION)
            x_ptrs += DEPTH
            weight_ptrs += DEPTH * weight_stride_d
        y_ptrs = y_ptr + rows.to(tl.int64)[:, None] * C + columns[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=live[:, None] & (columns < C)[None, :])


@triton.jit
def hidden_columns(
    da, weight, first, rows, live, h_ptr, dh_ptr, a_ptr, F,
    WEIGHTED: tl.constexpr, GATED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What `hidden_kernel` does after its product, for COLUMNS columns from `first`; returns their part of <da, a>."""
    width = 2 * F if GATED else F
    columns = first + tl.arange(0, COLUMNS)
    mask = live[:, None] & (columns < F)[None, :]
    h_offsets = rows.to(tl.int64)[:, None] * width + columns[None, :]
    gate = tl.load(h_ptr + h_offsets, mask=mask, other=0.0).to(tl.float32)
    up = gate
    if GATED:
        up = tl.load(h_ptr + h_offsets + F, mask=mask, other=0.0).to(tl.float32)
    a, along_gate, along_up = activate(gate, up, GATED)
    # The rounded activation is what the forward pass multiplied by down.
    part = tl.sum(da * a.to(a_ptr.dtype.element_ty).to(tl.float32), axis=1)
    if WEIGHTED:
        da *= weight[:, None]
        a *= weight[:, None]
    tl.store(a_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :], a.to(a_ptr.dtype.element_ty), mask=mask)
    tl.store(dh_ptr + h_offsets, (da * along_gate).to(dh_ptr.dtype.element_ty), mask=mask)
    if GATED:
        tl.store(dh_ptr + h_offsets + F, (da * along_up).to(dh_ptr.dtype.element_ty), mask=mask)
    return part


@triton.jit
def hidden_kernel(
    slope_ptr, index_ptr, down_ptr, h_ptr, weights_ptr, dh_ptr, a_ptr, dweights_ptr, tiles_ptr, counts_ptr,
    slope_stride, D, F, num_pairs,
    SLOTS: tl.constexpr, WEIGHTED: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Backward through the down-projection, the weight and the activation, of which a is taken again from h.

    da[r] = slope[index[r] // SLOTS] @ down[e]; dweights[column tile, index[r]] = part of <da, a>; dh[r] = weight * da
    times the activation's slope; a[r] becomes weight * a, what the down-projection's own gradient needs.
    """
    num_tiles = tl.load(counts_ptr)
    column_tiles = tl.cdiv(F, COLUMNS)
    depth = tl.arange(0, DEPTH)
    for tile in tl.range(tl.program_id(0), num_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = place(tile, num_tiles, column_tiles, GROUP)
        expert = tl.load(tiles_ptr + row_tile * 4).to(tl.int64)
        rows = tl.load(tiles_ptr + row_tile * 4 + 1) + tl.arange(0, ROWS)
        live = rows < tl.load(tiles_ptr + row_tile * 4 + 2)
        columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
        sources = sources_of(index_ptr, rows, live, SLOTS)
        slope_ptrs = slope_ptr + sources[:, None] * slope_stride + depth[None, :]
        down_ptrs = down_ptr + (expert * D + depth[:, None]) * F + columns[None, :]
        da = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, D, DEPTH):
            inside = start + depth < D
            slope = load_tile(slope_ptrs, inside[None, :], EVEN)
            w = load_tile(down_ptrs, inside[:, None] & (columns < F)[None, :], EVEN)
            da = tl.dot(slope, w, da, input_precision=PRECISION)
            slope_ptrs += DEPTH
            down_ptrs += DEPTH * F
        pairs, weight = rows.to(tl.int64), live.to(tl.float32)
        if WEIGHTED:
            pairs = tl.load(index_ptr + rows, mask=live, other=0)
            weight = tl.load(weights_ptr + pairs, mask=live, other=0.0).to(tl.float32)
        first = column_tile * COLUMNS
        if SPLIT:  # a half of the columns at a time: all at once take more registers than there are
            halves = tl.permute(tl.reshape(da, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            part = hidden_columns(
                left, weight, first, rows, live, h_ptr, dh_ptr, a_ptr, F, WEIGHTED, GATED, COLUMNS // 2
            )
            part += hidden_columns(
                right, weight, first + COLUMNS // 2, rows, live, h_ptr, dh_ptr, a_ptr, F, WEIGHTED, GATED, COLUMNS // 2
            )
        else:
            part = hidden_columns(da, weight, first, rows, live, h_ptr, dh_ptr, a_ptr, F, WEIGHTED, GATED, COLUMNS)
        if WEIGHTED:
            tl.store(dweights_ptr + column_tile.to(tl.int64) * num_pairs + pairs, part, mask=live)


@triton.jit
def weight_kernel(
    left_ptr, left_index_ptr, right_ptr, right_index_ptr, load_ptr, ends_ptr, by_load_ptr, grad_ptr,
    left_stride, right_stride, M, C,
    SLOTS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """grad[e, m, c] = sum over the expert's rows of left[r, m] * right[r, c], in their order; zeros without rows.

    One program a tile, longest experts first: the sums differ in length, and the hardware hands out what is next.
    """
    row_tiles, column_tiles = tl.cdiv(M, ROWS), tl.cdiv(C, COLUMNS)
    turn = tl.program_id(0) // (row_tiles * column_tiles)
    within = tl.program_id(0) - turn * row_tiles * column_tiles
    row_tile, column_tile = place(within, row_tiles, column_tiles, GROUP)
    expert = tl.load(by_load_ptr + turn)
    end = tl.load(ends_ptr + expert)
    ms = row_tile * ROWS + tl.arange(0, ROWS)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    grad = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(end - tl.load(load_ptr + expert), end, DEPTH):
        rows = start + depth
        live = rows < end
        lefts = sources_of(left_index_ptr, rows, live, SLOTS)
        rights = sources_of(right_index_ptr, rows, live, SLOTS)
        left_ptrs = left_ptr + lefts[:, None] * left_stride + ms[None, :]
        right_ptrs = right_ptr + rights[:, None] * right_stride + columns[None, :]
        # Rows of the next expert are masked on both sides: what they hold may be infinite.
        if EVEN:
            left = tl.load(left_ptrs, mask=live[:, None], other=0.0)
            right = tl.load(right_ptrs, mask=live[:, None], other=0.0)
        else:
            left = tl.load(left_ptrs, mask=live[:, None] & (ms < M)[None, :], other=0.0)
            right = tl.load(right_ptrs, mask=live[:, None] & (columns < C)[None, :], other=0.0)
        grad = tl.dot(tl.trans(left), right, grad, input_precision=PRECISION)
    grad_ptrs = grad_ptr + (expert * M + ms[:, None]) * C + columns[None, :]
    tl.store(grad_ptrs, grad.to(grad_ptr.dtype.element_ty), mask=(ms < M)[:, None] & (columns < C)[None, :])
