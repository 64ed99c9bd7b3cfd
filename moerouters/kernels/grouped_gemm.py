"""The experts of a layer on a GPU: five grouped GEMMs that gather their rows while they load them.

Forward: h = up @ x and a = silu(gate) * up in one kernel, y = down @ a in the next, then every token sums its rows.
Saved are x and h alone. Backward: dh with the weights' gradient <da, a>, so neither y nor the gathered x is needed; the
two weight gradients, whose sums run over an expert's rows; dx, then every token sums its rows. Loads stay on the
device, rows are not padded, nothing is added atomically: the same bits every time.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moerouters.kernels.gradients import is_wanted

Activation = Literal["swiglu", "gelu"]


def grouped_mlp_triton(
    x_TD: Tensor,
    weights_TK: Tensor,
    up_eHD: Tensor,
    down_eDF: Tensor,
    order_N: Tensor,
    inverse_N: Tensor,
    load_e: Tensor,
    *,
    activation: Activation = "swiglu",
) -> Tensor:
    """y_TD in the weights' dtype: every token's weighted sum over its K experts. All experts are on this device.

    x, up ([e, H, D]; H = 2F with the gate first for swiglu, F for gelu) and down share one dtype: float32, bfloat16 or
    float16, on a GPU or under Triton's interpreter. order_N and inverse_N (int64) sort the pairs t * K + k by expert,
    load_e (int64) counts them; pairs past load_e.sum() are empty and give nothing, not even to a gradient."""
    slots, gated, keep_h = weights_TK.shape[1], activation == "swiglu", torch.is_grad_enabled()
    routed = (x_TD, up_eHD, down_eDF, load_e, order_N, inverse_N, weights_TK)
    y_TD: Tensor = _grouped_mlp(*routed, slots, gated, keep_h)[0]
    return y_TD


def grouped_rows_triton(
    x_RD: Tensor, up_eHD: Tensor, down_eDF: Tensor, load_e: Tensor, *, activation: Activation = "swiglu"
) -> Tensor:
    """y_RD of rows that already stand by expert; rows past load_e.sum() give zeros, whatever they hold."""
    gated, keep_h = activation == "swiglu", torch.is_grad_enabled()
    y_RD: Tensor = _grouped_mlp(x_RD, up_eHD, down_eDF, load_e, None, None, None, 1, gated, keep_h)[0]
    return y_RD


def grouped_mlp_torch(
    x_TD: Tensor,
    weights_TK: Tensor,
    up_eHD: Tensor,
    down_eDF: Tensor,
    order_N: Tensor,
    inverse_N: Tensor,
    load_e: Tensor,
    *,
    activation: Activation = "swiglu",
) -> Tensor:
    """Reference of `grouped_mlp_triton`: one expert after the other, plain autograd. Reads the loads on the host."""
    slots = weights_TK.shape[1]
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=weights_TK.dtype)
    start = 0
    for expert, rows in enumerate(load_e.tolist()):
        pairs_R = order_N[start : start + rows]
        start += rows
        h_RH = x_TD[pairs_R // slots] @ up_eHD[expert].T
        if activation == "swiglu":
            gate_RF, up_RF = h_RH.chunk(2, dim=-1)
            a_RF = F.silu(gate_RF) * up_RF
        else:
            a_RF = F.gelu(h_RH)
        y_RD = a_RF @ down_eDF[expert].T
        y_TD = y_TD.index_add(0, pairs_R // slots, weights_TK.reshape(-1)[pairs_R].unsqueeze(1) * y_RD)
    return y_TD


@torch.library.custom_op("moerouters::grouped_mlp", mutates_args=())
def _grouped_mlp(
    x_TD: Tensor,
    up_eHD: Tensor,
    down_eDF: Tensor,
    load_e: Tensor,
    order_N: Tensor | None,
    inverse_N: Tensor | None,
    weights_TK: Tensor | None,
    slots: int,
    gated: bool,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """(y, h_RH; the second empty unless it is kept). Without an order, rows are x's own and y is theirs."""
    from moerouters.kernels.gpu import grouped_mlp, permute

    x_TD = _rows_in_one_piece(x_TD)
    num_rows = x_TD.shape[0] if order_N is None else order_N.numel()
    tiles = grouped_mlp.map_rows(load_e, num_rows, x_TD.dtype)
    h_RH, a_RF = grouped_mlp.up_projection(x_TD, up_eHD, tiles, load_e, order_N, slots, gated=gated, keep_h=keep_h)
    y_RD = grouped_mlp.projection(a_RF, down_eDF, tiles, load_e)
    del a_RF
    return (y_RD if inverse_N is None else permute.combine(y_RD, inverse_N, slots, weights_TK)), h_RH


@_grouped_mlp.register_fake
def _(
    x_TD: Tensor,
    up_eHD: Tensor,
    down_eDF: Tensor,
    load_e: Tensor,
    order_N: Tensor | None,
    inverse_N: Tensor | None,
    weights_TK: Tensor | None,
    slots: int,
    gated: bool,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    num_rows = x_TD.shape[0] if order_N is None else order_N.shape[0]
    like = x_TD if weights_TK is None else weights_TK
    return like.new_empty(x_TD.shape), x_TD.new_empty(num_rows if keep_h else 0, up_eHD.shape[1])


@torch.library.custom_op("moerouters::grouped_mlp_hidden_gradient", mutates_args=())
def _hidden_gradient(
    slope_TD: Tensor,
    h_RH: Tensor,
    down_eDF: Tensor,
    load_e: Tensor,
    order_N: Tensor | None,
    weights_TK: Tensor | None,
    slots: int,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh_RH, weight * a_RF, dweights_TK; the last is empty without weights)."""
    from moerouters.kernels.gpu import grouped_mlp

    weights_N = None if weights_TK is None else weights_TK.reshape(-1).contiguous()
    tiles = grouped_mlp.map_rows(load_e, h_RH.shape[0], h_RH.dtype)
    dh_RH, a_RF, dweights_N = grouped_mlp.hidden_gradient(
        slope_TD, h_RH, down_eDF, tiles, load_e, order_N, weights_N, slots, gated=gated
    )
    if weights_TK is None or dweights_N is None:
        return dh_RH, a_RF, h_RH.new_empty(0)
    return dh_RH, a_RF, dweights_N.to(weights_TK.dtype).reshape(weights_TK.shape)


@_hidden_gradient.register_fake
def _(
    slope_TD: Tensor,
    h_RH: Tensor,
    down_eDF: Tensor,
    load_e: Tensor,
    order_N: Tensor | None,
    weights_TK: Tensor | None,
    slots: int,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a_RF = h_RH.new_empty(h_RH.shape[0], down_eDF.shape[2])
    nothing = h_RH.new_empty(0)
    return torch.empty_like(h_RH), a_RF, nothing if weights_TK is None else weights_TK.new_empty(weights_TK.shape)


@torch.library.custom_op("moerouters::grouped_mlp_input_gradient", mutates_args=())
def _input_gradient(dh_RH: Tensor, up_eHD: Tensor, load_e: Tensor, inverse_N: Tensor | None, slots: int) -> Tensor:
    from moerouters.kernels.gpu import grouped_mlp, permute

    tiles = grouped_mlp.map_rows(load_e, dh_RH.shape[0], dh_RH.dtype)
    dx_RD = grouped_mlp.projection(dh_RH, up_eHD.transpose(1, 2), tiles, load_e)
    return dx_RD if inverse_N is None else permute.combine(dx_RD, inverse_N, slots)


@_input_gradient.register_fake
def _(dh_RH: Tensor, up_eHD: Tensor, load_e: Tensor, inverse_N: Tensor | None, slots: int) -> Tensor:
    return dh_RH.new_empty(dh_RH.shape[0] // slots, up_eHD.shape[2])


@torch.library.custom_op("moerouters::grouped_mlp_weight_gradient", mutates_args=())
def _weight_gradient(
    left: Tensor,
    left_order_N: Tensor | None,
    right: Tensor,
    right_order_N: Tensor | None,
    load_e: Tensor,
    slots: int,
) -> Tensor:
    from moerouters.kernels.gpu import grouped_mlp

    return grouped_mlp.weight_gradient(
        _rows_in_one_piece(left), left_order_N, _rows_in_one_piece(right), right_order_N, slots, load_e
    )


@_weight_gradient.register_fake
def _(
    left: Tensor,
    left_order_N: Tensor | None,
    right: Tensor,
    right_order_N: Tensor | None,
    load_e: Tensor,
    slots: int,
) -> Tensor:
    return left.new_empty(load_e.shape[0], left.shape[1], right.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_TD, up_eHD, down_eDF, load_e, order_N, inverse_N, weights_TK, ctx.slots, ctx.gated, _ = inputs
    ctx.save_for_backward(x_TD, up_eHD, down_eDF, load_e, order_N, inverse_N, weights_TK, output[1])
    ctx.set_materialize_grads(False)  # nobody differentiates h


def _backward(ctx: Any, slope_TD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x_TD, up_eHD, down_eDF, load_e, order_N, inverse_N, weights_TK, h_RH = ctx.saved_tensors
    dx_TD = dup_eHD = ddown_eDF = dweights_TK = None
    wants_x, wants_up, wants_down, wants_weights = (is_wanted(ctx, index) for index in (0, 1, 2, 6))
    if slope_TD is not None and (wants_x or wants_up or wants_down or wants_weights):
        # In the experts' dtype: matrix units take both sides in one.
        slope_TD = slope_TD.to(x_TD.dtype).contiguous()
        dh_RH, a_RF, dweights_TK = _hidden_gradient(
            slope_TD, h_RH, down_eDF, load_e, order_N, weights_TK, ctx.slots, ctx.gated
        )
        if wants_down:
            ddown_eDF = _weight_gradient(slope_TD, order_N, a_RF, None, load_e, ctx.slots)
        del a_RF
        if wants_up:
            dup_eHD = _weight_gradient(dh_RH, None, x_TD, order_N, load_e, ctx.slots)
        if wants_x:
            dx_TD = _input_gradient(dh_RH, up_eHD, load_e, inverse_N, ctx.slots)
    return dx_TD, dup_eHD, ddown_eDF, None, None, None, dweights_TK if wants_weights else None, *[None] * 3


_grouped_mlp.register_autograd(_backward, setup_context=_keep)


def _rows_in_one_piece(x_TD: Tensor) -> Tensor:
    """Kernels step over rows by a stride, along a row by one."""
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
