"""The real MoE layer of torchtitan on CPUs, for tests of one rank and for jobs of several."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.components.optimizer.optimizer import ParamGroupConfig
    from torchtitan.config import Configurable
    from torchtitan.config.override import OverrideConfig, apply_overrides
    from torchtitan.distributed import parallel_dims
    from torchtitan.distributed.fsdp import disable_fsdp_gradient_division
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

from moerouters.ecosystems import torchtitan

__all__ = ["Linear", "MoE", "OverrideConfig", "ParallelDims", "apply_overrides"]

B, L, D, E, K = 2, 5, 16, 8, 2
OVERRIDE = "moerouters.ecosystems.torchtitan.router"


class Block(Configurable):
    """What holds a MoE layer, as models do."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        moe: MoE.Config


def config_of(**router: Any) -> Block.Config:
    settings = {"num_experts": E, "top_k": K, "gate": Linear.Config(in_features=D, out_features=E)} | router
    return Block.Config(
        moe=MoE.Config(
            num_experts=E,
            routed_experts=RoutedExperts.Config(
                inner_experts=GroupedExperts.Config(dim=D, hidden_dim=D, num_experts=E),
                token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=K),
            ),
            router=TokenChoiceTopKRouter.Config(**settings),
            load_balance_coeff=None,
        )
    )


def layer_of(plugin: str | None, config: dict[str, Any] | None = None, **router: Any) -> MoE:
    """The layer with the stock router, or with a plug-in that torchtitan's own override put there."""
    root = config_of(**router)
    if plugin is not None:
        apply_overrides(OverrideConfig(imports=[(OVERRIDE, {"name": plugin, "config": config})]), root)
    layer: MoE = root.moe.build()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer


def hidden(seed: int = 1) -> Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def run(layer: MoE, x: Tensor) -> tuple[Tensor, ...]:
    """Output, and the gradients of the input and of the gate."""
    y = layer(x)
    y.square().mean().backward()
    return y.detach(), x.grad, *(parameter.grad for parameter in layer.router.gate.parameters())


def optimizers_of(layer: nn.Module, lr: float = 0.0) -> OptimizersContainer:
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": lr})
    return OptimizersContainer.Config(param_groups=[group], implementation="for-loop").build(model_parts=[layer])


def trained_step(layer: MoE, dims: ParallelDims, *seeds: int, passes: int) -> dict[str, Tensor]:
    """One optimizer step as the trainer does it: what reached the gate, what was counted, and what was learned.

    passes: forward passes of the step on all ranks, over whose tokens its loss is the mean.
    """
    optimizers = optimizers_of(layer)
    handle = torchtitan.attach(optimizers, [layer], dims, accumulation_steps=len(seeds))
    for seed in seeds:
        (layer(hidden(seed)).square().sum() / (passes * B * L * D)).backward()
    gradient: Any = layer.router.gate.weight.grad
    optimizers.step()
    assert handle is not None
    return {
        "gradient": gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient,
        "load_E": handle.loads["router"],
        **{name: layer.router.router.get_buffer(name) for name in layer.router.router.state_names()},
    }


PLUGINS: dict[str, dict[str, Any]] = {"loss-free": {"rate": 0.5}, "loss-controlled": {"alpha": 1.0}}


def fully_sharded(rank: int) -> dict[str, Tensor]:
    """A step of two ranks that each have tokens of their own and half of every parameter."""
    parallel_dims.device_type = "cpu"  # torchtitan takes CUDA where there is no accelerator at all
    dims = ParallelDims(dp_replicate=1, dp_shard=2, cp=1, tp=1, pp=1, ep=1, world_size=2)
    found = {}
    for name, config in PLUGINS.items():
        layer = layer_of(name, config, score_func="softmax")
        fully_shard(layer, mesh=dims.get_mesh("dp_shard"))
        disable_fsdp_gradient_division(layer)
        layer.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
        found |= {f"{name} {key}": value for key, value in trained_step(layer, dims, 1 + rank, passes=2).items()}
    return found
