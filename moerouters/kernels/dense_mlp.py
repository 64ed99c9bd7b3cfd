"""Every expert for every token as one wide feed-forward network (arXiv:2404.05567, Eq. 3).

    y = W_out (act(W_in x) * S);  W_in: the experts' up-projections as one matrix; S: a weight over its expert's width

That is the weighted sum over experts without sorting, and without the experts' results [T, E, D] in memory. Kept for
backward: the input and the product `hidden_TH` = W_in x. The gradient of a weight is <e(x), dy>, taken as <a, W_out dy>
over the expert's width, at every expert. Tile by tile, so that what is as wide as all experts stays in the cache.
Gradients nobody asks for are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moerouters.autocast import no_autocast
from moerouters.kernels.expert_mlp_cpu import activate, activate_backward, compute_dtype, multiply
from moerouters.kernels.gradients import is_wanted
from moerouters.kernels.grouped_gemm import Activation
from moerouters.kernels.workspace import borrowed, fresh

_TILE_BYTES, _TILE_BYTES_ON_GPU = 20 * 2**20, 512 * 2**20
"""Of what is as wide as all experts; no tile has fewer than 64 tokens."""


def dense_mlp(x_TD: Tensor, weights_TE: Tensor, up_eFD: Tensor, down_eDF: Tensor, activation: Activation) -> Tensor:
    """y_TD = the sum over all experts e of weights_TE[:, e] * expert_e(x_TD), in the dtype of the weights.

    swiglu: down @ (silu(gate @ x) * (up @ x)), gate in the first half of up_eFD [E, 2F, D]; gelu: down @ gelu(up @ x).
    down_eDF is [E, D, F]; x, up and down are of one float dtype. A token whose weights are all 0, as padding's are, may
    hold anything: it gives zeros, and nothing to a gradient. Another goes through experts of weight 0 too.
    """
    inputs = (x_TD, weights_TE, up_eFD, down_eDF)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    y_TD: Tensor = _dense_mlp(*inputs, activation, keep)[0]
    return y_TD


@torch.library.custom_op("moerouters::dense_mlp", mutates_args=())
def _dense_mlp(
    x_TD: Tensor, weights_TE: Tensor, up_eFD: Tensor, down_eDF: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    (T, D), (E, W, _), A, dtype = x_TD.shape, up_eFD.shape, down_eDF.shape[2], _dtype_of(x_TD)
    y_TD = _empty(T, D, dtype=weights_TE.dtype, device=x_TD.device)
    kept_TH = _empty(T if keep else 0, E * W, dtype=x_TD.dtype, device=x_TD.device)
    tiles = _tiles(T, E * (W + A), dtype, x_TD.device)
    t = tiles[0].stop if tiles else 0
    in_place = keep and x_TD.dtype == dtype
    shapes = [(0 if in_place else t, E * W), (t, E * A), (0 if y_TD.dtype == dtype else t, D), (E * A, D)]
    with no_autocast(x_TD.device), _buffers(shapes, dtype, x_TD.device) as (h_tH, a_tA, y_tD, out_AD):
        up_HD, out_AD = _wide(up_eFD, dtype), _wide_out(down_eDF, out_AD)
        x_TD = _without_blanks(x_TD, weights_TE)
        for rows in tiles:
            n = rows.stop - rows.start
            hidden_tH = kept_TH[rows] if in_place else h_tH[:n]
            multiply(x_TD[rows].to(dtype), up_HD.t(), hidden_tH)
            if keep and not in_place:
                kept_TH[rows].copy_(hidden_tH)
            a_RF = a_tA[:n].view(n * E, A)  # rows as of routed pairs: (token, expert), in this order
            activate(hidden_tH.view(n * E, W), activation, a_RF, silu_RF=a_RF)
            a_RF.mul_(weights_TE[rows].reshape(n * E, 1))
            _multiply_into(a_tA[:n], out_AD, y_TD[rows], y_tD[:n])
    return y_TD, kept_TH


@_dense_mlp.register_fake
def _(
    x_TD: Tensor, weights_TE: Tensor, up_eFD: Tensor, down_eDF: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    y_TD = x_TD.new_empty(x_TD.shape, dtype=weights_TE.dtype)
    return y_TD, x_TD.new_empty(x_TD.shape[0] if keep else 0, up_eFD.shape[0] * up_eFD.shape[1])


@torch.library.custom_op("moerouters::dense_mlp_gradients", mutates_args=())
def _gradients(
    grad_y_TD: Tensor,
    x_TD: Tensor,
    weights_TE: Tensor,
    up_eFD: Tensor,
    down_eDF: Tensor,
    kept_TH: Tensor,
    activation: str,
    wanted: list[bool],
) -> list[Tensor]:
    of_x, of_weights, of_up, of_down = wanted
    (T, D), (E, W, _), A, dtype = x_TD.shape, up_eFD.shape, down_eDF.shape[2], _dtype_of(x_TD)
    d_x_TD = _empty(T if of_x else 0, D, dtype=x_TD.dtype, device=x_TD.device)
    d_weights_TE = weights_TE.new_empty(T if of_weights else 0, E)
    # Sums over tokens are made in the dtype of computation, and rounded once.
    tiles = _tiles(T, E * (2 * W + 3 * A), dtype, x_TD.device)
    t = tiles[0].stop if tiles else 0
    cast = 0 if x_TD.dtype == dtype else t
    of_tile = [(cast, E * W), (cast if of_x else 0, D), (t, E * W), (t, E * A), (t, E * A), (t, E * A)]
    of_weight = [(E * A, D), (E * A if of_down else 0, D), (E * W if of_up else 0, D)]
    with no_autocast(x_TD.device), _buffers(of_tile + of_weight, dtype, x_TD.device) as made:
        h_tH, dx_tD, dh_tH, a_tA, da_tA, s_tA, out_AD, d_out_AD, d_up_HD = made
        up_HD, out_AD = _wide(up_eFD, dtype), _wide_out(down_eDF, out_AD)
        x_TD, grad_y_TD = _without_blanks(x_TD, weights_TE), _without_blanks(grad_y_TD, weights_TE)
        for each in (d_out_AD, d_up_HD):
            each.zero_()
        for rows in tiles:
            n = rows.stop - rows.start
            a_RF, s_RF, da_RF = (buffer[:n].view(n * E, A) for buffer in (a_tA, s_tA, da_tA))
            weights_R1, dy_tD = weights_TE[rows].reshape(n * E, 1), grad_y_TD[rows].to(dtype)
            hidden_tH = kept_TH[rows] if kept_TH.dtype == dtype else h_tH[:n].copy_(kept_TH[rows])
            hidden_RF = hidden_tH.view(n * E, W)
            activate(hidden_RF, activation, a_RF, silu_RF=s_RF)
            if of_x or of_up or of_weights:
                multiply(dy_tD, out_AD.t(), da_tA[:n])
            if of_weights:
                products_RF = torch.mul(da_RF, a_RF, out=dh_tH[:n].view(-1)[: a_RF.numel()].view_as(a_RF))
                d_weights_TE[rows] = products_RF.sum(dim=1, dtype=weights_TE.dtype).view(n, E)
            if of_down:
                a_RF.mul_(weights_R1)
                multiply(a_tA[:n].t(), dy_tD, d_out_AD, add=True)
            if not (of_x or of_up):
                continue
            da_RF.mul_(weights_R1)
            activate_backward(da_RF, hidden_RF, activation, dh_tH[:n].view(n * E, W), silu_RF=s_RF)
            if of_up:
                multiply(dh_tH[:n].t(), x_TD[rows].to(dtype), d_up_HD, add=True)
            if of_x:
                _multiply_into(dh_tH[:n], up_HD, d_x_TD[rows], dx_tD[:n])
        found = [gradient for gradient, is_wanted in ((d_x_TD, of_x), (d_weights_TE, of_weights)) if is_wanted]
        if of_up:
            found.append(_copy_of(d_up_HD.view(E, W, D), up_eFD))
        if of_down:
            found.append(_copy_of(d_out_AD.view(E, A, D).transpose(1, 2), down_eDF))
    return found


@_gradients.register_fake
def _(
    grad_y_TD: Tensor,
    x_TD: Tensor,
    weights_TE: Tensor,
    up_eFD: Tensor,
    down_eDF: Tensor,
    kept_TH: Tensor,
    activation: str,
    wanted: list[bool],
) -> list[Tensor]:
    inputs = (x_TD, weights_TE, up_eFD, down_eDF)
    return [x.new_empty(x.shape) for x, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # else backward would fill a gradient for hidden_TH with zeros


def _backward(ctx: Any, grad_y_TD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = [grad_y_TD is not None and is_wanted(ctx, index) for index in range(4)]
    found: list[Tensor] = []
    if grad_y_TD is not None and any(wanted):
        found = _gradients(grad_y_TD, *ctx.saved_tensors, ctx.activation, wanted)
    left = iter(found)
    return (*(next(left) if is_wanted else None for is_wanted in wanted), None, None)


_dense_mlp.register_autograd(_backward, setup_context=_save)


def _dtype_of(x_TD: Tensor) -> torch.dtype:
    """In which it multiplies."""
    return compute_dtype(x_TD.dtype) if x_TD.device.type == "cpu" else x_TD.dtype


def _tiles(num_tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> list[slice]:
    """All tokens in equal parts, the first the largest. width: elements that buffers hold for each."""
    budget = _TILE_BYTES if device.type == "cpu" else _TILE_BYTES_ON_GPU
    most = max(64, budget // (width * dtype.itemsize))
    parts = -(-num_tokens // most)
    sizes = [len(range(part, num_tokens, parts)) for part in range(parts)]
    ends = [sum(sizes[: part + 1]) for part in range(parts)]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _buffers(
    shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> AbstractContextManager[Sequence[Tensor]]:
    """Tensors of undefined content for the length of a block."""
    if device.type == "cpu":
        return borrowed([(shape, dtype) for shape in shapes])
    return nullcontext([torch.empty(shape, dtype=dtype, device=device) for shape in shapes])


def _empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return fresh(*shape, dtype=dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


def _wide(up_eFD: Tensor, dtype: torch.dtype) -> Tensor:
    """[E * W, D], without a copy where dtypes are the same."""
    return up_eFD.reshape(-1, up_eFD.shape[2]).to(dtype)


def _wide_out(down_eDF: Tensor, out_AD: Tensor) -> Tensor:
    """[E * F, D] in out_AD. One product of it is 1.1 (F = 256) to 1.8 times (F = 64) as fast as one an expert."""
    E, D, A = down_eDF.shape
    out_AD.view(E, A, D).copy_(down_eDF.transpose(1, 2))
    return out_AD


def _multiply_into(a: Tensor, b: Tensor, out: Tensor, buffer: Tensor) -> None:
    """out = a @ b, by way of a buffer where out has another dtype."""
    if out.dtype == a.dtype:
        multiply(a, b, out)
    else:
        out.copy_(multiply(a, b, buffer))


def _copy_of(values: Tensor, like: Tensor) -> Tensor:
    return _empty(*values.shape, dtype=like.dtype, device=like.device).copy_(values)


def _without_blanks(values_TD: Tensor, weights_TE: Tensor) -> Tensor:
    """Zeros for tokens without any weight: 0 times what padding holds may be NaN."""
    blank_T1 = (weights_TE == 0).all(dim=1, keepdim=True)
    if values_TD.device.type == "cpu" and not bool(blank_T1.any()):
        return values_TD
    return values_TD.masked_fill(blank_T1, 0)


def dense_mlp_torch(x_TD: Tensor, weights_TE: Tensor, up_eFD: Tensor, down_eDF: Tensor, activation: str) -> Tensor:
    """Reference of `dense_mlp`: one expert at a time, plain autograd."""
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=weights_TE.dtype)
    for weights_T, up_FD, down_DF in zip(weights_TE.unbind(1), up_eFD, down_eDF, strict=True):
        hidden_TF = x_TD @ up_FD.t()
        if activation == "gelu":
            a_TF = F.gelu(hidden_TF)
        else:
            gate_TF, up_TF = hidden_TF.chunk(2, dim=-1)
            a_TF = F.silu(gate_TF) * up_TF
        y_TD = y_TD + weights_T.unsqueeze(1) * (a_TF @ down_DF.t())
    return y_TD
