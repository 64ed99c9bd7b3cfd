"""What ranks run for test_shards.py, and the cases, which every process makes for itself from a few numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters import Gating, MoELayer, RouteContext, attach
from moerouters_bip import BipConfig, BipRouter, solve_dual
from moerouters_bip.columns import LocalColumns
from moerouters_bip.histogram import HistogramColumns
from moerouters_bip.ranks import ALONE, Ranks
from moerouters_bip.shards import ShardedColumns


@dataclass(frozen=True)
class Case:
    """One dual solve over four shards."""

    tokens: tuple[int, ...] = (9, 4, 0, 12)
    """Per rank."""
    num_experts: int = 8
    top_k: int = 2
    scores: str = "softmax"
    """`softmax`; `normal`, of both signs; `ties`, five values; `equal`; `huge`, over 60 orders of magnitude."""
    padding: bool = False
    kept_groups: int = 4
    """Of 4; with fewer, tokens whose groups hold just K experts are left out."""
    variant: str = "centred"
    iterations: int = 1
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """scores_TE of all shards, q_E to start from, valid_T."""
        random = torch.Generator().manual_seed(self.seed)
        T, E = sum(self.tokens), self.num_experts
        noise_TE = torch.randn(T, E, generator=random, dtype=torch.float64) + torch.linspace(-2, 2, E)
        scores_TE = {
            "softmax": noise_TE.softmax(dim=-1),
            "normal": noise_TE,
            "ties": noise_TE.round().clamp(-2, 2) / 4,
            "equal": torch.full_like(noise_TE, 0.25),
            "huge": noise_TE * 10.0 ** torch.randint(-30, 30, (T, E), generator=random),
        }[self.scores]
        q_E = torch.randn(E, generator=random) / 8
        valid_T = torch.rand(T, generator=random) > 0.4 if self.padding else torch.ones(T, dtype=torch.bool)
        return scores_TE.to(self.dtype), q_E, valid_T

    def shard(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        scores_TE, q_E, valid_T = self.whole()
        return scores_TE.split(self.tokens)[rank], q_E, valid_T.split(self.tokens)[rank]

    def solve(self, part: tuple[Tensor, Tensor, Tensor], columns: object) -> Tensor:
        scores_TE, q_E, valid_T = part
        gating = Gating.softmax(self.num_experts, self.top_k, num_groups=4, kept_groups=self.kept_groups)
        return solve_dual(
            scores_TE,
            q_E,
            top_k=self.top_k,
            iterations=self.iterations,
            variant=self.variant,  # type: ignore[arg-type]
            valid_T=valid_T,
            limit=gating.limit if self.kept_groups < 4 else None,
            columns=columns,  # type: ignore[arg-type]
        )


def solved_by_ranks(rank: int, cases: list[Case]) -> list[tuple[Tensor, Tensor]]:
    """q from the exact and from the histogram columns over this rank's shard and all others."""
    ways = [partial(each, ranks=Ranks()) for each in (ShardedColumns, HistogramColumns)]
    return [tuple(case.solve(case.shard(rank), way) for way in ways) for case in cases]  # type: ignore[misc]


def solved_alone(case: Case) -> tuple[Tensor, Tensor]:
    """The same in one process that holds all tokens: by sorting, and by one histogram."""
    whole = case.whole()
    return case.solve(whole, LocalColumns), case.solve(whole, partial(HistogramColumns, ranks=ALONE))


def routed(rank: int, scope: str) -> dict[str, Tensor]:
    """Routes of a shard by a router that is compiled whole or not, in training and eval, in the world and in pairs."""
    case = Case(tokens=(40, 0, 17, 7), scores="normal")
    scores_TE, _, valid_T = case.shard(rank)
    gating = Gating.softmax(case.num_experts, case.top_k)
    config = BipConfig(scope=scope, iterations=1)  # type: ignore[arg-type]
    if rank == 0:  # building a layer is no collective: the other ranks do not build this one
        MoELayer(BipRouter(gating, config), hidden_size=3, expert_size=2)
    router = BipRouter(gating, config)
    ctx = RouteContext(valid_T=valid_T)
    first = router(scores_TE, ctx)
    torch._dynamo.reset()
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)(scores_TE, ctx)
    found = {"ids": first.expert_ids, "compiled": compiled.expert_ids}
    dist.barrier()
    if rank == 0:  # alone: neither eval nor forced ids ask anybody
        router(scores_TE, RouteContext(forced_ids_TK=first.expert_ids))
        router.eval()(scores_TE)
        router.train()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    router.token_group = pairs[rank // 2]
    return found | {"pair": router(scores_TE, ctx).expert_ids}


def trained(rank: int, scope: str) -> Tensor:
    """The committed q after two steps of two micro-batches."""
    sizes = (((5, 9, 0, 20), (3, 0, 0, 0)), ((8, 8, 8, 8), (0, 0, 0, 0)))
    return trained_on([[part_of(size, i, rank) for i, size in enumerate(step)] for step in sizes], scope)


def trained_alone(scope: str) -> Tensor:
    """The same from one process that holds every token."""
    sizes = (((5, 9, 0, 20), (3, 0, 0, 0)), ((8, 8, 8, 8), (0, 0, 0, 0)))
    parts = [[torch.cat([part_of(size, i, rank) for rank in range(4)]) for i, size in enumerate(s)] for s in sizes]
    return trained_on(parts, scope)


def part_of(tokens: tuple[int, ...], index: int, rank: int) -> Tensor:
    random = torch.Generator().manual_seed(10 * index + rank)
    return torch.randn(tokens[rank], 8, generator=random) + torch.linspace(-1, 1, 8).roll(rank)


def trained_on(steps: list[list[Tensor]], scope: str) -> Tensor:
    config = BipConfig(scope=scope, iterations=1)  # type: ignore[arg-type]
    layer = MoELayer(BipRouter(Gating.softmax(8, 2), config), hidden_size=8, expert_size=2)
    with torch.no_grad():
        layer.gate.weight.copy_(torch.eye(8))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    attach(optimizer, layer)
    for parts in steps:
        for x_TD in parts:
            layer(x_TD).hidden.sum().backward()
        optimizer.step()
    return layer.router.get_buffer("dual_E")
