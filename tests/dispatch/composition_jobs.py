"""One cell of the composition matrix on the ranks of the pool.

A training step of a sharded model, and of the same model in one process; both run on every rank, which compares them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from moerouters import Gating, MoELayer, attach, build, expert_parameters, shard_experts

from .composition_page import COLUMNS
from .parity import group_of, mesh_of

WIDTH, EXPERT_WIDTH, E, K = 6, 6, 8, 2


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a column changes. Unless it says otherwise, a loss is in play, and injected: its gradient needs care."""

    router: str = "loss-controlled"
    loss_mode: Literal["collect", "inject"] = "inject"
    shared: bool = False
    capacity_factor: float | None = None
    micro_batches: int = 1
    chunks: int = 1
    reentrant: bool | None = None
    """Activation checkpointing of the layer, and its kind."""
    compile: bool = False
    autocast: bool = False
    fsdp: bool = False


SETTINGS = {
    "`topk`": Setting(router="topk"),
    "`loss-free`": Setting(router="loss-free", micro_batches=2),
    "`loss-controlled`": Setting(loss_mode="collect"),
    "`bip`": Setting(router="bip", micro_batches=2),
    "shared expert": Setting(shared=True),
    "capacity": Setting(capacity_factor=0.75),
    "two chunks": Setting(chunks=2, shared=True),
    "gradient accumulation": Setting(micro_batches=2),
    "checkpointing, reentrant": Setting(reentrant=True),
    "checkpointing, non-reentrant": Setting(reentrant=False),
    "`torch.compile`": Setting(compile=True),
    "bf16 autocast": Setting(autocast=True),
    "FSDP2": Setting(fsdp=True, micro_batches=2),
}
assert tuple(SETTINGS) == COLUMNS


class Model(nn.Module):
    """A dense layer and an MoE layer: parameters that every rank has beside those that it alone has."""

    def __init__(self, setting: Setting, backend: str) -> None:
        super().__init__()
        factor = setting.capacity_factor
        if backend == "padded" and factor is None:
            factor = E / K  # room for everything: the back-end wants a capacity
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.dense = nn.Linear(WIDTH, WIDTH)
            self.moe = MoELayer(
                build(setting.router, Gating.softmax(E, K)),
                hidden_size=WIDTH,
                expert_size=EXPERT_WIDTH,
                shared_size=4 if setting.shared else 0,
                capacity_factor=factor,
                loss_mode=setting.loss_mode,
            )
        self.reentrant: bool | None = None
        self.to(torch.float32 if setting.autocast else torch.float64)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = torch.tanh(self.dense(x_TD))
        if self.reentrant is None:
            y_TD, loss = self._moe(x_TD)
        else:
            y_TD, loss = checkpoint(self._moe, x_TD, use_reentrant=self.reentrant)
        return x_TD + y_TD, loss

    def _moe(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        hidden, assignment = self.moe(x_TD)
        loss = x_TD.new_zeros(())
        if self.moe.loss_mode == "collect":
            loss = loss + sum(assignment.losses.values())
        return hidden, loss


@dataclass(frozen=True)
class Batches:
    """Tokens by source, of which ranks that hold the same tokens share one."""

    backend: str
    setting: Setting

    def tokens(self, source: int) -> int:
        if self.backend == "padded":
            return 6  # equal capacities need equal numbers of tokens
        return (6, 5, 0, 7)[source]

    def __call__(self, source: int, batch: int) -> tuple[Tensor, Tensor]:
        """x_TD, and what the output is multiplied with to give the loss."""
        random = torch.Generator().manual_seed(10 * source + batch)
        shape = 2, self.tokens(source), WIDTH
        x_TD, pull_TD = torch.randn(shape, generator=random, dtype=torch.float64)
        return x_TD.to(torch.float32 if self.setting.autocast else torch.float64).requires_grad_(), pull_TD


def train(model: Callable[[Tensor], tuple[Tensor, Tensor]], batches: Batches, source: int) -> Iterator[Tensor]:
    """Forward and backward of every micro-batch; gives outputs, then gradients of inputs."""
    inputs = []
    for batch in range(batches.setting.micro_batches):
        x_TD, pull_TD = batches(source, batch)
        autocast: AbstractContextManager[Any] = nullcontext()
        if batches.setting.autocast:
            autocast = torch.autocast("cpu", torch.bfloat16)
        with autocast:
            y_TD, loss = model(x_TD)
        ((y_TD.double() * pull_TD).sum() + 3 * loss.double()).backward()  # type: ignore[no-untyped-call]
        inputs.append(x_TD)
        yield y_TD.detach()
    for x_TD in inputs:
        assert x_TD.grad is not None
        yield x_TD.grad


def alone(backend: str, setting: Setting, sources: int) -> tuple[Model, list[list[Tensor]]]:
    """The model in one process, which sees the tokens of every source; after one optimizer step."""
    model = Model(setting, backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach(optimizer, model, token_group=group_of(1))
    batches = Batches(backend, setting)
    seen = [list(train(model, batches, source)) for source in range(sources)]
    optimizer.step()
    handle.remove()
    return model, seen


def differences(rank: int, backend: str, column: str) -> dict[str, float]:
    """By quantity the largest difference |sharded - alone| / (1 + |alone|) on this rank."""
    setting = SETTINGS[column]
    layout = Layout(backend, rank, setting)
    reference, seen = alone(backend, setting, layout.sources)

    model = Model(setting, backend)
    model.reentrant = setting.reentrant
    if backend == "local":
        model.moe.set_dispatcher(model.moe.dispatcher, chunks=setting.chunks)
    else:
        shard_experts(model, layout.experts_over, dispatcher=backend, chunks=setting.chunks)
    experts = {id(parameter) for parameter in expert_parameters(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in experts}
    if setting.fsdp:
        layout.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = attach(optimizer, model, token_group=layout.token_group)
    call = torch.compile(model, backend="aot_eager") if setting.compile else model
    have = list(train(call, Batches(backend, setting), layout.source))
    optimizer.step()
    handle.remove()
    if setting.compile:
        torch.compiler.reset()

    found = {"y and x.grad": max(_apart(a, b) for a, b in zip(have, seen[layout.source], strict=True))}
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        want = _grad(wanted[name])
        if name in names:
            want = want[layout.experts]
        found[f"{name}.grad"] = _apart(layout.summed(_grad(parameter), own=name in names), want)
    state = model.moe.router.state_dict()
    for name, want in reference.moe.router.state_dict().items():
        found[name] = _apart(state[name], want)
    return found


class Layout:
    """Who shares what: experts over all four ranks; under FSDP2 over two, and each half of them on two ranks.

    hierarchical: on two nodes; mesh3d: in two halves each, and under FSDP2 only so.
    """

    def __init__(self, backend: str, rank: int, setting: Setting) -> None:
        self.local, self.fsdp, cut = backend == "local", setting.fsdp, backend == "mesh3d"
        flat = mesh_of((2, 2) if self.fsdp else (1, 4))
        self.mesh, self.experts_over = flat, flat["expert"]
        if cut:
            self.mesh = self.experts_over = mesh_of((2, 1, 2) if self.fsdp else (1, 2, 2))
        elif backend == "hierarchical":
            self.experts_over = mesh_of((2, 2, 1))["expert", "model"] if self.fsdp else mesh_of((2, 2))
        member, members = flat["expert"].get_local_rank(), flat["expert"].size()
        # Gradients of cut experts are DTensors, and gathered.
        self.experts = slice(None) if cut else slice(member * E // members, (member + 1) * E // members)
        alike = {"tensor_sliced": members, "mesh3d": 2}.get(backend, 1)
        self.source, self.sources = rank // alike, dist.get_world_size() // alike
        self.distinct = mesh_of((4,)) if alike == 1 else mesh_of((2, 1, 2) if cut else flat.shape)["data"]
        self.token_group = self.distinct.get_group()
        """Ranks with distinct tokens."""

    def wrap(self, model: Model) -> None:
        """fully_shard: experts over the ranks that have the same ones, the rest over all that have other tokens."""
        if not self.local:
            fully_shard(model.moe.experts, mesh=self.mesh["data"])
        fully_shard(model, mesh=self.distinct)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # the sum over ranks, not their mean

    def summed(self, gradient: Tensor, *, own: bool) -> Tensor:
        """The gradient of the sum of all losses. FSDP2 did that already, experts know it from their tokens."""
        if not (self.fsdp or own):
            dist.all_reduce(gradient, group=self.token_group)
        return gradient


def _grad(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    gradient = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().clone()
    return gradient.flatten(1, 2) if gradient.dim() == 4 else gradient  # mesh3d has a dimension for gate and up


def _apart(have: Tensor, want: Tensor) -> float:
    assert have.shape == want.shape, f"{tuple(have.shape)}, not {tuple(want.shape)}"
    have, want = have.double(), want.double()
    return float(((have - want).abs() / (1 + want.abs())).max()) if want.numel() else 0.0


def outcome(rank: int, backend: str, column: str) -> dict[str, float] | str:
    """`differences`, or the last line of what was raised: a cell that does not work is a result too."""
    try:
        return differences(rank, backend, column)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


@cache
def load_compiler(rank: int) -> None:
    """Import, once per process, what compiling a layer needs."""
    model = Model(SETTINGS["`torch.compile`"], "local")
    list(train(torch.compile(model, backend="aot_eager"), Batches("local", SETTINGS["`torch.compile`"]), 0))
    torch.compiler.reset()
