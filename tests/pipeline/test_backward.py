"""Both halves together are the whole backward, and nothing runs twice."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moerouters import Gating, MoELayer
from moerouters.builtin import TopKRouter
from moerouters.pipeline.backward import input_half, whole_backward
from support.pipeline_moe_jobs import counted_products


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.made[name] += name in ("mm", "addmm", "bmm")
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.made.values())


class Twice(nn.Module):
    """One weight at two places, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(torch.tanh(self.two(torch.tanh(self.one(x)))))
        return y


class Loose(nn.Module):
    """An output that needs no input, of a weight that another output uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.w * self.v, self.w.exp()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "twice": Twice,
    "loose": Loose,
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "bare": nn.Tanh,
}


def outputs_of(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    found = module(x)
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("first", [False, True], ids=["middle", "first stage"])
def test_halves_are_the_whole(name: str, first: bool) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=not first)
    grads = [torch.randn_like(output) for output in outputs_of(module, x)]

    with Products() as whole:
        whole_backward(outputs_of(module, x), grads)
    expected = [None if p.grad is None else p.grad.clone() for p in (x, *module.parameters())]
    x.grad = None
    module.zero_grad()

    with Products() as apart:
        half = input_half(outputs_of(module, x), grads, [x])
        if not first:
            assert x.grad is not None
            torch.testing.assert_close(x.grad, expected[0], rtol=1e-12, atol=1e-12)
        half.run()
    for found, right in zip((x, *module.parameters()), expected, strict=True):
        assert (found.grad is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(found.grad, right, rtol=1e-12, atol=1e-12)
    assert apart.total == whole.total


def test_the_first_half_leaves_weights_alone() -> None:
    module, x = mlp(), torch.randn(3, 4, requires_grad=True)
    with Products() as made:
        output = module(x)
        forward = made.total
        half = input_half([output], [torch.ones_like(output)], [x])
    assert made.total == forward + 2
    assert all(p.grad is None for p in module.parameters())
    half.run()
    assert all(p.grad is not None for p in module.parameters())


def test_the_graph_goes_with_the_second_half() -> None:
    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    kept: weakref.WeakSet[Box] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Box:
        box = Box(tensor)
        kept.add(box)
        return box

    module, x = mlp(), torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        output = module(x)
    half = input_half([output], [torch.ones_like(output)], [x])
    del output
    assert kept
    half.run()
    gc.collect()
    assert not kept


def test_nothing_wants_a_gradient() -> None:
    x = torch.randn(3)
    half = input_half([x * 2], [torch.ones(3)], [x])
    half.run()
    whole_backward([x * 2], [torch.ones(3)])
    assert x.grad is None


def test_experts_have_their_own_gradients_in_the_second_half() -> None:
    """Of a backward of MoELayer's: products for inputs first, those for the experts' weights after, and none twice."""
    layer = MoELayer(TopKRouter(Gating.softmax(8, 2)), hidden_size=6, expert_size=4).double()
    x = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    with counted_products() as made:
        y = layer(x).hidden
        forward = made[0]
        whole_backward([y], [torch.ones_like(y)])
        whole = made[0] - forward
    layer.zero_grad()
    with counted_products() as made:
        y = layer(x).hidden
        half = input_half([y], [torch.ones_like(y)], [x])
        first = made[0] - forward
        assert all(p.grad is None for p in layer.experts.parameters())
        half.run()
        second = made[0] - forward - first
    assert first + second == whole
    assert min(first, second) > 0
    assert all(p.grad is not None for p in layer.experts.parameters())
