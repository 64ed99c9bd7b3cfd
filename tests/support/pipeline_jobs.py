"""What the ranks of the pool do for the tests of the pipeline's runtime, and the same in one process without one."""

from __future__ import annotations

import contextlib
import gc
import io
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from moerouters.errors import MoeroutersError, PipelineError
from moerouters.pipeline import Pipeline, Schedule, StageGraph, build, from_table, lower
from moerouters.pipeline.program import Held
from moerouters.pipeline.torch_engine import TorchPipeline

WIDTH, ROWS = 4, 3
"""Of a hidden state; of a microbatch."""


class Linear(nn.Module):
    """A stage of a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.map = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.map(self.norm(x)))


class Junction(nn.Module):
    """A stage of any number of inputs and outputs, each output of all inputs."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(outputs)])

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        total = torch.stack([x.double() for x in inputs]).sum(dim=0)
        return tuple(torch.tanh(each(total)) for each in self.maps)


@dataclass(frozen=True)
class Case:
    """Some steps of a model under a schedule."""

    schedule: Schedule
    graph: StageGraph | None = None
    steps: int = 1
    tied: bool = False
    """The weight of the first stage's map and the last one's are the same."""
    engine: str = "ours"
    """Who runs it: `ours` or `torch`."""

    @property
    def shared(self) -> dict[str, list[tuple[int, str]]]:
        return {"map": [(0, "map.weight"), (self.schedule.num_stages - 1, "map.weight")]} if self.tied else {}

    @property
    def wiring(self) -> StageGraph:
        return self.graph or StageGraph.chain(self.schedule.num_stages)

    def stage(self, stage: int) -> nn.Module:
        torch.manual_seed(100 + (0 if self.tied and stage == self.schedule.num_stages - 1 else stage))
        module = Linear() if self.graph is None else Junction(len(self.graph.stages[stage].gives))
        return module.double()

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        names = [name for name in self.wiring.consumers if name not in self.wiring.origins]
        rows = self.schedule.num_microbatches * (ROWS + step // 2)
        return {name: torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for name in (*names, "target")}


def loss_of(*args: Tensor) -> Tensor:
    *outputs, target = args
    return torch.stack([((output - target) ** 2).mean() for output in outputs]).sum()


Result = tuple[list[Tensor], dict[str, Tensor]]
"""Losses of the microbatches of each step, and gradients by stage and name."""


def alone(case: Case) -> Result:
    """Without a pipeline: one microbatch after the other, every stage."""
    stages = [case.stage(stage) for stage in range(case.schedule.num_stages)]
    if case.tied:
        stages[-1].map.weight = stages[0].map.weight  # type: ignore[union-attr, assignment]
    losses = []
    M = case.schedule.num_microbatches
    for step in range(case.steps):
        found = []
        for m in range(M):
            values = {name: part.tensor_split(M)[m] for name, part in case.batch(step).items()}
            loss = _forward(case.wiring, stages, values)
            (loss / M).backward()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    return losses, _grads(dict(enumerate(stages)))


def piped(rank: int, case: Case) -> Result | None:
    """With one. Ranks that the schedule has no use for do nothing."""
    group = group_of_first(case.schedule.num_ranks)
    if rank >= case.schedule.num_ranks:
        return None
    kind: Any = TorchPipeline if case.engine == "torch" else Pipeline
    pipeline = kind(case.schedule, case.stage, loss_of, group=group, graph=case.graph, shared=case.shared)
    losses = []
    for step in range(case.steps):
        found = pipeline.step(**case.batch(step))
        if found is not None:
            losses.append(found)
    return losses, _grads({int(stage): module for stage, module in pipeline.stages.items()})


def expect_same(case: Case, results: list[Result | None]) -> None:
    """Losses and gradients of all ranks together are those of one process, in float64 to 1e-10."""
    losses, grads = alone(case)
    given = [result for result in results if result is not None]
    assert len(given) == case.schedule.num_ranks
    last = given[case.schedule.placement[-1]][0]
    assert len(last) == case.steps and sum(bool(each[0]) for each in given) == 1
    for mine, right in zip(last, losses, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)
    found = {name: grad for result in given for name, grad in result[1].items()}
    assert found.keys() == grads.keys()
    for name, right in grads.items():
        torch.testing.assert_close(found[name], right, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


class _Graph:
    """Lives as long as the autograd graph of one forward."""

    alive: ClassVar[weakref.WeakSet[_Graph]] = weakref.WeakSet()


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.graph = _Graph()
        _Graph.alive.add(ctx.graph)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.zeros(())  # with a weight it belongs to both halves


class Counted(nn.Module):
    """A stage that looks how many graphs live on this rank."""

    most = 0

    def __init__(self) -> None:
        super().__init__()
        self.map, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.tanh(self.map(_Mark.apply(x, self.weight)))  # type: ignore[no-untyped-call]
        Counted.most = max(Counted.most, len(_Graph.alive))
        return y


def peaks(rank: int, schedule: Schedule) -> tuple[Held, Held, int, int]:
    """What the program says, what the runtime counted, graphs that lived at once, and what is left after the step."""
    Counted.most = 0
    pipeline = Pipeline(schedule, lambda stage: Counted(), loss_of)
    batch = torch.ones(schedule.num_microbatches, WIDTH)
    pipeline.step(input=batch, target=batch)
    gc.collect()
    return lower(schedule).programs[rank].peak(), pipeline.held, Counted.most, len(_Graph.alive)


def said(rank: int, what: str) -> str:
    """The error of a pipeline that is set up or fed in a wrong way."""
    try:
        if what == "schedules":
            Pipeline(build("1f1b", 4, 4 if rank == 2 else 2), lambda stage: Linear(), loss_of)
        if what == "ranks":
            Pipeline(build("1f1b", 2, 2), lambda stage: Linear(), loss_of)
        if what == "stages":
            Pipeline(build("1f1b", 4, 2), [Linear()] * 3, loss_of)
        if what == "shared":
            Pipeline(
                build("1f1b", 4, 2),
                lambda stage: Linear(),
                loss_of,
                shared={"w": [(stage, "no") for stage in range(4)]},
            )
        own = init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "pp"))["pp"].get_group()
        x = torch.ones(4, WIDTH)
        if what in ("name", "rows"):
            pipeline = Pipeline(build("1f1b", 1, 2), lambda stage: Linear(), loss_of, group=own)
            pipeline.step(input=x) if what == "name" else pipeline.step(input=x, target=x[:3])
        if what == "count":
            Pipeline(build("1f1b", 1, 2), lambda stage: Linear(), loss_of, group=own).evaluate(3, input=x, target=x)
        if what == "outputs":
            graph = StageGraph.of(("input", ("y", "z")))
            Pipeline(build("1f1b", 1, 2), lambda stage: Linear(), loss_of, group=own, graph=graph).step(
                input=x, target=x
            )
    except MoeroutersError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def evaluated(rank: int, case: Case) -> tuple[list[Tensor | None], Tensor | None]:
    """Losses of the first two microbatches, of one, and of all; then those of a step."""
    pipeline = Pipeline(
        case.schedule, case.stage, loss_of, group=group_of_first(case.schedule.num_ranks), graph=case.graph
    )
    M, batch = case.schedule.num_microbatches, case.batch(0)
    rows = {name: part.shape[0] // M for name, part in batch.items()}
    found = [
        pipeline.evaluate(count, **{name: part[: count * rows[name]] for name, part in batch.items()})
        for count in (2, 1, M)
    ]
    assert all(p.grad is None for p in pipeline.stages.parameters())
    return found, pipeline.step(**batch)


def torch_said(rank: int, what: str) -> str:
    """The error of a pipeline that torch cannot run."""
    own = init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "pp"))["pp"].get_group()
    schedule = from_table([["(0F0;1F0)", "1B0", "0B0"] if what == "fused" else ["0F0", "1F0", "1B0", "0B0"]])
    graph = StageGraph.of((("input", "more"), "x"), ("x", "y")) if what == "graph" else None
    try:
        pipeline = TorchPipeline(schedule, lambda stage: Linear(), loss_of, group=own, graph=graph)
        x = torch.ones(2, WIDTH)
        pipeline.step(**({"target": x} if what == "rows" else {"input": x, "target": x}))
        x = torch.ones(4, WIDTH)
        pipeline.step(input=x, target=x)
    except MoeroutersError as error:
        return str(error)
    return ""


def changing(rank: int) -> tuple[str, str]:
    """What is said where a stage gives another form for the same batch, and in the step after that."""
    own = init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "pp"))["pp"].get_group()
    schedule = from_table([["0F0", "1F0", "1B0", "0B0"]])
    pipeline = Pipeline(schedule, lambda stage: Growing(), loss_of, group=own)
    errors = []
    for _ in range(3):
        try:
            pipeline.step(input=torch.ones(2, WIDTH), target=torch.ones(1))
        except PipelineError as error:
            errors.append(str(error))
    first, second = errors
    return first, second


class Growing(nn.Module):
    """A stage that gives more each time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(())), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([x] * self.calls) * self.weight


def run_script(rank: int, text: str) -> list[float]:
    """The history of a script for torchrun, whose process group is that of the pool."""
    names: dict[str, Any] = {}
    with (
        patch.object(dist, "init_process_group"),
        patch.object(dist, "destroy_process_group"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        exec(compile(text, "train.py", "exec"), names)
    history: list[float] = names["history"]
    return history


@cache
def group_of_first(size: int) -> Any:
    """A group of the first ranks of the pool, the same object each time."""
    return dist.new_group(list(range(size)))


def _forward(graph: StageGraph, stages: list[nn.Module], values: dict[str, Tensor]) -> Tensor:
    outputs: Any = ()
    for signature, module in zip(graph.stages, stages, strict=True):
        outputs = module(*(values[name] for name in signature.takes))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        values |= dict(zip(signature.gives, outputs, strict=True))
    return loss_of(*outputs, values["target"])


def _grads(stages: Mapping[int, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{stage}.{name}": parameter.grad
        for stage, module in stages.items()
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.grad is not None
    }
