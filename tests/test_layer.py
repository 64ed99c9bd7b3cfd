"""MoELayer against the loop over tokens."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from moerouters import AssignmentKind, Capabilities, Gating, MoELayer, RouteContext, Router, Selection, limit_capacity
from moerouters.errors import ShapeError
from support.assignments import assert_same_bits, tensors_of
from support.balanced import ALPHA, balanced
from support.oracles import TokenLoop, gradients

E, K, D = 4, 2, 6


def layer_of(**settings: Any) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(balanced(E, K), **{"hidden_size": D, "expert_size": 5} | settings)


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))


def copied(layer: MoELayer) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("shared_size", [0, 3])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_equals_the_loop_with_gradients(shape: tuple[int, ...], shared_size: int, activation: str) -> None:
    layer = layer_of(shared_size=shared_size, activation=activation).double()
    layer.router.b_E.copy_(torch.tensor([0.2, 0.0, 0.1, -0.1]))
    x = x_of(*shape).double()
    hidden, assignment = layer(x)
    weights = copied(layer)
    loop = TokenLoop(weights, K, activation, bias=layer.router.b_E.tolist())
    expected_TD = loop(x.reshape(-1, D))
    torch.testing.assert_close(hidden, expected_TD.reshape(x.shape), rtol=1e-10, atol=1e-12)
    assert assignment.expert_ids.tolist() == loop.ids
    assert assignment.load_E.tolist() == loop.load
    torch.testing.assert_close(assignment.losses["switch"], loop.switch_loss(ALPHA), rtol=1e-10, atol=1e-12)
    found = gradients(hidden.square().sum() + sum(assignment.losses.values()), dict(layer.named_parameters()))
    expected = gradients(expected_TD.square().sum() + loop.switch_loss(ALPHA), weights)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", ["position", "weight"])
def test_capacity(policy: str) -> None:
    layer = layer_of(capacity_factor=0.75, drop_policy=policy, shared_size=3).double()
    x_TD = x_of(9).double()
    hidden, assignment = layer(x_TD)
    full = layer.router(layer._logits(x_TD))
    expected = limit_capacity(full, math.ceil(0.75 * 9 * K / E), policy)
    assert int(assignment.dropped) == int(expected.dropped) > 0
    assert torch.equal(assignment.load_E, full.load_E)
    kept = expected.expert_ids.tolist()
    loop = TokenLoop(copied(layer), K, keep=lambda token, expert: expert in kept[token])
    torch.testing.assert_close(hidden, loop(x_TD), rtol=1e-10, atol=1e-12)


def test_padding_gets_nothing_but_the_shared_expert() -> None:
    layer = layer_of(shared_size=3)
    x = x_of(2, 4)
    valid_T = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0], dtype=torch.bool)
    hidden, assignment = layer(x, RouteContext(valid_T=valid_T))
    everything = torch.tensor([8])
    shared_TD = layer.shared(x.reshape(-1, D), everything)
    assert torch.equal(hidden.reshape(-1, D)[~valid_T], shared_TD[~valid_T])
    assert int(assignment.load_E.sum()) == 4 * K


def test_the_router_learns_what_only_the_layer_knows() -> None:
    seen: list[RouteContext] = []

    class Looking(Router):
        def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> None:
            seen.append(ctx)

    layer = MoELayer(Looking(Gating.softmax(E, K)), hidden_size=D, expert_size=5)
    x = x_of(2, 3)
    seen.clear()
    layer(x)
    assert seen[0].sequence_ids_T.tolist() == [0, 0, 0, 1, 1, 1]
    assert seen[0].num_sequences == 2
    assert torch.equal(seen[0].hidden_TD, x.reshape(-1, D))
    own = RouteContext(sequence_ids_T=torch.tensor([1, 1, 0, 0, 0, 0]), num_sequences=2, hidden_TD=torch.zeros(6, 1))
    layer(x, own)
    assert seen[1].sequence_ids_T is own.sequence_ids_T
    assert seen[1].hidden_TD is own.hidden_TD
    layer(x_of(5))
    assert seen[2].sequence_ids_T is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_come_back(dtype: torch.dtype) -> None:
    layer = layer_of(shared_size=3).to(dtype)
    hidden, assignment = layer(x_of(5).to(dtype))
    assert hidden.dtype == dtype
    assert assignment.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer.router.b_E.dtype == torch.float32


def test_autocast_leaves_the_routing_in_float32() -> None:
    layer = layer_of()
    x = x_of(3, 5)
    outside = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(x)
    assert_same_bits(tensors_of(inside.assignment), tensors_of(outside.assignment))
    assert inside.hidden.dtype == torch.float32
    torch.testing.assert_close(inside.hidden, outside.hidden, rtol=2e-2, atol=2e-2)
    assert not torch.equal(inside.hidden, outside.hidden)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)], ids=str)
def test_no_tokens(shape: tuple[int, ...]) -> None:
    layer = layer_of(shared_size=3, capacity_factor=1.0)
    x = x_of(*shape).requires_grad_()
    hidden, assignment = layer(x)
    assert hidden.shape == x.shape
    (hidden.sum() + sum(assignment.losses.values())).backward()
    for parameter in layer.parameters():
        assert not parameter.grad.any()


@pytest.mark.parametrize("loss_mode", ["collect", "inject"])
def test_eval_is_quiet(loss_mode: str) -> None:
    layer = layer_of(loss_mode=loss_mode).eval()
    assignment = layer(x_of(5)).assignment
    assert not assignment.losses
    assert not assignment.stats
    assert int(layer.running.sums["tokens"]) == 0


def test_injected_losses_are_shown_and_carry_no_graph() -> None:
    layer = layer_of(loss_mode="inject")
    assignment = layer(x_of(5)).assignment
    shown = layer_of()(x_of(5)).assignment
    assert torch.equal(assignment.losses["switch"], shown.losses["switch"])
    assert not assignment.losses["switch"].requires_grad
    assert shown.losses["switch"].requires_grad


def test_copies_behave_the_same() -> None:
    layer = layer_of(shared_size=3)
    layer.router.b_E.copy_(torch.tensor([0.2, 0.0, 0.1, -0.1]))
    expected = layer(x_of(5))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        hidden, assignment = twin(x_of(5))
        assert torch.equal(hidden, expected.hidden)
        assert_same_bits(tensors_of(assignment), tensors_of(expected.assignment))
        assert int(twin.running.sums["tokens"]) == 10
    assert int(layer.running.sums["tokens"]) == 5


def test_meta_device_initialisation() -> None:
    with torch.device("meta"):
        layer = MoELayer(balanced(E, K), hidden_size=D, expert_size=5)
    layer.to_empty(device="cpu")
    torch.manual_seed(0)
    layer.gate.reset_parameters()
    layer.experts.reset_parameters()
    layer.router.reset_state()
    assert_same_bits(layer.state_dict(), layer_of().state_dict())
    expected = layer_of()(x_of(5))
    hidden, assignment = layer(x_of(5))
    assert torch.equal(hidden, expected.hidden)
    sum(assignment.losses.values()).backward()
    assert layer.running.probe.grad.item() == 1
    assert layer.running.sums["load_E"].tolist() == assignment.load_E.tolist()


def test_counters_stay_out_of_checkpoints() -> None:
    assert layer_of().state_dict().keys() == {
        "gate.weight",
        "experts.up_eFD",
        "experts.down_eDF",
        "router.b_E",
    }


def test_dense_is_the_weighted_sum_of_all_experts() -> None:
    class Dense(Router):
        capabilities = Capabilities(assignment=AssignmentKind.DENSE)

        def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
            return Selection.dense(num_tokens=len(adjusted_TE), num_experts=E, device=adjusted_TE.device)

    torch.manual_seed(0)
    layer = MoELayer(Dense(Gating.softmax(E, K)), hidden_size=D, expert_size=5).double()
    x_TD = x_of(5).double()
    loop = TokenLoop(copied(layer), top_k=E)
    torch.testing.assert_close(layer(x_TD).hidden, loop(x_TD), rtol=1e-10, atol=1e-12)


def test_hidden_states_of_another_width() -> None:
    with pytest.raises(ShapeError, match="the layer got hidden states of width 7, it was built with 6"):
        layer_of()(torch.zeros(2, 7))
