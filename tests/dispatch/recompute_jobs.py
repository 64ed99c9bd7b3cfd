"""What ranks run for test_recompute.py: training steps of a small net whose routers balance over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moerouters import Gating, MoELayer, Router, attach, build, shard_experts

NUM_EXPERTS, TOP_K, WIDTH = 8, 2, 6


@dataclass(frozen=True)
class Setup:
    """One way to run the same step."""

    checkpointing: str = "none"
    """none, reentrant, nonreentrant, or nested: nonreentrant inside reentrant."""
    tokens: tuple[tuple[int, ...], ...] = ((5, 3, 9, 7), (4, 4, 2, 6))
    """Per micro-batch, per rank."""
    backwards: str = "each"
    """`each` right after its forward; `first` or `last` micro-batch first, after all forwards; `twice`: as `first`, and
    each a second time through the retained graph."""
    dispatcher: str | None = None
    scope: str = "exact"
    uses: int = 2
    """Of the second layer. With more than one, reentrant checkpointing adds weight gradients up in another order."""
    compiled: bool = False


class Block(nn.Module):
    """Mixes features, so that logits are recomputed too; then a layer."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.moe = MoELayer(router, hidden_size=WIDTH, expert_size=5)

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden: Tensor = self.moe(torch.tanh(self.mix(x_TD))).hidden
        return x_TD + hidden


class Net(nn.Module):
    """Two blocks; the second may be used twice."""

    def __init__(self, make_router: Callable[[], Router], checkpointing: str = "none", *, uses: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(make_router()), Block(make_router())])
        self.checkpointing, self.uses = checkpointing, uses
        self.calls: list[Any] = list(self.blocks)

    def forward(self, x_TD: Tensor) -> Tensor:
        for call in self.calls[:1] + self.calls[1:] * self.uses:
            x_TD = checkpointed(call, self.checkpointing)(x_TD)
        return x_TD


def checkpointed(call: Any, how: str) -> Any:
    """`call`, made so that backward runs it again."""
    if how == "none":
        return call
    if how == "nested":
        return partial(checkpoint, partial(checkpoint, call, use_reentrant=False), use_reentrant=True)
    return partial(checkpoint, call, use_reentrant=how == "reentrant")


def micro_batch(index: int, rank: int, tokens: int) -> Tensor:
    """Ranks favour other directions, so that each for itself would balance otherwise."""
    random = torch.Generator().manual_seed(10 * index + rank)
    return (torch.randn(tokens, WIDTH, generator=random) + torch.linspace(-1, 1, WIDTH).roll(rank)).requires_grad_()


def run_step(rank: int, setup: Setup) -> dict[str, Any]:
    """Gradients of this rank, loads and duals after the step, and what was asked of other ranks inside backward."""
    group = dist.group.WORLD
    assert group is not None
    gating = Gating.softmax(NUM_EXPERTS, TOP_K)
    config = {"scope": setup.scope, "iterations": 1}
    net = Net(lambda: build("bip", gating, config=config), setup.checkpointing, uses=setup.uses)
    if setup.dispatcher is not None:
        shard_experts(net, group, dispatcher=setup.dispatcher)
    if setup.compiled:
        torch._dynamo.reset()
        net.calls = [torch.compile(block, backend="eager") for block in net.blocks]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    handle = attach(optimizer, net)
    forward_calls: list[str] = []
    backward_calls: list[str] = []
    inputs = [micro_batch(i, rank, each[rank]) for i, each in enumerate(setup.tokens)]
    losses: list[Tensor] = []

    def run_backward(index: int, *, retain: bool = False) -> None:
        with counted_collectives(backward_calls):
            losses[index].backward(retain_graph=retain)

    for index, x_TD in enumerate(inputs):
        with counted_collectives(forward_calls):
            losses.append(net(x_TD).square().sum())
        if setup.backwards == "each":
            run_backward(index)
    if setup.backwards != "each":
        order = list(range(len(losses)))
        for index in order[::-1] if setup.backwards == "last" else order:
            run_backward(index, retain=setup.backwards == "twice")
        for index in order if setup.backwards == "twice" else []:
            run_backward(index)
    gradients = {name: gradient_of(p) for name, p in net.named_parameters()}
    gradients |= {f"x{i}": gradient_of(x_TD) for i, x_TD in enumerate(inputs)}
    optimizer.step()
    losses.clear()
    return {
        "gradients": gradients,
        "loads": {name: load_E.clone() for name, load_E in handle.loads.items()},
        "duals": {name: value.clone() for name, value in net.state_dict().items() if name.endswith("dual_E")},
        "forward": forward_calls,
        "backward": backward_calls,
        "remembered": [len(block.moe.running.first_passes) for block in net.blocks],
    }


def run_steps(rank: int, setups: list[Setup]) -> list[dict[str, Any]]:
    return [run_step(rank, setup) for setup in setups]


def gradient_of(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone()


@contextmanager
def counted_collectives(seen: list[str]) -> Iterator[None]:
    """Adds the names of the functions of torch.distributed that are called inside."""

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return function(*args, **kwargs)

        return call

    names = ("all_reduce", "all_to_all_single")
    with mock.patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in names}):
        yield
