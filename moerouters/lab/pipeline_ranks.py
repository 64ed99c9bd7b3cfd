"""A pipeline of a run: which ranks hold which stages of the model, beside replicas of tokens and of stages.

Ranks count tensor first, then stages, then data: rank = (data * P + stage) * T + tensor. So ranks that share the
experts of a stage are neighbours, which on a cluster is a node (PPMoE, arXiv:2304.11414).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from moerouters.errors import ConfigError
from moerouters.lab.expert_ranks import partition_group
from moerouters.pipeline import Schedule, build, check, read
from moerouters.pipeline.stages import runs


@dataclass(frozen=True, kw_only=True)
class PipelineRanks:
    """Where this rank stands."""

    schedule: Schedule
    tensor: int
    """T, the ranks that hold one stage of one pipeline."""
    pipeline: dist.ProcessGroup
    """The ranks of this rank's pipeline, by stage."""
    replicas: dist.ProcessGroup
    """Those with the same stage: all but their experts is alike."""
    data: dist.ProcessGroup
    """Those with the same stage and experts, and other tokens."""
    column: dist.ProcessGroup
    """All pipelines of this rank's place in its stage: together they have every layer and every token once."""

    @property
    def size(self) -> int:
        """P."""
        return self.schedule.num_ranks

    @property
    def label(self) -> str:
        """The schedule, and of what size."""
        return f"{self.schedule.name} over {self.size} ranks"

    def layers_here(self, num_layers: int) -> dict[int, range]:
        """The layers of every stage of this rank. Raises ConfigError where there are more stages than layers."""
        layers = runs(num_layers, self.schedule.num_stages)
        return {stage: layers[stage] for stage in self.schedule.stages_of(self.pipeline.rank())}

    def first_alike(self, rank: int) -> int:
        """The first of the ranks with the stage of `rank`."""
        return rank // self.tensor % self.size * self.tensor


def pipeline_ranks(schedule: Schedule, *, tensor: int = 1) -> PipelineRanks:
    """Form pipelines of ranks for a schedule out of all ranks; a collective.

    Raises ConfigError where the number of ranks is no multiple of P * T.
    """
    world, P = dist.get_world_size() if dist.is_initialized() else 1, schedule.num_ranks
    if world % (P * tensor):
        raise ConfigError(
            f"{world} rank{'s' if world > 1 else ''} cannot form pipelines of {P} x {tensor}.",
            where=f"--pipeline {P} --tensor {tensor}",
            why="each stage of a pipeline is on as many ranks as share its experts",
            fix=f"torchrun --nproc-per-node {P * tensor} -m moerouters compare --pipeline {P} --tensor {tensor} ...",
        )
    ranks_DPT = torch.arange(world).view(-1, P, tensor)
    return PipelineRanks(
        schedule=schedule,
        tensor=tensor,
        pipeline=partition_group(ranks_DPT.transpose(1, 2).reshape(-1, P).tolist()),
        replicas=partition_group(ranks_DPT.transpose(0, 1).reshape(P, -1).tolist()),
        data=partition_group(ranks_DPT.flatten(1).t().tolist()),
        column=partition_group(ranks_DPT.permute(2, 0, 1).reshape(tensor, -1).tolist()),
    )


def schedule_of(text: str, *, num_ranks: int, num_microbatches: int) -> Schedule:
    """The known schedule of that name, or the one in a CSV file. Raises ConfigError where sizes do not fit."""
    if Path(text).suffix != ".csv":
        return build(text, num_ranks, num_microbatches)
    schedule = read(Path(text))
    check(schedule)
    if (schedule.num_ranks, schedule.num_microbatches) != (num_ranks, num_microbatches):
        raise ConfigError(
            f"'{text}' is of {schedule.num_ranks} ranks and {schedule.num_microbatches} microbatches.",
            where="--schedule",
            why=f"the run has {num_ranks} and {num_microbatches}",
            fix=f"--pipeline {schedule.num_ranks} --set accumulation_steps={schedule.num_microbatches}",
        )
    return schedule
