"""Other people's MoE layers, and plain ones on F.grouped_mm, at the weights of `moerouters.bench.weights`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerouters.bench.case import Unavailable
from moerouters.bench.shapes import Shape
from moerouters.bench.weights import Weights

Layer = Callable[[Tensor], Tensor]
"""[T, D] to [T, D], without the residual connection."""


class OwnModule(nn.Module):
    """A Layer around a module of the library that is timed; its parameters and its mode are those of the module."""

    def __init__(self, module: nn.Module, call: Layer) -> None:
        super().__init__()
        self.module = module
        self._call = call

    def forward(self, x_TD: Tensor) -> Tensor:
        return self._call(x_TD)


MOST_COPIES_GIB = 8.0
"""Copies of weights beyond which hf-batched_mm is not run."""


def moerouters_layer(shape: Shape, weights: Weights) -> Layer:
    """Our MoELayer with the built-in router, on whatever path it takes by itself."""
    from moerouters import Gating, MoELayer, build

    with torch.device("meta"):
        layer = MoELayer(build("topk", Gating.softmax(shape.E, shape.K)), hidden_size=shape.D, expert_size=shape.F)
    layer.to_empty(device=weights.gate_ED.device)
    layer.router.reset_state()
    layer.gate.weight = weights.gate_ED
    layer.experts.up_eFD, layer.experts.down_eDF = weights.up_eFD, weights.down_eDF
    return OwnModule(layer, lambda x_TD: layer(x_TD).hidden)


def transformers_layer(implementation: str, shape: Shape, weights: Weights) -> Layer:
    """Qwen3-MoE's block with one of the experts implementations that transformers has, or with ours."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
    except ImportError as error:
        raise Unavailable(f"transformers 5 is not installed ({error})") from error
    if implementation == "moerouters":
        import moerouters.hf  # noqa: F401  registers it
    if implementation != "eager" and implementation not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        raise Unavailable("this version of transformers does not have it")
    copies = shape.N * 3 * shape.F * shape.D * weights.up_eFD.element_size() / 2**30
    if implementation == "batched_mm" and copies > MOST_COPIES_GIB:
        raise Unavailable(f"it would gather {copies:.0f} GiB of weights, one copy for each routed pair")
    sizes: dict[str, Any] = {
        "hidden_size": shape.D, "num_experts": shape.E, "num_experts_per_tok": shape.K,
        "moe_intermediate_size": shape.F, "norm_topk_prob": True,
    }  # fmt: skip
    config = Qwen3MoeConfig(**sizes)
    config._experts_implementation = implementation
    with torch.device("meta"):
        block: Any = Qwen3MoeSparseMoeBlock(config)
    block.gate.weight = weights.gate_ED
    block.experts.gate_up_proj, block.experts.down_proj = weights.up_eFD, weights.down_eDF
    return OwnModule(block, lambda x_TD: block(x_TD.unsqueeze(0)).squeeze(0))


def grouped_mm_layer(shape: Shape, weights: Weights) -> Layer:
    """Sort, gather, two F.grouped_mm, gather back, one bmm: what a user writes with torch alone."""
    grouped_mm = _grouped_mm()

    def forward(x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = _top_k(x_TD, weights.gate_ED, shape.K)
        order_N = ids_TK.flatten().argsort(stable=True)
        ends_E = torch.bincount(ids_TK.flatten(), minlength=shape.E).cumsum(0).to(torch.int32)
        rows_ND = x_TD.index_select(0, order_N // shape.K)
        gate_NF, up_NF = grouped_mm(rows_ND, weights.up_eFD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        y_ND = grouped_mm(F.silu(gate_NF) * up_NF, weights.down_eDF.transpose(1, 2), offs=ends_E)
        back_N = torch.empty_like(order_N)
        back_N[order_N] = torch.arange(shape.K * x_TD.shape[0], device=x_TD.device)
        y_TKD = y_ND.index_select(0, back_N).view(-1, shape.K, shape.D)
        return torch.bmm(weights_TK.to(y_TKD.dtype).unsqueeze(1), y_TKD).squeeze(1)

    return forward


def torchtitan_style_layer(shape: Shape, weights: Weights) -> Layer:
    """As torchtitan's MoE goes: three stacks of weights, scores applied to rows, scatter_add; not its cast to bf16."""
    grouped_mm = _grouped_mm()

    def forward(x_TD: Tensor) -> Tensor:
        weights_TK, ids_TK = _top_k(x_TD, weights.gate_ED, shape.K)
        load_E = torch.histc(ids_TK.flatten().float(), bins=shape.E, min=0, max=shape.E)
        ends_E = load_E.cumsum(0).to(torch.int32)
        order_N = torch.argsort(ids_TK.flatten(), stable=True)
        tokens_ND = (order_N // shape.K).unsqueeze(1).expand(-1, shape.D)
        rows_ND = torch.gather(x_TD, 0, tokens_ND)
        w1_eFD, w3_eFD = weights.up_eFD.chunk(2, dim=1)
        hidden_NF = F.silu(grouped_mm(rows_ND, w1_eFD.transpose(1, 2), offs=ends_E))
        hidden_NF = hidden_NF * grouped_mm(rows_ND, w3_eFD.transpose(1, 2), offs=ends_E)
        y_ND = grouped_mm(hidden_NF, weights.down_eDF.transpose(1, 2), offs=ends_E)
        y_ND = (y_ND.float() * weights_TK.flatten()[order_N].unsqueeze(1)).to(x_TD.dtype)
        return torch.zeros_like(x_TD).scatter_add(0, tokens_ND, y_ND)

    return forward


def _top_k(x_TD: Tensor, gate_ED: nn.Parameter, top_k: int) -> tuple[Tensor, Tensor]:
    scores_TE = torch.softmax(F.linear(x_TD, gate_ED), dim=-1, dtype=torch.float32)
    chosen_TK, ids_TK = scores_TE.topk(top_k)
    return chosen_TK / chosen_TK.sum(dim=-1, keepdim=True), ids_TK


def _grouped_mm() -> Any:
    found = getattr(F, "grouped_mm", None)
    if found is None:
        raise Unavailable("this version of torch has no F.grouped_mm")
    return found
