"""Rows of tokens in the order of their experts, and back: a weighted sum over each token's rows.

On a GPU both directions and both gradients only read rows by index and write each result once: no atomics, and the
same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moerouters.kernels.launch import triton_serves


def gather_rows(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, slots: int) -> Tensor:
    """[N, D]: row r is x_TD[order_N[r] // slots], N = T * slots; order_N int64, inverse_N its inverse."""
    if triton_serves(x_TD):
        rows_ND: Tensor = _gather_rows(x_TD, order_N, inverse_N, slots)
        return rows_ND
    return gather_rows_torch(x_TD, order_N, inverse_N, slots)


def combine_rows(rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, D] in the weights' dtype: sum over k of weights_TK[t, k] * rows_ND[inverse_N[t * K + k]], in float32."""
    if triton_serves(rows_ND, weights_TK):
        y_TD: Tensor = _combine_rows(rows_ND, order_N, inverse_N, weights_TK)
        return y_TD
    return combine_rows_torch(rows_ND, order_N, inverse_N, weights_TK)


def gather_rows_torch(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, slots: int) -> Tensor:
    """Reference of `gather_rows`."""
    return x_TD.index_select(0, order_N // slots)


def combine_rows_torch(rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor, weights_TK: Tensor) -> Tensor:
    """Reference of `combine_rows`."""
    dtype = torch.promote_types(weights_TK.dtype, torch.float32)
    rows_TKD = rows_ND.index_select(0, inverse_N).reshape(*weights_TK.shape, rows_ND.shape[1])
    return (weights_TK.to(dtype).unsqueeze(-1) * rows_TKD).sum(dim=1).to(weights_TK.dtype)


@torch.library.custom_op("moerouters::gather_rows", mutates_args=())
def _gather_rows(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, slots: int) -> Tensor:
    from moerouters.kernels.gpu import permute

    return permute.gather(x_TD, order_N, slots)


@_gather_rows.register_fake
def _(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, slots: int) -> Tensor:
    return x_TD.new_empty(order_N.shape[0], x_TD.shape[1])


@torch.library.custom_op("moerouters::gather_rows_backward", mutates_args=())
def _gather_rows_backward(slope_ND: Tensor, inverse_N: Tensor, slots: int) -> Tensor:
    from moerouters.kernels.gpu import permute

    return permute.combine(slope_ND, inverse_N, slots)


@_gather_rows_backward.register_fake
def _(slope_ND: Tensor, inverse_N: Tensor, slots: int) -> Tensor:
    return slope_ND.new_empty(slope_ND.shape[0] // slots, slope_ND.shape[1])


def _keep_inverse(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.slots = inputs[3]


def _gradient_of_gather(ctx: Any, slope_ND: Tensor) -> tuple[Tensor, None, None, None]:
    return _gather_rows_backward(slope_ND, ctx.saved_tensors[0], ctx.slots), None, None, None


_gather_rows.register_autograd(_gradient_of_gather, setup_context=_keep_inverse)


@torch.library.custom_op("moerouters::combine_rows", mutates_args=())
def _combine_rows(rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor, weights_TK: Tensor) -> Tensor:
    from moerouters.kernels.gpu import permute

    return permute.combine(rows_ND, inverse_N, weights_TK.shape[1], weights_TK)


@_combine_rows.register_fake
def _(rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor, weights_TK: Tensor) -> Tensor:
    return weights_TK.new_empty(weights_TK.shape[0], rows_ND.shape[1])


@torch.library.custom_op("moerouters::combine_rows_backward", mutates_args=())
def _combine_rows_backward(
    slope_TD: Tensor, rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    from moerouters.kernels.gpu import permute

    # The rows' gradient leaves in the rows' dtype: the product itself is float32.
    drows_ND = permute.gather(slope_TD, order_N, weights_TK.shape[1], weights_TK, dtype=rows_ND.dtype)
    return drows_ND, permute.weight_gradient(slope_TD, rows_ND, inverse_N, weights_TK)


@_combine_rows_backward.register_fake
def _(
    slope_TD: Tensor, rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_ND, memory_format=torch.contiguous_format), weights_TK.new_empty(weights_TK.shape)


def _keep_rows(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient_of_combine(ctx: Any, slope_TD: Tensor) -> tuple[Tensor, None, None, Tensor]:
    drows_ND, dweights_TK = _combine_rows_backward(slope_TD, *ctx.saved_tensors)
    return drows_ND, None, None, dweights_TK


_combine_rows.register_autograd(_gradient_of_combine, setup_context=_keep_rows)
