"""Layers of kernel libraries that few machines have; each runs where it can be imported.

Their weights are copies in each library's own layout. Before one is timed its output is compared with the plain layer.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moerouters.bench.case import Unavailable
from moerouters.bench.peers import Layer, OwnModule
from moerouters.bench.shapes import Shape
from moerouters.bench.weights import Weights


def scattermoe_layer(shape: Shape, weights: Weights) -> Layer:
    """scattermoe.mlp.GLUMLP, routed as the others are."""
    mlp: Any = _imported("scattermoe.mlp").GLUMLP(
        input_size=shape.D, hidden_size=shape.F, num_experts=shape.E, top_k=shape.K, activation=torch.nn.SiLU()
    )
    mlp.to(weights.up_eFD)
    gate_eFD, up_eFD = weights.up_eFD.detach().chunk(2, dim=1)
    _fill(mlp.experts.weight, torch.cat([up_eFD, gate_eFD], dim=1))  # it activates the second half
    _fill(mlp.output_experts.weight, weights.down_eDF)

    def forward(x_TD: Tensor) -> Tensor:
        scores_TE = torch.softmax(F.linear(x_TD, weights.gate_ED), dim=-1, dtype=torch.float32)
        chosen_TK, ids_TK = scores_TE.topk(shape.K)
        weights_TK = chosen_TK / chosen_TK.sum(dim=-1, keepdim=True)
        y_TD: Tensor = mlp(x_TD, weights_TK.to(x_TD.dtype), ids_TK)
        return y_TD

    return OwnModule(mlp, forward)


def sonicmoe_layer(shape: Shape, weights: Weights) -> Layer:
    """sonicmoe.MoE with its own kernels."""
    sonicmoe = _imported("sonicmoe")
    moe: Any = sonicmoe.MoE(
        num_experts=shape.E, num_experts_per_tok=shape.K, hidden_size=shape.D, intermediate_size=shape.F,
        activation_function=_imported("sonicmoe.enums").ActivationType.SWIGLU, add_bias=False, std=0.02,
    )  # fmt: skip
    moe.to(weights.up_eFD)
    gate_eFD, up_eFD = weights.up_eFD.detach().chunk(2, dim=1)
    _fill(moe.router.weight, weights.gate_ED)
    _fill(moe.c_fc.weight, torch.stack([gate_eFD, up_eFD], dim=2).flatten(1, 2))  # gate and up rows take turns
    _fill(moe.c_proj.weight, weights.down_eDF)
    kernels = sonicmoe.KernelBackendMoE.sonicmoe
    return OwnModule(moe, lambda x_TD: moe(x_TD, kernel_backend_moe=kernels)[0])


def megablocks_layer(shape: Shape, weights: Weights) -> Layer:
    """megablocks' dropless MoE with grouped GEMMs."""
    arguments = _imported("megablocks.layers.arguments").Arguments(
        hidden_size=shape.D, ffn_hidden_size=shape.F, moe_num_experts=shape.E, moe_top_k=shape.K,
        moe_normalize_expert_weights=1, mlp_type="glu", mlp_impl="grouped", activation_fn=F.silu, bias=False,
        return_bias=False, fp16=False, bf16=weights.up_eFD.dtype == torch.bfloat16, device=weights.up_eFD.device,
    )  # fmt: skip
    moe: Any = _imported("megablocks.layers.dmoe").dMoE(arguments)
    moe.to(weights.up_eFD)
    gate_eFD, up_eFD = weights.up_eFD.detach().chunk(2, dim=1)
    _fill(moe.router.layer.weight, weights.gate_ED)
    _fill(moe.experts.mlp.w1, gate_eFD.flatten(0, 1))
    _fill(moe.experts.mlp.v1, up_eFD.flatten(0, 1))
    _fill(moe.experts.mlp.w2, weights.down_eDF.detach().transpose(1, 2).flatten(0, 1))
    return OwnModule(moe, lambda x_TD: moe(x_TD.unsqueeze(1)).squeeze(1))


def tutel_layer(shape: Shape, weights: Weights) -> Layer:
    """Tutel without dropping. Its experts have two matrices: 1.5 times as wide they cost the same FLOPs, and compute
    something else."""
    moe: Any = _imported("tutel.moe").moe_layer(
        gate_type={"type": "top", "k": shape.K, "capacity_factor": 0},
        model_dim=shape.D,
        experts={
            "type": "ffn", "count_per_node": shape.E, "hidden_size_per_expert": 3 * shape.F // 2,
            "activation_fn": F.silu,
        },
    )  # fmt: skip
    moe.to(weights.up_eFD)
    return OwnModule(moe, moe)


GPU_PEERS: dict[str, Callable[[Shape, Weights], Layer]] = {
    "tutel": tutel_layer,
    "scattermoe": scattermoe_layer,
    "sonicmoe": sonicmoe_layer,
    "megablocks": megablocks_layer,
}
COMPUTES_ELSE = frozenset({"tutel"})
"""Whose outputs cannot agree."""


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except Exception as error:  # a kernel library without its GPU may raise anything
        reason = "not installed" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: {error}"
        raise Unavailable(reason) from error


def _fill(parameter: Tensor, values: Tensor) -> None:
    """Copy weights in; Unavailable where the library keeps them in another shape than this adapter knows."""
    if parameter.shape != values.shape:
        raise Unavailable(f"its weights are {list(parameter.shape)}, not {list(values.shape)}: another version")
    with torch.no_grad():
        parameter.copy_(values)
