"""State, continued: what an update learns from, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor

from moerouters import MoELayer, attach
from moerouters_conformance.case import Batch, Case, make_batch, warm_up_logits
from moerouters_conformance.checks.state import book, expect_alike, learned, state_bits
from moerouters_conformance.forall import forall
from moerouters_conformance.profile import Profile
from moerouters_conformance.readings import expect_same_bits, shown
from moerouters_conformance.requirements import ADDITIVE, NO_NOISE, STATE, STATELESS
from moerouters_conformance.snapshots import generators_kept
from moerouters_conformance.strategies import EXTREME, cases
from moerouters_conformance.subject import Subject, blame
from moerouters_conformance.violation import NotApplicable, Violation

STATE_DTYPES = (torch.float32, torch.float64, torch.int64)


@book.rule(
    "S10",
    "Evaluation between optimizer steps changes nothing that the router learns.",
    why="Runs that evaluate more often would train another model.",
    bug="The observation hook also ran in eval and changed the next training step: torchtitan PR 4412 (T43).",
    requires=(STATE,),
)
def evaluation_teaches_nothing(subject: Subject, profile: Profile) -> None:
    plain, evaluated = (_trained_layer(subject, evaluations=count) for count in (0, 2))
    expect_same_bits(evaluated, plain, when="with evaluations before and between the optimizer steps")


@book.rule(
    "S11",
    "What is counted is counted in int64 or float64.",
    why="float32 stops counting at 2**24 tokens, which a global batch exceeds; bfloat16 at 256.",
    bug="bfloat16 counters flip the sign of the bias update: Megatron-LM PR 7081 (T17).",
    requires=(STATE,),
)
def counters_are_exact(subject: Subject, profile: Profile) -> None:
    settings = subject.settings(num_experts=4, top_k=2)
    router = subject.build(settings).train()
    whole: dict[str, bool] = {}
    some: dict[str, Tensor] = {}
    for step in range(4):
        batch = make_batch(warm_up_logits(step, 4, tokens=13 + 2 * step), hidden_size=subject.hidden_size)
        stats = dict(subject.route(router, batch).stats)
        for name, value in stats.items():
            whole[name] = whole.get(name, True) and bool((value == value.round()).all())
            some[name] = value if name not in some or bool(value.any()) else some[name]
        subject.update(router, stats)
    for name, value in some.items():
        # What is whole in four batches of different sizes, and not always 0, is a count.
        if whole[name] and bool(value.any()) and value.dtype not in (torch.int64, torch.float64):
            raise Violation(f"stats[{name!r}] holds whole numbers, as {value.dtype}: {value.flatten()[:8].tolist()}")


@book.rule(
    "S12",
    "update follows from the state and the stats: not from the last forward, nor from global random generators.",
    why="Stats are sums over micro-batches and ranks; what a rank saw last is another rank's something else.",
    bug="A gradient-accumulation step learns from its last micro-batch: torchtitan PR 1593, PR 1304 (T28).",
    requires=(STATE,),
)
@forall(learned, share=0.4)
def update_reads_its_stats(subject: Subject, case: Case) -> None:
    router, other = subject.prepared(case), subject.prepared(case)
    batch = case.batch(subject)
    stats = dict(subject.route(router, batch).stats)
    subject.route(other, batch)
    E = case.settings.num_experts
    subject.route(other, make_batch(warm_up_logits(9, E).flip(1), hidden_size=subject.hidden_size))
    with generators_kept():
        for seed, each in ((1, router), (2, other)):
            torch.manual_seed(seed)
            subject.update(each, _copied(stats))
    expect_same_bits(state_bits(other), state_bits(router), when="updated after another forward, with another seed")


@book.rule(
    "S13",
    "update changes none of its stats, and keeps none of them.",
    why="The sums are cleared in place after the step; other readers, metrics and the log, read them as well.",
    bug="Aliased counters: buffers and accumulators that overwrite each other, Automodel#3325, PR 3247 (T30).",
    requires=(STATE,),
)
@forall(learned, share=0.4)
def update_leaves_its_stats(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    stats = dict(subject.route(router, case.batch(subject)).stats)
    before = _copied(stats)
    subject.update(router, stats)
    expect_same_bits(stats, before, when="after update was given them")
    kept, cleared = deepcopy(router), router
    for value in stats.values():
        value.zero_()
    expect_same_bits(state_bits(cleared), state_bits(kept), when="once the stats of the last update are cleared")
    expect_alike(subject, cleared, kept, case, when="once the stats of the last update are cleared")


@book.rule(
    "S14",
    "State stands in register_state's buffers, float32 or int64, keeps its shape and stays finite.",
    why="Casts, checkpoints and reset know the buffers by that list; one NaN in them stays for the rest of the run.",
    bug="A bias buffer outside the usual ways is lost or narrowed: prime-rl PR 3429, maxtext#2494 (T21).",
    requires=(STATE,),
)
@forall(lambda subject: cases(subject, values=EXTREME, masks=True, training=True))
def state_is_registered_and_finite(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    fresh = state_bits(subject.build(case.settings))
    for _ in range(2):
        subject.update(router, dict(subject.route(router, case.batch(subject)).stats))
    known = set(router.state_names())
    buffers = set(router.state_dict()) - {name for name, _ in router.named_parameters()}
    unknown = {name for name in buffers - known if not name.startswith("gating.")}
    if unknown:
        raise Violation(f"state_dict holds {sorted(unknown)}, and state_names() are {sorted(known)}")
    for name, value in state_bits(router).items():
        if value.dtype not in STATE_DTYPES:
            raise Violation(f"{name} is {value.dtype}")
        if value.shape != fresh[name].shape:
            raise Violation(f"{name} has shape {list(value.shape)} after updates, {list(fresh[name].shape)} before")
        if not bool(torch.isfinite(value).all()):
            raise Violation(f"{name} is {value.tolist()} after updates from these logits")


@book.rule(
    "S15",
    "A router that declares state=stateless keeps none and observes nothing.",
    why="attach calls no update for it: what it would have learned is lost without a word.",
    bug="A bias buffer that is allocated and never updated: OLMo-core#227, DeepSeek-V3#761 (T21, T22).",
    requires=(STATELESS,),
)
@forall(lambda subject: cases(subject, training=True), share=0.3)
def stateless_keeps_nothing(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    stats = subject.route(router, case.batch(subject)).stats
    if router.state_names() or stats:
        raise Violation(f"declared is state=stateless; state: {sorted(router.state_names())}, stats: {sorted(stats)}")


@book.rule(
    "S16",
    "A router that declares state learns: updates from crowded batches change it.",
    why="A balancer whose update never arrives looks like one in every log but the load's.",
    bug="People train DeepSeek code whose bias nobody updates: EfficientMoE#3, maxtext#2494 (T21, T22).",
    requires=(STATE,),
)
def state_learns(subject: Subject, profile: Profile) -> None:
    router = subject.build(subject.settings(num_experts=4, top_k=2))
    before = state_bits(router)
    if not before:
        raise Violation(f"declared is state={router.capabilities.state}; state_names() is empty")
    subject.warm_up(router, 3)
    after = state_bits(router)
    if all(torch.equal(after[name], value) for name, value in before.items()):
        raise Violation(f"three updates, from batches that favour the early experts, left {sorted(before)} as it was")


@book.rule(
    "S17",
    "Loads that differ by little are told apart also where they are large.",
    why="At 2**24 tokens float32 stops to see single ones, at 2**8 bfloat16 does: the sign of a step flips or is lost.",
    bug="bfloat16 counters flip the sign of the bias update: 41,216 for 40,840, Megatron-LM PR 7081 (T17).",
    requires=(ADDITIVE, NO_NOISE),
)
def large_loads_are_told_apart(subject: Subject, profile: Profile) -> None:
    E = 4
    settings = subject.settings(num_experts=E, top_k=1)
    # Loads of 2, 2, 3 and 1 upon equal loads that are multiplied; how far apart the state ends goes by the rule.
    even = make_batch(torch.eye(E) * 4, hidden_size=subject.hidden_size)
    uneven = make_batch(torch.eye(E)[[0, 0, 1, 1, 2, 2, 2, 3]] * 4, hidden_size=subject.hidden_size)
    router = subject.build(settings).train()
    base, extra = (dict(subject.route(router, batch).stats) for batch in (even, uneven))
    if any(value.is_floating_point() for value in base.values()):
        raise NotApplicable("needs stats that are whole numbers")

    def after(power: int) -> dict[str, Tensor]:
        """State after one update, with 2**power tokens more for every expert."""
        learner = subject.build(settings).train()
        subject.update(learner, {name: value * 2**power + extra[name] for name, value in base.items()})
        return {name: value.double().reshape(-1) for name, value in state_bits(learner).items()}

    few, more = after(6), after(10)
    for name, early_E in more.items():
        if _ranks(few[name]) != _ranks(early_E) or _ranks(after(2)[name]) != _ranks(early_E):
            continue  # not an update that goes by differences of loads
        for power in (14, 20, 26, 32):
            if _fades(few[name], early_E, steps=(power - 10) / 4):
                break
            late_E = after(power)[name]
            if _ranks(late_E) != _ranks(early_E):
                raise Violation(
                    f"{name} is {shown(late_E)} with 2**{power} tokens more for every expert, and "
                    f"{shown(early_E)}, in another order, with 2**10 more"
                )


def _ranks(value_N: Tensor) -> list[int]:
    """Per element how many are smaller."""
    return (value_N.unsqueeze(0) < value_N.unsqueeze(1)).sum(dim=1).tolist()


def _fades(few_N: Tensor, more_N: Tensor, *, steps: float) -> bool:
    """Whether differences that shrink as they did from `few` to `more` fall below what float32 tells apart.

    A share of the load does: its differences vanish beside the 1 that it is close to. A signed step does not.
    """
    spreads = [float(value.max() - value.min()) for value in (few_N, more_N)]
    sizes = [float(value.abs().max()) for value in (few_N, more_N)]
    if not spreads[0] or not sizes[0]:
        return True
    spread = spreads[1] * math.pow(spreads[1] / spreads[0], steps)
    size = sizes[1] * math.pow(sizes[1] / sizes[0], steps)
    return spread < 1e-6 * size


def _copied(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stats.items()}


def _trained_layer(subject: Subject, *, evaluations: int) -> dict[str, Tensor]:
    """State of a layer's router after two optimizer steps, with some evaluations before each and half-way."""
    settings = subject.settings(num_experts=4, top_k=2)
    with generators_kept():
        torch.manual_seed(0)
        layer = MoELayer(
            subject.build(settings), hidden_size=subject.hidden_size, expert_size=2, loss_mode="inject"
        ).double()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        handle = attach(optimizer, layer)
        generator = torch.Generator().manual_seed(0)
        try:
            for _ in range(2):
                for _ in range(2):
                    for _ in range(evaluations):
                        layer.eval()
                        layer(*_layer_input(subject, 0, torch.Generator().manual_seed(7)))
                        layer.train()
                    layer(*_layer_input(subject, 3, generator)).hidden.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        except Exception as error:
            raise Violation(f"training a MoELayer raised {blame(error)}") from error
        finally:
            handle.remove()
        return state_bits(layer.router)


def _layer_input(subject: Subject, shift: int, generator: torch.Generator) -> tuple[Tensor, object]:
    """Hidden states that crowd on some experts, and their context; the layer adds its own hidden states."""
    x_TD = torch.randn(9, subject.hidden_size, dtype=torch.float64, generator=generator) + shift
    batch: Batch = make_batch(torch.zeros(9, 4), hidden_size=subject.hidden_size)
    return x_TD, batch.with_context(hidden_TD=None).ctx
