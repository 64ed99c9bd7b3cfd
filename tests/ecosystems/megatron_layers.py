"""The real MoELayer of megatron-core on CPUs, for tests of one rank and for jobs of several."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.optimizer.optimizer import ChainedOptimizer
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.utils import sharded_state_dict_default

from moerouters.ecosystems import megatron

__all__ = ["ChainedOptimizer", "MoELayer", "moe_utils", "parallel_state", "sharded_state_dict_default"]

S, B, D, E, K = 6, 3, 16, 8, 2


class NoStream:
    """torch.cuda.Stream, where there is none."""

    def wait_stream(self, other: object) -> None: ...
    def record_event(self) -> NoStream:
        return self

    def synchronize(self) -> None: ...


def without_cuda(setattr: Callable[..., None]) -> None:
    """Megatron asks for CUDA in places that nothing here needs: the current device, a stream, and counts that it takes
    from the GPU as numpy arrays."""
    setattr(torch.cuda, "current_device", lambda: "cpu")
    setattr(torch.cuda, "current_stream", NoStream)
    setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    setattr(MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", NoStream())
    setattr(token_dispatcher, "maybe_move_tensor_to_cpu", _counts)
    setattr(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", None)


def _counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def layer_of(router: str | None, *, router_config: dict[str, Any] | None = None, **settings: Any) -> MoELayer:
    """A MoELayer with the stock router or with ours; an expert has the same weights each time and on any rank."""
    config = TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": D,
            "num_attention_heads": 2,
            "num_moe_experts": E,
            "moe_router_topk": K,
            "moe_ffn_hidden_size": 32,
            "moe_router_dtype": "fp32",
            "use_cpu_initialization": True,
            "add_bias_linear": False,
            "moe_token_dispatcher_type": "alltoall",
        }
        | settings
    )
    experts = ModuleSpec(
        module=SequentialMLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    submodules = MoESubmodules(experts=experts)
    if router is not None:
        submodules.router = megatron.builder(router, config=router_config)
    torch.manual_seed(0)
    layer = MoELayer(config, submodules, layer_number=1)
    for number, expert in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
        generator = torch.Generator().manual_seed(100 + number)
        for parameter in expert.parameters():
            parameter.data.normal_(generator=generator)
    layer.set_layer_number(1)
    return layer


def hidden(seed: int = 2) -> Tensor:
    return torch.randn(S, B, D, generator=torch.Generator().manual_seed(seed)).mul_(8).requires_grad_()


def trained_step(layer: MoELayer, *seeds: int) -> dict[str, Tensor]:
    """One optimizer step over micro-batches: what came out of the last, what was counted, and what was learned."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = megatron.attach(optimizer, layer)
    for seed in seeds:
        x = hidden(seed)
        y, _ = layer(x)
        y.square().mean().backward()
    optimizer.step()
    assert handle is not None and x.grad is not None
    return {
        "output": y.detach(),
        "gradient": x.grad,
        "load_E": handle.loads["router"],
        "bias_E": layer.router.router.expert_bias_E,
    }


def with_experts_on_two_ranks(rank: int) -> dict[str, Tensor]:
    """A step in which each rank has tokens of its own, and half of the experts."""
    without_cuda(setattr)
    moe_utils.te_general_gemm = None  # 0.16.1 forgets to define it where TransformerEngine is missing
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    layer = layer_of("loss-free", router_config={"rate": 0.5}, expert_model_parallel_size=2)
    assert layer.num_local_experts == E // 2
    return trained_step(layer, 1 + rank)
