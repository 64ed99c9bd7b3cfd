"""TorchPipeline: a schedule of ours run by torch.distributed.pipelining instead of our own executor.

It makes PyTorch's stages and its `_PipelineScheduleRuntime` of a table, for who has hooks or profiles around those.
What torch cannot express is refused, and `Pipeline` runs it. That runtime is not public: this is tested on torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

from moerouters.errors import ConfigError, ScheduleError
from moerouters.pipeline.backward import WeightHalf, input_half
from moerouters.pipeline.check import check
from moerouters.pipeline.graph import INPUT, StageGraph
from moerouters.pipeline.schedule import Fused, Schedule
from moerouters.pipeline.site import Site
from moerouters.pipeline.stages import Shared, SharedWeights, Stages, stages_here
from moerouters.pipeline.transport import Form, Transport


class TorchPipeline:
    """As `Pipeline`, for a chain of stages with the batch's `input`, and a loss that takes its `target`.

    Building one is collective. Raises ScheduleError for a schedule that cannot run, or that torch cannot express: a
    fused item in which a task needs another, or a graph that is no chain.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Stages,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        group: dist.ProcessGroup,
        graph: StageGraph | None = None,
        shared: Shared | None = None,
    ) -> None:
        check(schedule)
        if graph is not None and graph != StageGraph.chain(schedule.num_stages):
            raise _inexpressible(schedule, "its stages pass values only to the next one", "the graph is no chain")
        M = self._num_microbatches = schedule.num_microbatches
        self.schedule, self._group, self._form = schedule, group, ""
        self.stages = stages_here(stages, schedule, group.rank())
        first = next(self.stages.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        self._last = str(schedule.num_stages - 1) in self.stages
        S, device = schedule.num_stages, self._device
        made = [_Stage(stage, int(number), S, device, group=group) for number, stage in self.stages.items()]
        # Divided here and not by the runtime, which would divide what earlier steps left in .grad too.
        self._runtime = _PipelineScheduleRuntime(  # type: ignore[no-untyped-call]
            made, M, loss_fn=lambda output, target: loss(output, target) / M, scale_grads=False
        )
        try:
            self._runtime._prepare_schedule_with_comms(_actions(schedule))
        except (AssertionError, ValueError, RuntimeError) as error:
            raise _inexpressible(schedule, "it makes sends and receives of the table", str(error)) from error
        site, transport = Site(group, schedule.name), Transport(group)
        self._shared = SharedWeights(shared or {}, self.stages, schedule, site, transport)

    def step(self, **batch: Tensor) -> Tensor | None:
        """As `Pipeline.step`. The form of a batch is that of the first one."""
        names = ([INPUT] if "0" in self.stages else []) + (["target"] if self._last else [])
        for name in names:
            if name not in batch or batch[name].shape[0] % self._num_microbatches:
                raise ConfigError(
                    f"the batch has no '{name}' that can be cut." if name in batch else f"the batch has no '{name}'.",
                    why=f"the schedule has {self._num_microbatches} microbatches, which are of one size",
                    fix=f"step({name}=...) with a multiple of that",
                )
        form = "; ".join(str(Form.of(batch[name])) for name in names)
        if self._form not in ("", form):
            raise ConfigError(
                f"the batch is {form}.",
                why=f"it was {self._form}, and torch's stages make room for one form",
                fix="pad it, or run the schedule by Pipeline",
            )
        self._form = form
        losses: list[Tensor] = []
        inputs = [batch[INPUT]] if "0" in self.stages else []
        self._shared.begin()
        self._runtime.step(*inputs, target=batch["target"] if self._last else None, losses=losses, return_outputs=False)
        self._shared.end()
        return torch.stack(losses).detach() * self._num_microbatches if self._last else None


class _Stage(PipelineStage):
    """With our halves of a backward, which run each matrix product once and reach leaves that are no parameters."""

    def _forward_metadata_inference(self, *args: Any, **kwargs: Any) -> Any:
        """Torch looks at forms by a pass before the first step: in eval mode MoE layers do not count its tokens."""
        modes = {module: module.training for module in self.submod.modules()}
        self.submod.eval()
        try:
            return super()._forward_metadata_inference(*args, **kwargs)
        finally:
            for module, training in modes.items():
                module.training = training

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], Any]:
        if backward_type == "input":
            outputs, inputs = bwd_kwargs["stage_output"], bwd_kwargs["input_values"]
            half = input_half(outputs, bwd_kwargs["output_grads"] or [None] * len(outputs), inputs)
            grads = tuple(tensor.grad for tensor in inputs)
            for tensor in inputs:
                tensor.grad = None
            return grads, half
        if backward_type == "weight":
            half = bwd_kwargs["param_groups"]
            assert isinstance(half, WeightHalf)
            half.run()
            return (), None
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)


def _actions(schedule: Schedule) -> dict[int, list[Any]]:
    texts = [
        [f"{item}OVERLAP_F_B" if isinstance(item, Fused) else str(item) for item in items] for items in schedule.ranks
    ]
    return {rank: [_Action.from_str(text) for text in row] for rank, row in enumerate(texts)}


def _inexpressible(schedule: Schedule, rule: str, found: str) -> ScheduleError:
    return ScheduleError(
        "torch.distributed.pipelining cannot express this.",
        where=f"schedule '{schedule.name}'",
        why=f"{rule}; {found.strip()}",
        fix="run it by moerouters.pipeline.Pipeline",
    )
