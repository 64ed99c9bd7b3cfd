"""Triton kernels of `moerouters.kernels.permute`: rows by index, weighted sums of rows, and the weights' gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moerouters.kernels.launch import launching_on


@triton.jit
def gather_kernel(
    x_ptr, order_ptr, weights_ptr, rows_ptr, num_rows, D,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """rows[r] = x[order[r] // SLOTS], times weights[order[r]] where there are weights."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = rows < num_rows
    pairs = tl.load(order_ptr + rows, mask=live, other=0)
    mask = live[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + (pairs // SLOTS)[:, None] * D + columns[None, :], mask=mask, other=0.0)
    if weights_ptr is not None:
        x = x.to(tl.float32) * tl.load(weights_ptr + pairs, mask=live, other=0.0).to(tl.float32)[:, None]
    tl.store(rows_ptr + rows.to(tl.int64)[:, None] * D + columns[None, :], x.to(rows_ptr.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(
    rows_ptr, inverse_ptr, weights_ptr, y_ptr, num_tokens, D,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[t] = sum over k of weights[t, k] * rows[inverse[t, k]], or of rows alone; in float32, k rising."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = tokens < num_tokens
    mask = live[:, None] & (columns < D)[None, :]
    y = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for k in tl.range(0, SLOTS, loop_unroll_factor=8):  # eight rows in flight, and no more registers for dense plans
        pairs = tokens.to(tl.int64) * SLOTS + k
        row = tl.load(inverse_ptr + pairs, mask=live, other=0)
        part = tl.load(rows_ptr + row[:, None] * D + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            part *= tl.load(weights_ptr + pairs, mask=live, other=0.0).to(tl.float32)[:, None]
        y += part
    tl.store(y_ptr + tokens.to(tl.int64)[:, None] * D + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient_kernel(
    slope_ptr, rows_ptr, inverse_ptr, dweights_ptr, num_tokens, D,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dweights[t, k] = <slope[t], rows[inverse[t, k]]> in float32."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = tokens < num_tokens
    pairs = tokens.to(tl.int64) * SLOTS + tl.program_id(1)
    row = tl.load(inverse_ptr + pairs, mask=live, other=0)
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for start in range(0, D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        mask = live[:, None] & (columns < D)[None, :]
        slope = tl.load(slope_ptr + tokens.to(tl.int64)[:, None] * D + columns[None, :], mask=mask, other=0.0)
        value = tl.load(rows_ptr + row[:, None] * D + columns[None, :], mask=mask, other=0.0)
        total += slope.to(tl.float32) * value.to(tl.float32)
    tl.store(dweights_ptr + pairs, tl.sum(total, axis=1).to(dweights_ptr.dtype.element_ty), mask=live)


def blocks(width: int, device: torch.device) -> tuple[int, int]:
    """(rows, columns) of a program of four warps: 4096 values, 32 a thread, whole rows where they are short."""
    if device.type != "cuda":
        return 16, 32
    columns = min(max(triton.next_power_of_2(width), 64), 1024)
    return 4096 // columns, columns


def gather(
    x_TD: Tensor,
    order_N: Tensor,
    slots: int,
    weights_TK: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    x_TD = x_TD.contiguous()
    num_rows, width = order_N.numel(), x_TD.shape[1]
    rows_ND = x_TD.new_empty(num_rows, width, dtype=dtype)
    if rows_ND.numel():
        rows, columns = blocks(width, x_TD.device)
        weights_TK = None if weights_TK is None else weights_TK.contiguous()
        with launching_on(x_TD):
            gather_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(width, columns))](
                x_TD, order_N, weights_TK, rows_ND, num_rows, width, SLOTS=slots, ROWS=rows, COLUMNS=columns
            )
    return rows_ND


def combine(rows_ND: Tensor, inverse_N: Tensor, slots: int, weights_TK: Tensor | None = None) -> Tensor:
    rows_ND = rows_ND.contiguous()
    num_tokens, width = inverse_N.numel() // slots, rows_ND.shape[1]
    y_TD = rows_ND.new_empty(num_tokens, width, dtype=None if weights_TK is None else weights_TK.dtype)
    if y_TD.numel():
        tokens, columns = blocks(width, rows_ND.device)
        weights_TK = None if weights_TK is None else weights_TK.contiguous()
        with launching_on(rows_ND):
            combine_kernel[(triton.cdiv(num_tokens, tokens), triton.cdiv(width, columns))](
                rows_ND, inverse_N, weights_TK, y_TD, num_tokens, width, SLOTS=slots, TOKENS=tokens, COLUMNS=columns
            )
    return y_TD


def weight_gradient(slope_TD: Tensor, rows_ND: Tensor, inverse_N: Tensor, weights_TK: Tensor) -> Tensor:
    slope_TD, rows_ND = slope_TD.contiguous(), rows_ND.contiguous()
    (num_tokens, slots), width = weights_TK.shape, rows_ND.shape[1]
    dweights_TK = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
    if dweights_TK.numel():
        tokens, columns = blocks(width, rows_ND.device)
        with launching_on(rows_ND):
            weight_gradient_kernel[(triton.cdiv(num_tokens, tokens), slots)](
                slope_TD, rows_ND, inverse_N, dweights_TK, num_tokens, width,
                SLOTS=slots, TOKENS=tokens, COLUMNS=columns,
            )  # fmt: skip
    return dweights_TK
