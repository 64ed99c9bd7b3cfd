"""One MoE model over the ranks of a torchrun job: data x expert layouts and dispatch back-ends, measured in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import fmean

import torch
import torch.distributed as dist

from moerouters.bench.timing import median_of, ratio_of, take_rounds
from moerouters.errors import ConfigError
from moerouters.lab.corpus import Corpus
from moerouters.lab.determinism import deterministic
from moerouters.lab.expert_ranks import expert_ranks
from moerouters.lab.ranks import Ranks
from moerouters.lab.train import Trainer
from moerouters.layer import MoELayer
from moerouters.study.anatomy import dissected
from moerouters.study.contender import Contender
from moerouters.study.results import MeshRow
from moerouters.study.timing import steps_of

_DISPATCHERS = ("all_to_all", "all_gather", "tensor_sliced")


@dataclass(frozen=True)
class Layout:
    """How the ranks of a job share a model."""

    expert: int
    """Ranks of a group, which together hold all experts."""
    dispatcher: str
    cut: int = 1
    """Ranks that cut each expert; they are part of the group."""


def layouts(world: int, num_experts: int) -> Iterator[Layout]:
    """Every rank with all experts first; then groups of each size that divides ranks and experts, by each back-end."""
    yield Layout(1, "local")
    for size in (n for n in range(2, world + 1) if world % n == 0 and num_experts % n == 0):
        yield from (Layout(size, dispatcher) for dispatcher in _DISPATCHERS)
        if size % 2 == 0:
            yield Layout(size, "mesh3d", cut=2)


def measure_mesh(
    contender: Contender, *, seed: int, corpus: Corpus, device: torch.device, ranks: Ranks, rounds: int
) -> list[MeshRow]:
    """A row per layout; a collective, with the same answer on all ranks. Raises ConfigError on a single rank."""
    if ranks.size == 1:
        raise ConfigError(
            "one rank has no mesh.",
            where="--mesh",
            why="it compares how ranks can share a model",
            fix="torchrun --nproc-per-node 4 -m moerouters study --mesh ...",
        )
    settings = contender.settings
    ranks.require_divides(settings.micro_batch_size)
    trainers: dict[Layout, Trainer] = {}
    with deterministic():
        for layout in layouts(ranks.size, settings.num_experts):
            placed = _placed(ranks, layout, settings.num_experts, device)
            trainers[layout] = contender.trainer(seed=seed, corpus=corpus, device=device, ranks=placed)
        names = {str(layout): layout for layout in trainers}
        idle: dict[Layout, list[float]] = {layout: [] for layout in trainers}
        runs = {name: _watched(trainers[layout], layout, idle[layout], rounds) for name, layout in names.items()}
        taken = take_rounds(runs, wait=dist.barrier, rounds=rounds, agree=_slowest)
        anatomies = {layout: dissected(trainer) for layout, trainer in trainers.items()}
    first = next(iter(taken.values()))
    rows = []
    for name, seconds in taken.items():
        layout, ms = names[name], median_of([1e3 * each for each in seconds])
        anatomy, why = anatomies[layout]
        rows.append(
            MeshRow(
                model=contender.spec.name,
                data=ranks.size // layout.expert,
                expert=layout.expert // layout.cut,
                cut=layout.cut,
                dispatcher=layout.dispatcher,
                ms=ms,
                over_first=ratio_of(seconds, first),
                tokens_per_s=1e3 * settings.batch_tokens / ms.value,
                idle=fmean(idle[layout]),
                anatomy=anatomy,
                anatomy_failed=why,
            )
        )
    return rows


def _placed(ranks: Ranks, layout: Layout, num_experts: int, device: torch.device) -> Ranks:
    if layout.expert == 1:
        return ranks
    experts = expert_ranks(
        layout.expert, layout.dispatcher, num_experts=num_experts, model_parallel=layout.cut, device=device.type
    )
    return replace(ranks, experts=experts)


def _watched(trainer: Trainer, layout: Layout, idle: list[float], most: int) -> Callable[[], object]:
    """Its steps, and how idle the first of them were: the same batches in every layout."""
    run = steps_of(trainer)

    def step() -> None:
        run()
        if len(idle) < most:
            idle.append(_idle(trainer, layout.expert // layout.cut))

    return step


def _idle(trainer: Trainer, owners: int) -> float:
    """Of the last step, by the loads of all groups together; experts lie in blocks."""
    assert trainer.handle is not None
    layers = [name for name, layer in trainer.handle.layers.items() if isinstance(layer, MoELayer)]
    loads_LR = torch.stack([trainer.handle.loads[name].double().view(owners, -1).sum(dim=1) for name in layers])
    return float((1 - loads_LR.mean(dim=1) / loads_LR.amax(dim=1).clamp_min(1)).mean())


def _slowest(seconds: float) -> float:
    told = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return float(told)
