"""A layer whose experts run in Triton, interpreted on a CPU: what a GPU gets, without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moerouters import Gating, MoELayer
from moerouters.builtin import TopKRouter
from moerouters.kernels import expert_mlp

pytest.importorskip("triton")
from moerouters.kernels.gpu import grouped_mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, D = 19, 12


def layer_of(dtype: torch.dtype, **settings: Any) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(TopKRouter(Gating.softmax(4, 2)), hidden_size=D, expert_size=10, **settings)
    return layer.to(DEVICE, dtype)


def x_of(dtype: torch.dtype) -> Tensor:
    x_TD = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x_TD.to(DEVICE, dtype).requires_grad_()


def step(layer: MoELayer, x_TD: Tensor) -> list[Tensor]:
    """Output and gradients of input and parameters."""
    y_TD = layer(x_TD).hidden
    return [y_TD, *torch.autograd.grad(y_TD.double().square().sum(), [x_TD, *layer.parameters()])]


@pytest.fixture(autouse=True)
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor but float64, which no kernel takes."""
    monkeypatch.setattr(
        expert_mlp, "triton_serves", lambda *tensors: all(tensor.dtype != torch.float64 for tensor in tensors)
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"activation": "gelu"}, {"shared_size": 6, "capacity_factor": 0.75}],
    ids=["swiglu", "gelu", "more"],
)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float16, 1e-2)], ids=["float32", "float16"])
def test_a_step_is_that_of_float64(dtype: torch.dtype, limit: float, settings: dict[str, Any]) -> None:
    exact = step(layer_of(dtype, **settings).double(), x_of(dtype).double().detach().requires_grad_())
    for mine, right in zip(step(layer_of(dtype, **settings), x_of(dtype)), exact, strict=True):
        assert (mine.double() - right).norm() <= limit * right.norm()


@pytest.mark.parametrize("wanted", ["input", "weights"])
def test_input_and_weight_gradients_run_apart(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a pipeline asks for them: one pass for what goes on to the stage before, a later one for the weights."""
    layer, x_TD = layer_of(torch.float32), x_of(torch.float32)
    ran = []
    for name in ("projection", "weight_gradient"):
        original = getattr(grouped_mlp, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            ran.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(grouped_mlp, name, counted)
    y_TD = layer(x_TD).hidden
    ran.clear()
    weights = list(layer.experts.parameters())
    torch.autograd.grad(y_TD.sum(), [x_TD] if wanted == "input" else weights)
    assert ran == (["projection"] if wanted == "input" else ["weight_gradient"] * 2)
