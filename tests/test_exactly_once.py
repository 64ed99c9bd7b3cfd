"""Every token counts once and every loss reaches the gate once, however the model is compiled and checkpointed.

The oracle is a float64 loop over tokens with the cross entropy and the aux loss written out; what is compared are the
gradient of (CE + aux) / accumulation steps, the loads, and the state after one optimizer step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moerouters import Handle, MoELayer, attach
from support.balanced import ALPHA, RATE, balanced
from support.oracles import TokenLoop, gradients

# While it traces, dynamo instantiates torch.autograd.Function and looks at .grad of inner tensors; torch warns of both.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

NUM_EXPERTS, TOP_K, WIDTH, CLASSES = 4, 2, 6, 5
START_BIAS = [0.3, 0.0, -0.2, 0.1]


@dataclass(frozen=True)
class Setup:
    """One way to run the model."""

    loss_mode: str
    compiled: str
    checkpointing: str

    def __str__(self) -> str:
        return f"{self.loss_mode}-{self.compiled}-{self.checkpointing}"


SETUPS = [
    Setup(loss_mode, compiled, checkpointing)
    for loss_mode in ("collect", "inject")
    for compiled in ("eager", "outside", "inside")
    for checkpointing in ("none", "reentrant", "nonreentrant")
]


class Block(nn.Module):
    """Residual MoE; hands its losses on as a result, which is how they pass through checkpointing."""

    def __init__(self, loss_mode: str) -> None:
        super().__init__()
        self.moe = MoELayer(balanced(NUM_EXPERTS, TOP_K), hidden_size=WIDTH, expert_size=3, loss_mode=loss_mode)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, assignment = self.moe(x)
        losses = assignment.losses.values() if self.moe.loss_mode == "collect" else []
        return x + hidden + self.mix(x), sum(losses, x.new_zeros(()))


class Net(nn.Module):
    """Blocks and a classifier over tokens."""

    def __init__(self, setup: Setup, *, backend: str = "none", num_layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(setup.loss_mode) for _ in range(num_layers))
        self.head = nn.Linear(WIDTH, CLASSES)
        calls: list[Any] = list(self.blocks)
        if setup.compiled == "inside":
            calls = [torch.compile(block, backend=backend) for block in self.blocks]
        if setup.checkpointing != "none":
            calls = [partial(checkpoint, call, use_reentrant=setup.checkpointing == "reentrant") for call in calls]
        self.calls = calls

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, aux = self.embed(x), x.new_zeros(())
        for call in self.calls:
            x, more = call(x)
            aux = aux + more
        return self.head(x), aux


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of [2, 3] tokens and their targets."""
    random = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2, 3, WIDTH, generator=random, dtype=torch.float64),
            torch.randint(CLASSES, (2, 3), generator=random),
        )
        for _ in range(number)
    ]


@dataclass(frozen=True)
class Expected:
    gradients: dict[str, Tensor]
    loads: list[list[int]]


def oracle(net: Net, number: int) -> Expected:
    """Gradient of the mean over micro-batches of CE + aux, and the loads of each layer over all of them."""
    weights = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    total = torch.zeros((), dtype=torch.float64)
    loads = [[0] * NUM_EXPERTS for _ in net.blocks]
    for x, targets in batches(number):
        hidden_TD = x.reshape(-1, WIDTH) @ weights["embed.weight"].T + weights["embed.bias"]
        aux = torch.zeros((), dtype=torch.float64)
        for i in range(len(net.blocks)):
            prefix = f"blocks.{i}.moe."
            mine = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            moe = TokenLoop(mine, TOP_K, bias=START_BIAS)
            mixed_TD = hidden_TD @ weights[f"blocks.{i}.mix.weight"].T + weights[f"blocks.{i}.mix.bias"]
            hidden_TD = hidden_TD + moe(hidden_TD) + mixed_TD
            aux = aux + moe.switch_loss(ALPHA)
            loads[i] = [a + b for a, b in zip(loads[i], moe.load, strict=True)]
        logits = hidden_TD @ weights["head.weight"].T + weights["head.bias"]
        total = total + F.cross_entropy(logits, targets.reshape(-1)) + aux
    return Expected(gradients(total / number, weights), loads)


@pytest.fixture(scope="module", params=SETUPS, ids=str)
def running(request: pytest.FixtureRequest) -> Iterator[tuple[Net, Any, str]]:
    """(the net, what to call, loss mode); one compilation, of one layer, serves every accumulation."""
    setup: Setup = request.param
    torch._dynamo.reset()
    net = Net(setup, backend="aot_eager", num_layers=2 if setup.compiled == "eager" else 1).double()
    yield net, torch.compile(net, backend="aot_eager") if setup.compiled == "outside" else net, setup.loss_mode
    torch._dynamo.reset()


def train_step(
    handle: Handle,
    optimizer: torch.optim.Optimizer,
    call: Any,
    loss_mode: str,
    *,
    number: int,
    scaler: torch.amp.GradScaler | None,
) -> None:
    handle.scale_losses(accumulation_steps=number, scaler=scaler)
    for x, targets in batches(number):
        logits, aux = call(x)
        loss = F.cross_entropy(logits.reshape(-1, CLASSES), targets.reshape(-1))
        loss = (loss + aux if loss_mode == "collect" else loss) / number
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def check(net: Net, call: Any, loss_mode: str, *, number: int, scaler: torch.amp.GradScaler | None) -> None:
    for block in net.blocks:
        block.moe.router.b_E.copy_(torch.tensor(START_BIAS))
    expected = oracle(net, number)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    handle = attach(optimizer, net)
    try:
        train_step(handle, optimizer, call, loss_mode, number=number, scaler=scaler)
    finally:
        handle.remove()
    found = {name: p.grad for name, p in net.named_parameters()}
    optimizer.zero_grad()

    assert [handle.loads[f"blocks.{i}.moe"].tolist() for i in range(len(net.blocks))] == expected.loads
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for block, load in zip(net.blocks, expected.loads, strict=True):
        mean = sum(load) / NUM_EXPERTS
        moved = [b + RATE * ((mean > n) - (mean < n)) for b, n in zip(START_BIAS, load, strict=True)]
        torch.testing.assert_close(block.moe.router.b_E, torch.tensor(moved))


@pytest.mark.parametrize("number", [1, 4])
def test_accumulation(running: tuple[Net, Any, str], number: int) -> None:
    check(*running, number=number, scaler=None)


def test_grad_scaler(running: tuple[Net, Any, str]) -> None:
    check(*running, number=2, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))


@pytest.mark.slow
@pytest.mark.parametrize("setup", [setup for setup in SETUPS if setup.compiled != "eager"], ids=str)
def test_inductor(setup: Setup) -> None:
    torch._dynamo.reset()
    net = Net(setup, backend="inductor").double()
    call = torch.compile(net) if setup.compiled == "outside" else net
    for number in (1, 4):
        check(net, call, setup.loss_mode, number=number, scaler=None)
    check(net, call, setup.loss_mode, number=2, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))


def test_the_oracle_notices_a_loss_that_counts_twice() -> None:
    """The tolerance above is far below one lost or doubled aux loss."""
    net = Net(Setup("collect", "eager", "none")).double()
    gate = "blocks.0.moe.gate.weight"
    once = oracle(net, 1).gradients[gate]
    x, targets = batches(1)[0]
    logits, aux = net(x)
    (F.cross_entropy(logits.reshape(-1, CLASSES), targets.reshape(-1)) + 2 * aux).backward()
    assert float((net.blocks[0].moe.gate.weight.grad - once).abs().max() / once.abs().max()) > 1e-3
