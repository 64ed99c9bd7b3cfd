"""The experts' feed-forward networks as one operator with a hand-written backward, of given rows or of tokens.

With tokens, gathering them by expert and the weighted sum over a token's experts are part of it. Kept for backward: the
input, the product with `up_eFD`, the weights and indices. Gradients nobody asks for are not computed: neither those of
inputs without requires_grad, nor, where a pass takes the gradients of some tensors only (torch.autograd.grad, a
pipeline that runs input and weight gradients apart), those of the others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moerouters.kernels import expert_mlp_cpu
from moerouters.kernels.expert_mlp_cpu import Experts
from moerouters.kernels.gradients import is_wanted
from moerouters.kernels.grouped_gemm import Activation, grouped_mlp_triton, grouped_rows_triton
from moerouters.kernels.grouped_linear import grouped_linear
from moerouters.kernels.launch import triton_serves
from moerouters.kernels.routes import Routes


def expert_mlp(x_RD: Tensor, up_eFD: Tensor, down_eDF: Tensor, load_e: Tensor, activation: Activation) -> Tensor:
    """[R, D] rows, grouped by expert, through their experts, in the dtype of x; rows past load_e.sum() give zeros.

    swiglu: down @ (silu(gate @ x) * (up @ x)), gate in the first half of up_eFD [e, 2F, D]; gelu: down @ gelu(up @ x).
    down_eDF is [e, D, F]; x and weights are of one float dtype. load_e: int64 [e]; read on the host.
    """
    if triton_serves(x_RD, up_eFD, down_eDF):
        return grouped_rows_triton(x_RD, up_eFD, down_eDF, load_e, activation=activation)
    if not _on_cpu(x_RD):
        hidden_RF = grouped_linear(x_RD, up_eFD, load_e)
        return grouped_linear(_activated(hidden_RF, activation), down_eDF, load_e)
    keep = _in_a_graph(x_RD, up_eFD, down_eDF)
    y_RD: Tensor = _expert_mlp(x_RD, up_eFD, down_eDF, None, None, None, load_e, activation, keep)[0]
    return y_RD


def routed_mlp(
    x_TD: Tensor, routes: Routes, up_eFD: Tensor, down_eDF: Tensor, load_e: Tensor, activation: Activation
) -> Tensor:
    """y_TD = for every token the sum of weight * expert(x) over its slots, in the dtype of the weights, summed in it.

    Else as `expert_mlp`. Only where `is_fused` says so of x_TD.
    """
    if triton_serves(x_TD, up_eFD, down_eDF):
        return grouped_mlp_triton(
            x_TD, routes.weights_TK, up_eFD, down_eDF, routes.order_N, routes.inverse_N, load_e, activation=activation
        )
    keep = _in_a_graph(x_TD, up_eFD, down_eDF, routes.weights_TK)
    arguments = (x_TD, up_eFD, down_eDF, routes.weights_TK, routes.order_N, routes.inverse_N, load_e, activation, keep)
    y_TD: Tensor = _expert_mlp(*arguments)[0]
    return y_TD


def is_fused(x_TD: Tensor) -> bool:
    """Whether `routed_mlp` has an engine for such tokens: Triton on a GPU; on a CPU, but not for half precision.

    There rows are rounded on both ways, as they are between ranks, so that one process gives what several give.
    """
    if triton_serves(x_TD):
        return True
    half = x_TD.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x_TD.device.type)
    return _on_cpu(x_TD) and not half


def _on_cpu(x_MD: Tensor) -> bool:
    return x_MD.device.type in ("cpu", "meta")


@torch.library.custom_op("moerouters::expert_mlp", mutates_args=())
def _expert_mlp(
    x_MD: Tensor,
    up_eFD: Tensor,
    down_eDF: Tensor,
    weights_TK: Tensor | None,
    order_N: Tensor | None,
    inverse_N: Tensor | None,
    load_e: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    experts = _experts(up_eFD, down_eDF, weights_TK, order_N, inverse_N, load_e, activation)
    return expert_mlp_cpu.forward(x_MD, experts, keep)


@_expert_mlp.register_fake
def _(
    x_MD: Tensor,
    up_eFD: Tensor,
    down_eDF: Tensor,
    weights_TK: Tensor | None,
    order_N: Tensor | None,
    inverse_N: Tensor | None,
    load_e: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    y_MD = x_MD.new_empty(x_MD.shape, dtype=x_MD.dtype if weights_TK is None else weights_TK.dtype)
    rows = x_MD.shape[0] if order_N is None else order_N.shape[0]
    return y_MD, x_MD.new_empty(rows if keep else 0, up_eFD.shape[1])


@torch.library.custom_op("moerouters::expert_mlp_gradients", mutates_args=())
def _gradients(
    grad_y_MD: Tensor,
    x_MD: Tensor,
    up_eFD: Tensor,
    down_eDF: Tensor,
    weights_TK: Tensor | None,
    order_N: Tensor | None,
    inverse_N: Tensor | None,
    load_e: Tensor,
    hidden_RF: Tensor,
    product_RA: Tensor | None,
    activation: str,
    wanted: list[bool],
    keep_product: bool,
) -> list[Tensor]:
    experts = _experts(up_eFD, down_eDF, weights_TK, order_N, inverse_N, load_e, activation)
    return expert_mlp_cpu.backward(grad_y_MD, x_MD, hidden_RF, experts, wanted, product_RA, keep_product)


@_gradients.register_fake
def _(
    grad_y_MD: Tensor,
    x_MD: Tensor,
    up_eFD: Tensor,
    down_eDF: Tensor,
    weights_TK: Tensor | None,
    order_N: Tensor | None,
    inverse_N: Tensor | None,
    load_e: Tensor,
    hidden_RF: Tensor,
    product_RA: Tensor | None,
    activation: str,
    wanted: list[bool],
    keep_product: bool,
) -> list[Tensor]:
    inputs = (x_MD, up_eFD, down_eDF, weights_TK)
    found = [x.new_empty(x.shape) for x, is_wanted in zip(inputs, wanted, strict=True) if is_wanted and x is not None]
    if keep_product:
        dtype = expert_mlp_cpu.compute_dtype(up_eFD.dtype)
        found.append(x_MD.new_empty(hidden_RF.shape[0], down_eDF.shape[2], dtype=dtype))
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.product = None
    ctx.set_materialize_grads(False)  # else backward would fill a gradient for hidden_RF with zeros


def _backward(ctx: Any, grad_y_MD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x_MD, up_eFD, down_eDF, weights_TK, order_N, inverse_N, load_e, hidden_RF = ctx.saved_tensors
    wanted = [grad_y_MD is not None and is_wanted(ctx, index) for index in range(4)]
    found: list[Tensor] = []
    if grad_y_MD is not None and any(wanted):
        product_RA = _product_for(ctx, grad_y_MD)
        # A later pass through this graph may want the weights' gradients: a pipeline that runs halves apart.
        keep = wanted[0] and not wanted[1] and ctx.needs_input_grad[1] and product_RA is None
        tensors = (grad_y_MD, x_MD, up_eFD, down_eDF, weights_TK, order_N, inverse_N, load_e, hidden_RF, product_RA)
        found = _gradients(*tensors, ctx.activation, wanted, keep)
        ctx.product = (grad_y_MD, grad_y_MD._version, found.pop()) if keep else None
    left = iter(found)
    return (*(next(left) if is_wanted else None for is_wanted in wanted), *[None] * 5)


def _product_for(ctx: Any, grad_y_MD: Tensor) -> Tensor | None:
    """What an earlier pass kept, if it was about the same gradient: the same memory, unwritten since."""
    if ctx.product is None:
        return None
    earlier_MD, version, product_RA = ctx.product
    same = earlier_MD.data_ptr() == grad_y_MD.data_ptr() and earlier_MD.stride() == grad_y_MD.stride()
    return product_RA if same and grad_y_MD._version == version else None


_expert_mlp.register_autograd(_backward, setup_context=_save)


def _experts(
    up_eFD: Tensor,
    down_eDF: Tensor,
    weights_TK: Tensor | None,
    order_N: Tensor | None,
    inverse_N: Tensor | None,
    load_e: Tensor,
    activation: str,
) -> Experts:
    routes = None
    if weights_TK is not None and order_N is not None and inverse_N is not None:
        routes = Routes(weights_TK, order_N, inverse_N)
    return Experts(up_eFD, down_eDF, load_e, activation, routes)


def _in_a_graph(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _activated(hidden_RF: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(hidden_RF)
    gate_RF, up_RF = hidden_RF.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


def routed_mlp_torch(
    x_TD: Tensor, routes: Routes, up_eFD: Tensor, down_eDF: Tensor, load_e: Tensor, activation: str
) -> Tensor:
    """Reference of `routed_mlp`: one pair at a time, plain autograd."""
    weights_TK = routes.weights_TK
    y_TD = list(x_TD.new_zeros(x_TD.shape, dtype=weights_TK.dtype).unbind(0))
    experts_R = torch.repeat_interleave(torch.arange(load_e.shape[0]), load_e)
    for pair, expert in zip(routes.order_N.tolist(), experts_R.tolist(), strict=False):
        token, slot = divmod(pair, weights_TK.shape[1])
        y_TD[token] = y_TD[token] + weights_TK[token, slot] * _one(x_TD[token], up_eFD, down_eDF, expert, activation)
    return torch.stack(y_TD) if y_TD else x_TD.to(weights_TK.dtype)


def expert_mlp_torch(x_RD: Tensor, up_eFD: Tensor, down_eDF: Tensor, load_e: Tensor, activation: str) -> Tensor:
    """Reference of `expert_mlp`: one row at a time, plain autograd."""
    experts_R = torch.repeat_interleave(torch.arange(load_e.shape[0]), load_e).tolist()
    rows = [_one(x_RD[row], up_eFD, down_eDF, expert, activation) for row, expert in enumerate(experts_R)]
    padding = [x_RD.new_zeros(x_RD.shape[1])] * (x_RD.shape[0] - len(rows))
    return torch.stack(rows + padding) if rows or padding else x_RD


def _one(x_D: Tensor, up_eFD: Tensor, down_eDF: Tensor, expert: int, activation: str) -> Tensor:
    return down_eDF[expert] @ _activated(up_eFD[expert] @ x_D, activation)
