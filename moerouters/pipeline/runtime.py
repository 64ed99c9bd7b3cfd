"""Pipeline: train a model that is cut into stages, on the ranks of a process group, by any schedule.

Every rank runs the same script (torchrun) and its own program; there is no controller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters.errors import ConfigError, PipelineError, ScheduleError
from moerouters.pipeline.execution import Execution, Model, named
from moerouters.pipeline.graph import StageGraph
from moerouters.pipeline.lowering import lower
from moerouters.pipeline.program import Buffer, Held, Program
from moerouters.pipeline.schedule import Schedule, Task
from moerouters.pipeline.site import Site
from moerouters.pipeline.stages import Shared, SharedWeights, Stages, stages_here
from moerouters.pipeline.transport import Form, Transport


class Pipeline:
    """The stages of a model on this rank, and a way to run forward and backward over all ranks.

    stages: all stages, or a function that builds stage s; this rank keeps its own, in `stages`, for the optimizer.
    loss: from what the last stage gives, and the parts of the batch in `loss_takes`, to a 0-d tensor. group: as many
    ranks as the schedule has; default: the whole world. graph: which stage takes what; default: a chain. shared:
    weights with copies in several stages (a tied embedding), by any name: (stage, name of the parameter) of each copy.
    transport: how ranks send; default: torch.distributed. on_task: called on this rank with every task that is done.

    Building one is collective. Raises ScheduleError for a schedule that cannot run, or where ranks have different ones.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Stages,
        loss: Callable[..., Tensor],
        *,
        group: dist.ProcessGroup | None = None,
        graph: StageGraph | None = None,
        loss_takes: str | Sequence[str] = ("target",),
        shared: Shared | None = None,
        transport: Transport | None = None,
        on_task: Callable[[Task], None] | None = None,
    ) -> None:
        group = _default_group() if group is None else group
        lowered = lower(schedule, graph)
        if group.size() != schedule.num_ranks:
            raise ConfigError(
                f"the schedule '{schedule.name}' is for {schedule.num_ranks} ranks.",
                why=f"the group has {group.size()}",
                fix="build the schedule for as many ranks as there are, or pass the group of one pipeline",
            )
        self.schedule = schedule
        self.stages = stages_here(stages, schedule, group.rank())
        self.held = Held(activations=0, buffers=0)
        """The most that this rank held at once in the last step or evaluation."""
        self._program = lowered.programs[group.rank()]
        first = next(self.stages.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        takes = (loss_takes,) if isinstance(loss_takes, str) else tuple(loss_takes)
        self._model = Model(graph=lowered.graph, stages=self.stages, loss=loss, loss_takes=takes, device=device)
        self._group, self._site = group, Site(group, schedule.name)
        self._transport, self._on_task = Transport(group) if transport is None else transport, on_task
        self._forms: dict[tuple[int, ...], dict[Buffer, Form]] = {}
        """By what all ranks say of a step: the form of each value that this rank gives or gets."""
        self._failed = ""
        plans = self._gathered(_digest((schedule, lowered.graph, sorted((shared or {}).items()))))
        if len(set(plans)) > 1:
            raise ScheduleError(
                "ranks do not run the same schedule.",
                where=str(self._site),
                why=f"ranks {[r for r, plan in enumerate(plans) if plan != plans[0]]} differ from rank 0",
                fix="build schedule, graph and shared weights from the same settings on every rank",
            )
        self._shared = SharedWeights(shared or {}, self.stages, schedule, self._site, self._transport)

    def step(self, **batch: Tensor) -> Tensor | None:
        """Forward and backward on all microbatches. Returns their losses [M] on the rank of the last stage, else None.

        batch: by name, what this rank's stages take of it and, on the rank of the last stage, what the loss takes;
        other parts are ignored. Each is cut along dimension 0 into M equal microbatches. Gradients, of the mean of the
        losses over microbatches, are added to `.grad`. Raises PipelineError, naming rank and task, if another rank
        dies, hangs or raises; what a stage raises here is raised as it is, with a note. After either the pipeline
        cannot be used again.
        """
        return self._run(self._program, self.schedule.num_microbatches, batch)

    @torch.no_grad()
    def evaluate(self, num_microbatches: int, /, **batch: Tensor) -> Tensor | None:
        """The losses that `step` would return, of at most as many microbatches as the schedule has, without gradients.

        The stages stay in the mode they are in: `stages.eval()` first. A batch may have other forms than those of a
        step. Raises ConfigError for another number of microbatches, else as `step`.
        """
        if not 1 <= num_microbatches <= self.schedule.num_microbatches:
            raise ConfigError(
                f"{num_microbatches} microbatches cannot be evaluated at once.",
                where=str(self._site),
                why=f"the schedule has {self.schedule.num_microbatches}",
                fix="take fewer, several times",
            )
        return self._run(self._program.forwards(num_microbatches), num_microbatches, batch)

    def _run(self, program: Program, num_microbatches: int, batch: Mapping[str, Tensor]) -> Tensor | None:
        if self._failed:
            raise PipelineError(
                f"{self._site} stopped in an earlier step.",
                where=self._failed,
                why="messages of that step may still be under way",
                fix="start the job again, from a checkpoint",
            )
        parts = self._cut(batch, num_microbatches)
        self._failed = "the start of a step"
        trains = torch.is_grad_enabled()
        execution = Execution(
            program,
            self._model,
            parts,
            num_microbatches=num_microbatches,
            forms=self._forms.setdefault(self._gathered(_digest((trains, self._step_signature(parts)))), {}),
            transport=self._transport,
            site=self._site,
            on_task=self._on_task,
        )
        try:
            if trains:
                self._shared.begin()
            execution.run()
            if trains:
                self._shared.end()
        except PipelineError as error:
            self._failed = str(error).partition("\n")[0]
            raise
        except Exception as error:
            self._failed = "the start" if execution.task is None else named(execution.task)
            error.add_note(f"{self._site} in {self._failed}")
            self._site.tell(self._failed)
            raise
        self._failed = ""
        self.held = execution.held
        if not execution.losses:
            return None
        return torch.stack([execution.losses[m] for m in range(num_microbatches)])

    def _cut(self, batch: Mapping[str, Tensor], M: int) -> dict[str, tuple[Tensor, ...]]:
        graph = self._model.graph
        here = [int(stage) for stage in self.stages]
        names = [name for stage in here for name in graph.batch_names(stage)]
        if len(graph.stages) - 1 in here:
            names += self._model.loss_takes
        parts = {}
        for name in dict.fromkeys(names):
            if name not in batch:
                raise ConfigError(
                    f"the batch has no '{name}'.",
                    where=str(self._site),
                    why=f"stages {', '.join(map(str, here))} or the loss take it; there is: {', '.join(batch)}",
                    fix=f"step({name}=...)",
                )
            if batch[name].shape[0] % M:
                raise ConfigError(
                    f"'{name}' has {batch[name].shape[0]} rows.",
                    where=str(self._site),
                    why=f"there are {M} microbatches, which are of one size",
                    fix=f"take a multiple of {M}",
                )
            parts[name] = batch[name].tensor_split(M)
        return parts

    def _step_signature(self, parts: Mapping[str, tuple[Tensor, ...]]) -> object:
        """What the form of values may depend on, as far as this rank knows."""
        kind = self._model.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        trained = [parameter.requires_grad for parameter in self.stages.parameters()]
        forms = [(name, len(chunks), str(Form.of(chunks[0]))) for name, chunks in sorted(parts.items())]
        return forms, autocast, trained, self.stages.training

    def _gathered(self, digest: int) -> tuple[int, ...]:
        """The number of every rank."""
        own = torch.tensor([digest], dtype=torch.int64, device=self._model.device)
        found = [torch.empty_like(own) for _ in range(self._group.size())]
        try:
            dist.all_gather(found, own, group=self._group)
        except RuntimeError as error:
            raise self._site.failed("the start of a step", error) from error
        return tuple(torch.cat(found).tolist())


def _default_group() -> dist.ProcessGroup:
    if not dist.is_initialized() or dist.group.WORLD is None:
        raise ConfigError(
            "there is no process group.",
            why="a pipeline runs on several ranks",
            fix="init_process_group first (torchrun)",
        )
    return dist.group.WORLD


def _digest(of: object) -> int:
    """63 bits of the text of a value, the same on every rank."""
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:8], "big") >> 1
