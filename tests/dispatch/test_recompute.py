"""Activation checkpointing of routers that talk to other ranks: a recomputation takes the first pass's ids."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moerouters import (
    AssignmentKind,
    Capabilities,
    Gating,
    MoELayer,
    RouteContext,
    Router,
    Routing,
    Selection,
    attach,
    record,
)
from moerouters.errors import RecomputeError, UnsupportedError
from moerouters.noise import digest
from moerouters_conformance.pool import rank_pool

from .recompute_jobs import NUM_EXPERTS, WIDTH, Net, Setup, checkpointed, gradient_of, run_steps

EMPTY = ((0, 8, 0, 5), (6, 0, 0, 0))
WAYS = ("reentrant", "nonreentrant", "nested")
PLAIN = [
    Setup(backwards="last"),
    Setup(tokens=EMPTY, dispatcher="all_to_all"),
    Setup(tokens=EMPTY, backwards="first", scope="histogram"),
]


def expect_as_without(plain: list[dict[str, Any]], again: list[dict[str, Any]], *, what: object) -> None:
    """All ranks, bit for bit; and no balancing inside backward."""
    for rank, (one, other) in enumerate(zip(plain, again, strict=True)):
        for part in ("gradients", "loads", "duals"):
            for name, value in one[part].items():
                assert torch.equal(value, other[part][name]), f"{what}: {part} of {name} on rank {rank}"
        assert other["forward"] == one["forward"], what
        assert "all_reduce" not in other["backward"], what
        assert other["remembered"] == [0, 0], what


@pytest.mark.dist
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_changes_no_bit_and_balances_nothing_twice(way: str) -> None:
    """Uneven and empty ranks; micro-batches whose backwards run in either order; a layer that is used twice."""
    setups = [replace(setup, uses=2 if way == "nonreentrant" else 1) for setup in PLAIN]
    plain = rank_pool().run(run_steps, setups)
    again = rank_pool().run(run_steps, [replace(setup, checkpointing=way) for setup in setups])
    for i, setup in enumerate(setups):
        expect_as_without([rank[i] for rank in plain], [rank[i] for rank in again], what=(way, setup))
        if setup.dispatcher is None:
            assert all(rank[i]["forward"] and not rank[i]["backward"] for rank in again), setup


@pytest.mark.slow
@pytest.mark.dist
def test_a_retained_graph_is_recomputed_again_and_a_compiled_block_too() -> None:
    same = ((5, 3, 9, 7), (5, 3, 9, 7))  # the compiler takes seconds for each new size
    setups = [
        Setup(backwards="twice"),
        Setup(backwards="twice", checkpointing="nonreentrant"),
        Setup(backwards="last", tokens=same, scope="histogram"),
        Setup(backwards="last", tokens=same, scope="histogram", checkpointing="nonreentrant", compiled=True),
    ]
    results = rank_pool().run(run_steps, setups)
    for plain, again in ((0, 1), (2, 3)):
        expect_as_without([rank[plain] for rank in results], [rank[again] for rank in results], what=setups[again])


class Moody(Router):
    """Asks somebody else, who never says the same twice: a second question would be seen in the gradients."""

    capabilities = Capabilities(forward_collective=True)

    def __init__(self) -> None:
        super().__init__(Gating.softmax(NUM_EXPERTS, 2))
        self.asked = 0

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        self.asked += 1
        random = torch.Generator().manual_seed(self.asked)
        return torch.randn(NUM_EXPERTS, generator=random)


class MoodyPairs(Moody):
    """As pairs."""

    capabilities = Capabilities(forward_collective=True, assignment=AssignmentKind.PAIRS)

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        best_T = adjusted_TE.argmax(dim=-1)
        return Selection.pairs(torch.arange(len(best_T)), best_T)


class Talkative(Router):
    """Every expert for every token; what it asks others for is its loss, and it asks again."""

    capabilities = Capabilities(forward_collective=True, assignment=AssignmentKind.DENSE)
    reads = frozenset()

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        T, E = adjusted_TE.shape
        return Selection.dense(num_tokens=T, num_experts=E, device=adjusted_TE.device)

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {"spread": routing.scores_TE.square().mean()}


def layer_of(router: Router | None = None) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(router or Moody(), hidden_size=WIDTH, expert_size=4)


def tokens(count: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def passes_of(layer: MoELayer) -> int:
    assert layer.running.first_passes is not None
    return len(layer.running.first_passes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_each_pass_finds_its_own_ids(way: str, order: tuple[int, ...]) -> None:
    """Of three in flight, whose answers all differ; the router is asked once for each use of a layer."""
    found, uses = [], 2 if way == "nonreentrant" else 1
    for how in ("none", way):
        net = Net(Moody, how, uses=uses)
        inputs = [tokens(seed=i) for i in range(3)]
        losses = [net(x_TD).square().sum() for x_TD in inputs]
        for i in order:
            losses[i].backward()
        found.append([gradient_of(each) for each in (*inputs, *net.parameters())])
        # Once while the layer is built.
        assert [block.moe.router.asked for block in net.blocks] == [1 + 3, 1 + 3 * uses]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_all_experts_are_no_choice_to_remember(use_reentrant: bool) -> None:
    """The pass is repeated as it was, loss included."""
    found = []
    for recomputed in (False, True):
        layer, x_TD = layer_of(Talkative(Gating.softmax(NUM_EXPERTS, 2))), tokens()
        layer.loss_mode = "inject"

        def run(x_TD: Tensor, layer: MoELayer = layer) -> Tensor:
            return layer(x_TD).hidden  # type: ignore[no-any-return]

        y_TD = checkpoint(run, x_TD, use_reentrant=use_reentrant) if recomputed else run(x_TD)
        y_TD.square().sum().backward()
        assert passes_of(layer) == 0
        found.append([gradient_of(each) for each in (x_TD, *layer.parameters())])
    assert all(map(torch.equal, *found))


def test_what_is_remembered_ends_with_the_graph() -> None:
    layer = layer_of()
    for _ in range(3):  # nobody checkpoints, nobody attaches, nobody steps
        loss = layer(tokens()).hidden.sum()
        assert passes_of(layer) <= 2
    loss.backward()
    del loss
    assert passes_of(layer) == 0


def test_what_is_remembered_without_a_graph_ends_when_it_is_used_or_with_the_step() -> None:
    layer = layer_of()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(optimizer, layer)
    kept = [checkpoint(lambda x_TD: layer(x_TD).hidden, tokens(seed=i), use_reentrant=True) for i in range(3)]
    assert passes_of(layer) == 3
    kept[1].sum().backward()
    assert passes_of(layer) == 2
    optimizer.step()
    assert passes_of(layer) == 0
    with pytest.raises(RecomputeError, match="before the optimizer step"):
        kept[0].sum().backward()


def test_eval_forced_ids_and_quiet_routers_remember_nothing() -> None:
    layer = layer_of()
    layer(tokens(), RouteContext(forced_ids_TK=torch.zeros(7, 1, dtype=torch.int64)))
    layer.eval()(tokens())
    assert passes_of(layer) == 0
    assert layer_of(Router(Gating.softmax(NUM_EXPERTS, 2))).running.first_passes is None


def test_a_recomputation_with_other_logits_is_an_error() -> None:
    layer, calls = layer_of(), []

    def restless(x_TD: Tensor) -> Tensor:
        calls.append(1)
        return layer(x_TD + len(calls)).hidden  # type: ignore[no-any-return]

    with pytest.raises(RecomputeError, match=r"no pass in flight had the logits .*\(7 tokens\)"):
        checkpoint(restless, tokens(), use_reentrant=False).sum().backward()


@pytest.mark.parametrize("keys", [None, (1, 2)])
def test_passes_with_the_same_logits_are_told_apart_by_their_noise_key(keys: tuple[int, int] | None) -> None:
    layer = layer_of()
    contexts = [RouteContext(noise_key=None if keys is None else torch.tensor([keys[i]])) for i in range(2)]

    def run(how: str) -> list[Tensor]:
        layer.router.asked = 0
        inputs = [tokens(), tokens()]
        calls = [checkpointed(lambda x_TD, ctx: layer(x_TD, ctx).hidden, how) for _ in range(2)]
        outputs = [call(x_TD, ctx).square().sum() for call, x_TD, ctx in zip(calls, inputs, contexts, strict=True)]
        for output in outputs[::-1]:
            output.backward()
        return [gradient_of(x_TD) for x_TD in inputs]

    plain = run("none")
    assert not torch.equal(*plain)
    if keys is None:
        with pytest.raises(RecomputeError, match="2 passes in flight had the same logits and chose different experts"):
            run("nonreentrant")
    else:
        assert all(map(torch.equal, plain, run("nonreentrant")))


def test_what_is_not_slots_cannot_be_recomputed() -> None:
    layer = layer_of(MoodyPairs())
    layer(tokens()).hidden.sum().backward()
    assert passes_of(layer) == 0
    with pytest.raises(UnsupportedError, match="chooses pairs and talks to other ranks"):
        checkpoint(lambda x_TD: layer(x_TD).hidden, tokens(), use_reentrant=False).sum().backward()


def test_a_tape_holds_each_pass_once() -> None:
    net = Net(Moody, "nonreentrant")
    with record(net) as tape:
        net(tokens()).sum().backward()
    assert [len(passes) for passes in tape.expert_ids.values()] == [1, 2]


def test_copies_remember_nothing() -> None:
    layer = layer_of(Router(Gating.softmax(NUM_EXPERTS, 2)))
    layer.running.first_passes = layer_of().running.first_passes
    output = layer(tokens())
    assert passes_of(layer) == 1
    assert passes_of(copy.deepcopy(layer)) == passes_of(pickle.loads(pickle.dumps(layer))) == 0
    output.hidden.sum().backward()


def test_building_a_layer_asks_no_other_rank() -> None:
    seen = []

    class Watching(Moody):
        def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
            seen.append(self.alone)
            return super().bias_E(scores_TE, ctx)

    layer_of(Watching())(tokens())
    assert seen == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_digest_sees_every_bit_and_its_place(dtype: torch.dtype) -> None:
    values = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    digests = {int(digest(values)), int(digest(values.flip(0))), int(digest(values.t())), int(digest(values[:-1]))}
    changed = values.clone()
    changed[17, 3] = (
        torch.nextafter(changed[17, 3].float(), torch.tensor(9.0)) if dtype == torch.float32 else -changed[17, 3]
    )
    digests.add(int(digest(changed)))
    assert len(digests) == 5
    assert int(digest(values.t())) == int(digest(values.t().contiguous()))
    assert int(digest(values[:0])) == 0


def test_a_model_without_gradients_before_the_gate_is_recomputed_too() -> None:
    """Everything up to the weights is frozen: no graph passes through them."""
    layer = layer_of()
    layer.gate.requires_grad_(False)
    frozen: nn.Module = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    x_TD = tokens().detach()
    found = []
    for how in ("none", "nonreentrant"):
        layer.router.asked = 0
        layer.zero_grad()
        checkpointed(lambda x: layer(frozen(x)).hidden, how)(x_TD).square().sum().backward()
        found.append(gradient_of(layer.experts.up_eFD))
    assert torch.equal(*found) and bool(found[0].any())
