"""What the ranks of test_padded.py do: a module that they can import."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moerouters import Assignment, AssignmentKind, RouteContext, attach, shard_experts
from moerouters.dispatch.base import Arrival, Dispatcher
from moerouters.dispatch.padded import PaddedDispatcher
from moerouters.dispatch.plan import make_plan
from moerouters.dispatch.run import through_experts
from moerouters.dispatch.site import Site
from moerouters.errors import MoeroutersError
from moerouters.kernels.counts import count_experts

from .parity import Case, forced_ids, found, group_of, hidden, layer_of, pull, step

E = 4


def steps(rank: int, cases: list[Case]) -> list[dict[str, Tensor]]:
    return [step(rank, case) for case in cases]


def messages(rank: int, cases: list[Case]) -> list[str]:
    """What each case raises, as text; nothing that a case raises may keep the next one from running."""
    return [_message(rank, case) for case in cases]


def _message(rank: int, case: Case) -> str:
    try:
        step(rank, case)
    except MoeroutersError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def train_one_step(rank: int, case: Case) -> tuple[int, int]:
    """Pairs dropped by this rank's assignment, and what the handle says after the step."""
    group = group_of(case.group_size)
    layer = shard_experts(layer_of(case), group, dispatcher=case.dispatcher)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = attach(optimizer, layer, token_group=group)
    out = layer(hidden(case, group.rank()), RouteContext(forced_ids_TK=forced_ids(case, group.rank())))
    out.hidden.sum().backward()
    optimizer.step()
    handle.remove()
    assert out.assignment.dropped is not None
    return int(out.assignment.dropped), int(handle.dropped[""])


def compiled(rank: int, case: Case) -> tuple[int, list[dict[str, Tensor]]]:
    """How many graphs a compiled layer had; its step, and that of the same layer as it is. The first group alone does
    it: compiling takes long."""
    group, results, graphs = group_of(case.group_size), [], 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    for compile_it in (True, False) if rank < case.group_size else ():
        layer = shard_experts(layer_of(case), group, dispatcher=case.dispatcher)
        call = torch.compile(layer, backend=count) if compile_it else layer
        x_TD = hidden(case, group.rank())
        y_TD = call(x_TD, RouteContext(forced_ids_TK=forced_ids(case, group.rank()))).hidden
        (y_TD * pull(case, group.rank())).sum().backward()
        results.append(found(layer, x_TD, y_TD, group))
        torch.compiler.reset()
    return graphs, results


def assignment_of(expert_ids: list[list[int]]) -> Assignment:
    """Slots with these ids; E for an empty one. Weights are random, 0 where nothing is."""
    ids_TK = torch.tensor(expert_ids, dtype=torch.int64).reshape(len(expert_ids), -1 if expert_ids else 2)
    random = torch.Generator().manual_seed(ids_TK.numel())
    weights_TK = torch.rand(ids_TK.shape, generator=random, dtype=torch.float64).masked_fill(ids_TK == E, 0)
    return Assignment(
        kind=AssignmentKind.SLOTS,
        num_tokens=len(ids_TK),
        num_experts=E,
        expert_ids=ids_TK,
        weights=weights_TK,
        load_E=count_experts(ids_TK.reshape(-1), E),
        tokens=torch.tensor(len(ids_TK)),
        nonfinite=torch.tensor(0),
    )


def scaled_by_expert(dispatcher: PaddedDispatcher, spoil: bool = False) -> Any:
    """Experts that multiply by their number plus one; with `spoil`, rows that carry no token give NaN."""
    first = dispatcher.site.experts_here(E).start

    def experts(x_RD: Tensor, load_e: Tensor) -> Tensor:
        experts_R = torch.repeat_interleave(torch.arange(first, first + len(load_e)), load_e)
        y_RD = x_RD * (experts_R + 1).unsqueeze(1)
        return torch.where((x_RD == 0).all(dim=1, keepdim=True), torch.nan, y_RD) if spoil else y_RD

    return experts


def uneven_ranks_of_one_capacity(rank: int, ids_of_member: list[list[list[int]]], capacity: int) -> dict[str, Any]:
    """Straight through the dispatcher. Gives the result, what a loop over pairs gives, and the gradients of both."""
    group = group_of(len(ids_of_member))
    dispatcher = PaddedDispatcher(Site(group, layer="block.0", backend="padded"))
    assignment = assignment_of(ids_of_member[group.rank()])
    random = torch.Generator().manual_seed(group.rank())
    x_TD = torch.randn(assignment.num_tokens, 3, generator=random, dtype=torch.float64).requires_grad_()
    weights_TK = assignment.weights.clone().requires_grad_()
    scale_TK = torch.where(assignment.expert_ids == E, 0, assignment.expert_ids + 1)
    expected_TD = x_TD * (weights_TK * scale_TK).sum(dim=1, keepdim=True)

    arrival = dispatcher.dispatch(x_TD, make_plan(assignment, capacity=capacity)).wait()
    y_RD = scaled_by_expert(dispatcher, spoil=True)(arrival.x_RD, arrival.load_e)
    y_TD = dispatcher.combine(y_RD, arrival, weights_TK).wait()
    grads = torch.autograd.grad(y_TD.square().sum(), [x_TD, weights_TK], retain_graph=True)
    rows = arrival.x_RD.detach()
    return {
        "rows": (tuple(rows.shape), int((rows == 0).all(dim=1).sum()), arrival.load_e.tolist()),
        "have": [y_TD.detach(), *grads],
        "want": [expected_TD.detach(), *torch.autograd.grad(expected_TD.square().sum(), [x_TD, weights_TK])],
    }


def too_many_rows(rank: int) -> str:
    """Every rank hands in a plan whose capacity is not that of its assignment."""
    dispatcher = PaddedDispatcher(Site(group_of(2), layer="block.0", backend="padded"))
    assignment = assignment_of([[0, 1], [0, 2], [0, 3]])
    try:
        through_experts(
            dispatcher,
            torch.ones(3, 3, dtype=torch.float64),
            assignment,
            scaled_by_expert(dispatcher),
            capacity=2,
        )
    except MoeroutersError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class GroupOfTwo:
    """What a Site asks of a process group."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


def step_without_data(dispatcher: Dispatcher) -> Arrival:
    """Forward and backward of six tokens at a capacity of 3, on a device that keeps shapes only."""
    with torch.device("meta"):
        x_TD, weights_TK = torch.empty(6, 3, requires_grad=True), torch.empty(6, 2, requires_grad=True)
        ids_TK = torch.empty(6, 2, dtype=torch.int64)
        assignment = Assignment(
            kind=AssignmentKind.SLOTS,
            num_tokens=6,
            num_experts=E,
            expert_ids=ids_TK,
            weights=weights_TK,
            load_E=count_experts(ids_TK.reshape(-1), E),
            tokens=torch.tensor(6),
            nonfinite=torch.tensor(0),
        )
        arrival = dispatcher.dispatch(x_TD, make_plan(assignment, capacity=3)).wait()
        dispatcher.combine(arrival.x_RD * 2, arrival, weights_TK).wait().sum().backward()
    assert x_TD.grad is not None and weights_TK.grad is not None
    return arrival
