"""A router plug-in inside the real MoELayer of megatron-core, on a CPU; skipped where that is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moerouters.errors import ConfigError, ContextError, UnsupportedError
from support.ranks import on_ranks

pytest.importorskip("megatron.core")

from moerouters.ecosystems import megatron

from .megatron_layers import (
    B,
    ChainedOptimizer,
    E,
    K,
    MoELayer,
    S,
    hidden,
    layer_of,
    moe_utils,
    parallel_state,
    sharded_state_dict_default,
    trained_step,
    with_experts_on_two_ranks,
    without_cuda,
)

pytestmark = [  # of Megatron's own making
    pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
]

GATINGS = {
    "softmax over the chosen": {},
    "softmax over all": {"moe_router_pre_softmax": True},
    "sigmoid, scaled": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    "groups by their best": {"moe_router_pre_softmax": True, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "groups by their best two": {
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 1,
    },
}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    without_cuda(monkeypatch.setattr)
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)


def run(layer: MoELayer, x: Tensor, padding_BS: Tensor | None = None) -> tuple[Tensor, ...]:
    """Output, and the gradients of the input and of the gate; nobody looks at the output of padding."""
    y, _ = layer(x, padding_mask=padding_BS)
    if padding_BS is not None:
        y = y.masked_fill(padding_BS.T.unsqueeze(2), 0)
    y.square().mean().backward()
    return y.detach(), x.grad, layer.router.weight.grad


def routed(layer: MoELayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The router's two results, in eval mode."""
    layer.router.eval()
    with torch.no_grad():
        weights_TE, map_TE = layer.router(x)
    layer.router.train()
    return weights_TE, map_TE


# The same arithmetic as Megatron's.


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("gating", GATINGS)
def test_topk_keeps_every_bit_of_the_stock_router(gating: str, dispatcher: str) -> None:
    settings = GATINGS[gating] | {"moe_token_dispatcher_type": dispatcher}
    stock, ours = (run(layer_of(name, **settings), hidden()) for name in (None, "topk"))
    assert all(map(torch.equal, stock, ours))


def test_a_gate_with_a_bias_keeps_every_bit() -> None:
    """By itself: the experts of 0.16.1 cannot differentiate their biases on a CPU."""
    found = []
    for name in (None, "topk"):
        router, x = layer_of(name, add_bias_linear=True).router, hidden()
        router.bias.data.normal_(generator=torch.Generator().manual_seed(3))
        weights_TE, map_TE = router(x)
        weights_TE.square().sum().backward()
        found.append((weights_TE, map_TE, x.grad, router.weight.grad, router.bias.grad))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("padded", [False, True])
def test_capacity_drops_what_megatron_drops(policy: str, padded: bool) -> None:
    settings = {
        "moe_expert_capacity_factor": 0.75,
        "moe_token_drop_policy": policy,
        "moe_pad_expert_input_to_capacity": padded,
    }
    stock, ours = (run(layer_of(name, **settings), hidden()) for name in (None, "topk"))
    assert all(map(torch.equal, stock, ours))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("pad", [False, True])
def test_the_switch_loss_has_the_gradient_of_megatrons(per_token: bool, pad: bool) -> None:
    padding_BS = torch.zeros(B, S, dtype=torch.bool)
    padding_BS[1, 4:] = pad
    settings = {"calculate_per_token_loss": per_token, "moe_router_pre_softmax": True}
    stock = layer_of(None, **settings, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.3)
    ours = layer_of("loss-controlled", router_config={"alpha": 0.3}, **settings)
    moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([0.25]))
    expected, found = (run(layer, hidden(), padding_BS if pad else None) for layer in (stock, ours))
    assert expected[2].abs().max() > 0.1  # the loss is seen beside the gradient of the output
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-6)


def test_ranks_that_share_a_batch_give_a_part_of_the_loss_each() -> None:
    grads = []
    for parts in (1, 2):
        layer = layer_of("loss-controlled", router_config={"alpha": 1.0})
        layer.router._parts_of_a_batch = parts
        weights_TE, _ = layer.router(hidden())
        (weights_TE.sum() * 0).backward()
        grads.append(layer.router.weight.grad)
    torch.testing.assert_close(grads[0], 2 * grads[1])
    assert grads[0].abs().max() > 0


# Learning.


def test_a_router_learns_once_a_step_from_all_micro_batches() -> None:
    layer = layer_of("loss-free", router_config={"rate": 0.5})
    load_E = sum(routed(layer, hidden(seed))[1].sum(0) for seed in (1, 2))
    found = trained_step(layer, 1, 2)
    assert torch.equal(found["load_E"], load_E)
    expected_E = 0.5 * torch.sign(load_E.double().mean() - load_E)
    torch.testing.assert_close(found["bias_E"], expected_E.float())


@pytest.mark.dist
def test_ranks_with_tokens_and_experts_of_their_own_learn_the_same() -> None:
    alone = [trained_step(layer_of("loss-free", router_config={"rate": 0.5}), seed) for seed in (1, 2)]
    ranks = on_ranks(with_experts_on_two_ranks)
    for found, expected in zip(ranks, alone, strict=True):
        torch.testing.assert_close(found["output"], expected["output"])
        torch.testing.assert_close(found["gradient"], expected["gradient"])
        assert torch.equal(found["load_E"], alone[0]["load_E"] + alone[1]["load_E"])
        assert torch.equal(found["bias_E"], ranks[0]["bias_E"]) and found["bias_E"].any()


def test_megatrons_optimizers_and_model_chunks_are_understood() -> None:
    chunks = [nn.Linear(2, 2), nn.Sequential(layer_of("loss-free"))]
    inner = torch.optim.SGD(chunks[1].parameters(), lr=0.1)
    empty = SimpleNamespace(optimizer=None, config=None)
    optimizer = ChainedOptimizer([SimpleNamespace(optimizer=inner, config=None), empty])
    handle = megatron.attach(optimizer, chunks)
    assert handle is not None and megatron.attach(optimizer, chunks) is handle
    y, _ = chunks[1][0](hidden())
    y.sum().backward()
    inner.step()
    assert handle.steps == 1 and set(handle.loads) == {"1.0.router"}
    assert megatron.attach(optimizer, chunks[:1]) is None


def test_recomputation_counts_once() -> None:
    layer = layer_of("loss-controlled")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = megatron.attach(optimizer, layer)
    y = checkpoint(lambda x: layer(x)[0], hidden(), use_reentrant=True)
    y.square().mean().backward()
    optimizer.step()
    assert handle is not None and int(handle.loads["router"].sum()) == S * B * K


def test_padding_counts_nowhere_and_still_fills_its_rows() -> None:
    layer = layer_of("loss-free")
    padding_BS = torch.zeros(B, S, dtype=torch.bool)
    padding_BS[2, 3:] = True
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = megatron.attach(optimizer, layer)
    weights_TE, map_TE = layer.router(hidden(), padding_BS.T)
    assert torch.equal(map_TE.sum(1), torch.full((S * B,), K))
    padded_T = padding_BS.T.reshape(-1)
    assert not weights_TE[padded_T].any() and weights_TE[~padded_T].any(1).all()
    run(layer, hidden(), padding_BS)
    optimizer.step()
    assert handle is not None and int(handle.loads["router"].sum()) == 2 * (S * B - 3) * K


# Routers with another number of experts a token.


NULL = {"source": "gate", "num_null": E // 2}
"""Half of the experts stand for none at all, so many slots stay empty."""


def test_empty_slots_are_filled_with_other_experts_of_weight_zero() -> None:
    filled, free = (
        layer_of("null-experts", router_config=NULL, moe_token_dispatcher_type=each)
        for each in ("alltoall", "allgather")
    )
    weights_TE, map_TE = routed(filled, hidden())
    assert torch.equal(map_TE.sum(1), torch.full((S * B,), K))
    assert 0 < (weights_TE > 0).sum() < map_TE.sum()
    assert torch.equal(routed(free, hidden())[0], weights_TE)
    assert torch.equal(routed(free, hidden())[1], weights_TE > 0)
    torch.testing.assert_close(run(free, hidden())[0], run(filled, hidden())[0])


def test_more_than_k_experts_a_token_need_the_all_gather_dispatcher() -> None:
    with pytest.raises(UnsupportedError, match="8 slots a token"):
        layer_of("top-p")
    layer = layer_of("top-p", router_config={"p": 0.9}, moe_token_dispatcher_type="allgather")
    weights_TE, map_TE = routed(layer, hidden().detach() / 20)
    assert torch.equal(map_TE, weights_TE > 0) and map_TE.sum(1).max() > K
    assert run(layer, hidden())[0].isfinite().all()


def test_experts_that_choose_tokens_need_the_all_gather_dispatcher() -> None:
    with pytest.raises(UnsupportedError, match="hands out 'pairs'"):
        layer_of("expert-choice")
    layer = layer_of("expert-choice", moe_token_dispatcher_type="allgather")
    _, map_TE = layer.router(hidden())
    assert map_TE.sum(0).unique().numel() == 1
    y, grad_x, grad_gate = run(layer, hidden())
    assert y.isfinite().all() and grad_x.any() and grad_gate.any()


# What Megatron does with its modules.


def test_state_stays_float32_and_is_in_distributed_checkpoints() -> None:
    layer = layer_of("loss-free").bfloat16()
    assert layer.router.weight.dtype == torch.bfloat16 and layer.router.router.expert_bias_E.dtype == torch.float32
    names = set(sharded_state_dict_default(layer.router, "decoder.layers.0.mlp.router."))
    prefix = "decoder.layers.0.mlp.router"
    assert {f"{prefix}.weight", f"{prefix}.router.expert_bias_E"} <= names


def test_a_second_balancer_is_refused() -> None:
    asked = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 0.001}
    with pytest.raises(ConfigError) as caught:
        layer_of("loss-free", **asked)
    assert str(caught.value).splitlines()[1] == (
        "  from   TransformerConfig: moe_aux_loss_coeff=0.01, moe_z_loss_coeff=0.001"
    )
    with pytest.raises(ConfigError, match="load_balancing_type='sinkhorn'"):
        layer_of("loss-free", moe_router_load_balancing_type="sinkhorn")


def test_groups_by_their_best_three_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="best 3"):
        layer_of(
            "topk", moe_router_topk=3, moe_router_pre_softmax=True, moe_router_num_groups=2, moe_router_group_topk=1
        )


@pytest.mark.parametrize(("router", "needed"), [("hash", "token_ids_T"), ("noisy-topk", "noise_key")])
def test_a_router_that_needs_what_megatron_does_not_tell_is_refused(router: str, needed: str) -> None:
    with pytest.raises(ContextError, match=needed):
        layer_of(router)
