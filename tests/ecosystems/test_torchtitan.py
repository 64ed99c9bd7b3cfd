"""A router plug-in inside the real MoE layer of torchtitan, on a CPU; skipped where that is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moerouters import RouteContext
from moerouters.errors import ConfigError, ContextError, UnsupportedError
from support.ranks import on_ranks

pytest.importorskip("torchtitan")

from moerouters.ecosystems import torchtitan

from .torchtitan_layers import (
    OVERRIDE,
    PLUGINS,
    B,
    D,
    E,
    K,
    L,
    Linear,
    OverrideConfig,
    ParallelDims,
    apply_overrides,
    config_of,
    fully_sharded,
    hidden,
    layer_of,
    optimizers_of,
    run,
    trained_step,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # the stock router asks for float32
]

GATINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {"score_func": "sigmoid"},
    "sigmoid, renormalised and scaled": {"score_func": "sigmoid", "route_norm": True, "route_scale": 2.5},
    "softmax": {"score_func": "softmax"},
    "groups": {"score_func": "sigmoid", "num_expert_groups": 4, "num_limited_groups": 2},
    "bias of the gate": {"gate": Linear.Config(in_features=D, out_features=E, bias=True)},
}


@pytest.fixture(scope="module")
def dims() -> Iterator[ParallelDims]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    with torch.device("cpu"):
        yield ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
    dist.destroy_process_group()


@pytest.mark.parametrize("gating", GATINGS)
def test_topk_gives_what_the_stock_router_gives(gating: str) -> None:
    stock, ours = (run(layer_of(name, **GATINGS[gating]), hidden()) for name in (None, "topk"))
    for expected, found in zip(stock, ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_router_learns_once_a_step_from_all_micro_batches(dims: ParallelDims) -> None:
    layer = layer_of("loss-free", {"rate": 0.5})
    optimizers = optimizers_of(layer)
    handle = torchtitan.attach(optimizers, [layer], dims)
    for seed in (1, 2):
        run(layer, hidden(seed))
    optimizers.step()
    assert handle is not None
    load_E = handle.loads["router"]
    assert int(load_E.sum()) == 2 * B * L * K
    assert torch.equal(load_E, layer.tokens_per_expert_E.long())  # what torchtitan counted
    torch.testing.assert_close(
        layer.router.router.expert_bias_E, (0.5 * torch.sign(load_E.double().mean() - load_E)).float()
    )


@pytest.mark.dist
def test_fully_sharded_ranks_learn_what_one_rank_learns(dims: ParallelDims) -> None:
    ranks = on_ranks(fully_sharded)
    for name, config in PLUGINS.items():
        alone = trained_step(layer_of(name, config, score_func="softmax"), dims, 1, 2, passes=2)
        for found in ranks:
            for key, expected in alone.items():
                torch.testing.assert_close(found[f"{name} {key}"], expected)
        assert alone["gradient"].any()


def test_losses_count_as_a_part_of_the_steps_loss(dims: ParallelDims) -> None:
    layer = layer_of("loss-controlled", {"alpha": 1.0}, score_func="softmax")
    optimizers = optimizers_of(layer)
    torchtitan.attach(optimizers, [layer], dims, accumulation_steps=4)
    x = hidden()
    (layer(x).sum() * 0).backward()
    gate = layer.router.gate.weight
    losses = layer.router.router(
        nn.functional.linear(x.detach(), gate).reshape(B * L, E), RouteContext(hidden_TD=x.detach().reshape(B * L, D))
    ).losses
    (expected,) = torch.autograd.grad(losses["switch"] / 4, gate)
    torch.testing.assert_close(gate.grad, expected)
    assert expected.any()
    optimizers.step()


def test_a_model_without_plugins_is_left_alone(dims: ParallelDims) -> None:
    layer = layer_of(None)
    assert torchtitan.attach(optimizers_of(layer), [layer], dims) is None


def test_models_built_without_storage_start_from_fresh_state() -> None:
    root = config_of()
    apply_overrides(OverrideConfig(imports=[(OVERRIDE, {"name": "loss-free"})]), root)
    with torch.device("meta"):
        layer = root.moe.build()
    layer.to_empty(device="cpu")
    layer.router.router.expert_bias_E.fill_(7.0)
    layer.router._init_self_buffers(buffer_device=torch.device("cpu"))
    assert layer.router.router.expert_bias_E.tolist() == [0.0] * E
    for parameter in layer.parameters():
        parameter.data.normal_()
    run(layer, hidden())
    assert int(layer.router.running.sums["load_E"].sum()) == B * L * K


def test_empty_slots_are_filled_with_other_experts_of_weight_zero() -> None:
    layer = layer_of("null-experts", {"source": "gate", "num_null": E // 2})
    weights_BLK, ids_BLK, _ = layer.router(hidden())
    ids_TK = ids_BLK.reshape(-1, K)
    assert (weights_BLK == 0).any() and (ids_TK[:, 0] != ids_TK[:, 1]).all()
    assert run(layer, hidden())[0].isfinite().all()
    assert int(layer.tokens_per_expert_E.sum()) == B * L * K


def test_what_cannot_work_is_refused(dims: ParallelDims) -> None:
    with pytest.raises(UnsupportedError, match="'pairs'"):
        layer_of("expert-choice")
    with pytest.raises(ContextError, match="token_ids_T"):
        layer_of("hash")
    with pytest.raises(UnsupportedError, match="parameters of its own"):
        layer_of("noisy-topk", {"hidden_size": D}, score_func="softmax")
    with pytest.raises(ConfigError, match="_debug_force_load_balance=True"):
        layer_of("topk", _debug_force_load_balance=True)
    layer = layer_of("topk")
    with pytest.raises(ConfigError, match="load_balance_coeff"):
        layer.router(hidden(), torch.zeros(E))
    sliced = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=2, pp=1, ep=1, world_size=2)
    with pytest.raises(UnsupportedError, match="tensor_parallel_degree=2"):
        torchtitan.attach(optimizers_of(layer), [layer], sliced)
