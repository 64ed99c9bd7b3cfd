"""The local back-end as one operator against its three steps: when it is taken, and that nothing else changes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moerouters import Gating, MoELayer, RouteContext
from moerouters.dispatch import run
from moerouters.dispatch.local import LocalDispatcher
from moerouters.dispatch.run import through_experts
from moerouters.experts import GroupedExperts

from .parity import ROUTERS

E, K, D = 4, 2, 6


class InSteps(GroupedExperts):
    """Has a forward of its own, so it gets rows."""

    def forward(self, x_RD: Tensor, load_e: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x_RD, load_e)


def layer_of(kind: str = "slots", **settings: Any) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(ROUTERS[kind](Gating.softmax(E, K)), hidden_size=D, expert_size=5, **settings)


def in_steps(layer: MoELayer) -> MoELayer:
    layer.experts.__class__ = InSteps
    return layer


def x_of(tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("settings", [{}, {"shared_size": 3}, {"capacity_factor": 0.75}], ids=str)
@pytest.mark.parametrize("kind", ["slots", "dense", "pairs"])
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_equals_its_steps_with_gradients(tokens: int, kind: str, settings: dict[str, Any]) -> None:
    results = []
    for layer in (layer_of(kind, **settings).double(), in_steps(layer_of(kind, **settings).double())):
        x_TD = x_of(tokens).requires_grad_()
        y_TD = layer(x_TD, RouteContext(valid_T=torch.arange(tokens) % 5 != 3)).hidden
        wanted = [x_TD, *layer.parameters()]
        results.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), wanted, materialize_grads=True)])
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


def test_when_it_is_taken() -> None:
    def takes(layer: MoELayer, x_TD: Tensor) -> bool:
        return LocalDispatcher().fuses(layer.experts, x_TD, layer(x_TD).assignment)

    assert takes(layer_of(), x_of(3, torch.float32))
    assert takes(layer_of("dense").double(), x_of(3))
    assert not takes(layer_of("pairs").double(), x_of(3))
    assert not takes(in_steps(layer_of()).double(), x_of(3))
    assert not takes(layer_of().bfloat16(), x_of(3, torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not takes(layer_of(), x_of(3, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_assignment_needs_no_plan(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts at once, also in half precision; but not where experts have a forward of their own."""
    plans = []
    make_plan = run.make_plan
    monkeypatch.setattr(run, "make_plan", lambda *args, **kwargs: plans.append(args) or make_plan(*args, **kwargs))
    layer, x_TD = layer_of("dense").to(dtype), x_of(9, dtype)
    y_TD = layer(x_TD).hidden
    assert not plans
    expected_TD = in_steps(layer)(x_TD).hidden
    assert len(plans) == 1
    unit = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y_TD, expected_TD, rtol=unit, atol=unit * float(expected_TD.detach().abs().max()))


def test_any_function_of_rows_gets_rows() -> None:
    layer = layer_of().double()
    x_TD = x_of(7)
    assignment = layer(x_TD).assignment
    shapes = []

    def scaled(x_RD: Tensor, load_e: Tensor) -> Tensor:
        shapes.append(list(x_RD.shape))
        return 2 * x_RD

    y_TD = through_experts(LocalDispatcher(), x_TD, assignment, scaled)
    assert shapes == [[7 * K, D]]
    torch.testing.assert_close(y_TD, 2 * x_TD * assignment.weights.sum(dim=1, keepdim=True))


def test_hooks_of_the_experts_run() -> None:
    """FSDP2 brings the weights of a module in a pre-hook and lets them go in a hook."""
    layer, calls = layer_of(), []
    layer.experts.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.experts.register_forward_hook(lambda *_: calls.append("after"))
    layer(x_of(3, torch.float32))
    assert calls == ["before", "after"]


@pytest.mark.parametrize(("kind", "backend"), [("slots", "eager"), ("slots", "aot_eager"), ("dense", "aot_eager")])
def test_the_layer_compiles_whole_with_the_same_bits(kind: str, backend: str) -> None:
    layer = layer_of(kind, shared_size=3)
    x_TD = x_of(9, torch.float32)
    expected = layer(x_TD).hidden
    of_expected = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    found = torch.compile(layer, fullgraph=True, backend=backend)(x_TD).hidden
    assert torch.equal(found, expected)
    of_found = torch.autograd.grad(found.square().sum(), list(layer.parameters()))
    for mine, right in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(mine, right)
