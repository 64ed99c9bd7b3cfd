"""One expert-parallel step on several ranks against a loop over pairs in one process, in float64 or bfloat16.

A `Case` is small and picklable; each rank makes its own part of it. `step` runs on every rank of the pool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moerouters import (
    AssignmentKind,
    Capabilities,
    Gating,
    MoELayer,
    RouteContext,
    Router,
    Selection,
    limit_capacity,
    shard_experts,
)
from moerouters.builtin import TopKRouter

LIMITS = {
    torch.float64: 1e-10,
    # Up to 16 roundings of 2**-9 between an input and a gradient: three matrix products and their activation, forward
    # and backward, the sums over K, ranks and passes. Measured in 1092 cases: at most 0.018.
    torch.bfloat16: 16 * 2**-9,
}
"""How far a result may be apart from x, relative to 1 + |x|; in bfloat16 to the largest |x| of its tensor."""


@dataclass(frozen=True)
class Case:
    """One step of a layer. Ranks of the pool form groups of `group_size` neighbours, each a world of its own."""

    dispatcher: str
    tokens: tuple[int, ...]
    """Per rank of a group; for a replicated back-end, and along the last dimension of mesh3d, all alike."""
    num_experts: int = 8
    top_k: int = 2
    load: str = "even"
    """`even`: random ids; `one_expert`: all first choices at expert 0; `half`: the upper half of experts gets none;
    `holes`: every third place is empty."""
    kind: str = "slots"
    """`slots`: as `load` says; `pairs`, `dense`: as the router below says, whatever `load` and `top_k` are."""
    padding: bool = False
    """The last token of each rank is padding and holds NaN. Not with `shared`: a shared expert sees every token."""
    capacity_factor: float | None = None
    shared: bool = False
    chunks: int = 1
    dtype: torch.dtype = field(default=torch.float64)
    backwards: int = 1
    """Passes backward through the same graph; gradients add up."""
    seed: int = 0
    mesh: tuple[int, ...] = ()
    """Dimensions of the group: (nodes, ranks of a node) for hierarchical, (data, expert, model) for mesh3d."""
    width: int = 6
    """D."""

    @property
    def group_size(self) -> int:
        return len(self.tokens)

    @property
    def replicated(self) -> bool:
        return self.dispatcher == "tensor_sliced"

    def source(self, member: int) -> int:
        """Whose tokens a member of the group holds."""
        return 0 if self.replicated else member - member % self.slices

    @property
    def slices(self) -> int:
        """Ranks that hold the same tokens, and a slice of each expert."""
        return self.mesh[2] if len(self.mesh) == 3 else 1

    @property
    def expert_width(self) -> int:
        return EXPERT_WIDTH + 1 if len(self.mesh) == 3 else EXPERT_WIDTH  # to be cut in two

    def experts_of(self, member: int) -> slice:
        """Those whose gradients `step` gives on that member."""
        if len(self.mesh) == 3:
            return slice(None)  # of DTensors, which are gathered
        E = self.num_experts
        return slice(member * E // self.group_size, (member + 1) * E // self.group_size)


EXPERT_WIDTH = 5


class Threshold(Router):
    """Every expert that scores above the mean; T * E pairs in order of expert, of which many are empty."""

    capabilities = Capabilities(assignment=AssignmentKind.PAIRS)

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        T, E = adjusted_TE.shape
        tokens_ET = torch.arange(T).expand(E, T)
        experts_ET = torch.where(adjusted_TE.t() > 1 / E, torch.arange(E).unsqueeze(1), E)
        return Selection.pairs(tokens_ET.reshape(-1), experts_ET.reshape(-1))


class Everything(Router):
    """Every expert for every token."""

    capabilities = Capabilities(assignment=AssignmentKind.DENSE)

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        T, E = adjusted_TE.shape
        return Selection.dense(num_tokens=T, num_experts=E, device=adjusted_TE.device)


ROUTERS: dict[str, type[Router]] = {"slots": TopKRouter, "pairs": Threshold, "dense": Everything}


def forced_ids(case: Case, member: int) -> Tensor:
    """int64 [T, K] of one member of the group."""
    random = torch.Generator().manual_seed(1000 * case.seed + member)
    T, E, K = case.tokens[member], case.num_experts, case.top_k
    candidates = E // 2 if case.load == "half" else E
    ids_TK = torch.rand(T, candidates, generator=random).topk(K, dim=-1).indices
    if case.load == "one_expert":
        ids_TK = torch.where(ids_TK == 0, ids_TK[:, :1], ids_TK)
        ids_TK[:, 0] = 0
    if case.load == "holes":
        ids_TK = ids_TK.reshape(-1).index_fill(0, torch.arange(0, T * K, 3), E).reshape(T, K)
    return ids_TK.where(valid(case, member).unsqueeze(1), E)


def valid(case: Case, member: int) -> Tensor:
    """bool [T]"""
    valid_T = torch.ones(case.tokens[member], dtype=torch.bool)
    if case.padding:
        valid_T[-1:] = False
    return valid_T


def hidden(case: Case, member: int) -> Tensor:
    random = torch.Generator().manual_seed(77 * case.seed + member)
    x_TD = torch.randn(case.tokens[member], case.width, generator=random, dtype=torch.float64)
    return x_TD.to(case.dtype).requires_grad_()


def pull(case: Case, member: int) -> Tensor:
    """What the output is multiplied with to give the loss: it makes every element's gradient different."""
    random = torch.Generator().manual_seed(99 * case.seed + member)
    return torch.randn(case.tokens[member], case.width, generator=random, dtype=torch.float64)


def layer_of(case: Case) -> MoELayer:
    """The same weights in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        layer = MoELayer(
            ROUTERS[case.kind](Gating.softmax(case.num_experts, case.top_k)),
            hidden_size=case.width,
            expert_size=case.expert_width,
            shared_size=4 if case.shared else 0,
            capacity_factor=case.capacity_factor,
        )
    return layer.to(case.dtype)


@cache
def group_of(size: int) -> dist.ProcessGroup:
    """The group of `size` neighbours that this rank is in. Every rank of the pool calls it."""
    mine: Any = None
    for first in range(0, dist.get_world_size(), size):
        ranks = list(range(first, min(first + size, dist.get_world_size())))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    assert isinstance(mine, dist.ProcessGroup)
    return mine


@cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """All ranks of the pool in these dimensions, of one, two or four ranks each. Over few groups, which are shared:
    threads of a gloo group wake a hundred times a second."""
    groups, names = [], ("data", "expert", "model")[: len(shape)]
    for index, size in enumerate(shape):
        neighbours = math.prod(shape[index + 1 :]) == 1
        groups.append(group_of(size) if neighbours or size != 2 else across())
    return DeviceMesh.from_group(groups, "cpu", torch.arange(math.prod(shape)).view(shape), mesh_dim_names=names)


@cache
def across() -> dist.ProcessGroup:
    """The group of two ranks that are two apart. Every rank of the pool calls it."""
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    mine = groups[dist.get_rank() % 2]
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def step(rank: int, case: Case) -> dict[str, Tensor]:
    """Outputs and gradients of this rank: x, gate summed over the group, this rank's experts."""
    group = group_of(case.group_size)
    member = case.source(group.rank())
    ranks = mesh_of(case.mesh) if case.mesh else group
    layer = shard_experts(layer_of(case), ranks, dispatcher=case.dispatcher, chunks=case.chunks)
    valid_T = valid(case, member)
    x_TD = hidden(case, member).detach().masked_fill(~valid_T.unsqueeze(1), torch.nan).requires_grad_()
    forced_ids_TK = forced_ids(case, member) if case.kind == "slots" else None
    ctx = RouteContext(forced_ids_TK=forced_ids_TK, valid_T=valid_T if case.padding else None)
    y_TD = layer(x_TD, ctx).hidden
    differentiate((y_TD.double() * pull(case, member)).sum(), case)
    return found(layer, x_TD, y_TD, group if case.slices == 1 else across())


def steps(rank: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    """`step` of each case, in one job of the pool."""
    return [step(rank, case) for case in cases]


def differentiate(loss: Tensor, case: Case) -> None:
    for left in reversed(range(case.backwards)):
        loss.backward(retain_graph=left > 0)  # type: ignore[no-untyped-call]


def found(layer: MoELayer, x_TD: Tensor, y_TD: Tensor, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """group: the ranks with distinct tokens, unless all have the same."""
    result = {"y": y_TD.detach(), "x.grad": _grad(x_TD)}
    for name, parameter in layer.named_parameters():
        gradient = _grad(parameter)
        if isinstance(gradient, DTensor):  # of mesh3d: one process has no dimension for the halves of up
            dist.all_reduce(gradient.to_local(), group=layer.dispatcher.site.mesh.get_group(0))
            gradient = gradient.full_tensor()
            gradient = gradient.flatten(1, 2) if gradient.dim() == 4 else gradient
        elif not name.startswith("experts.") and not layer.dispatcher.replicated:
            dist.all_reduce(gradient, group=group)
        result[f"{name}.grad"] = gradient
    return result


def oracle(case: Case) -> list[dict[str, Tensor]]:
    """What `step` should give on each member: token by token, pair by pair, plain autograd, in one process.

    Always in float64, from the values of x and the weights that the case's dtype can hold.
    """
    layer = layer_of(case).double()
    xs = {m: hidden(case, m).detach().double().requires_grad_() for m in map(case.source, range(case.group_size))}
    ys, loss = {}, torch.zeros((), dtype=torch.float64)
    for member, x_TD in xs.items():
        if case.kind == "slots":
            weights_TK, ids_TK = routed(layer, x_TD, forced_ids(case, member))
        else:
            weights_TK, ids_TK = routed_freely(layer, x_TD, valid(case, member))
        ys[member] = by_loop(layer, x_TD, weights_TK, ids_TK)
        loss = loss + (ys[member] * pull(case, member)).sum()
    differentiate(loss, case)
    results = []
    for member in range(case.group_size):
        part, source = case.experts_of(member), case.source(member)
        result = {"y": ys[source].detach(), "x.grad": _grad(xs[source])}
        for name, parameter in layer.named_parameters():
            gradient = _grad(parameter)
            result[f"{name}.grad"] = gradient[part] if name.startswith("experts.") else gradient
        results.append(result)
    return results


def routed(layer: MoELayer, x_TD: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids of the chosen, after capacity in order of choice, then of token."""
    gating = layer.router.gating
    E = gating.num_experts
    weights_TK = gating.weigh(gating.score(x_TD @ layer.gate.weight.t()), ids_TK)
    ids_TK = ids_TK.clone()
    capacity = layer._capacity(len(x_TD))
    if capacity is not None:
        room = [capacity] * E
        for slot in range(ids_TK.shape[1]):
            for token in range(len(x_TD)):
                expert = int(ids_TK[token, slot])
                if expert < E and room[expert] == 0:
                    ids_TK[token, slot] = E
                elif expert < E:
                    room[expert] -= 1
    return weights_TK.masked_fill(ids_TK == E, 0), ids_TK


def routed_freely(layer: MoELayer, x_TD: Tensor, valid_T: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids of what the layer's own router chose, as slots."""
    assignment = layer.router(layer._logits(x_TD), RouteContext(valid_T=valid_T))
    capacity = layer._capacity(len(x_TD))
    if capacity is not None:
        assignment = limit_capacity(assignment, capacity)
    ids_TE, weights_TE = assignment.with_slots()
    return weights_TE, ids_TE


def by_loop(layer: MoELayer, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
    rows = []
    for token in range(len(x_TD)):
        y_D = 0 * x_TD[token]  # a token without experts is still part of the graph
        for weight, expert in zip(weights_TK[token], ids_TK[token].tolist(), strict=True):
            if expert < layer.router.gating.num_experts:
                experts = layer.experts
                y_D = y_D + weight * ffn(x_TD[token], experts.up_eFD[expert], experts.down_eDF[expert])
        if layer.shared is not None:
            y_D = y_D + ffn(x_TD[token], layer.shared.up_eFD[0], layer.shared.down_eDF[0])
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD


def ffn(x_D: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
    gate_F, up_F = (up_FD @ x_D).chunk(2)
    return down_DF @ (F.silu(gate_F) * up_F)


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.detach().clone()


def expect_parity(case: Case, results: list[dict[str, Tensor]], *, limit: float | None = None) -> None:
    """`results` of every rank of the pool; each group of them is one run of the case."""
    limit = LIMITS[case.dtype] if limit is None else limit
    expected = oracle(case)
    for rank, result in enumerate(results):
        if rank // case.group_size >= len(results) // case.group_size:
            continue  # ranks left over
        for name, want in expected[rank % case.group_size].items():
            have = result[name].double()
            assert have.shape == want.shape, f"rank {rank}, {name}: {tuple(have.shape)}, not {tuple(want.shape)}"
            # What rounds to a small number here may be the sum of large ones.
            size = want.abs().amax() if case.dtype is torch.bfloat16 and want.numel() else want.abs()
            apart = (have - want).abs()
            assert bool((apart <= limit * (1 + size)).all()), f"rank {rank}, {name}: {apart.max()} apart in {case}"
