"""Balance: a router that promises balance keeps it, and learning never makes it worse."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moerouters import Assignment, Router
from moerouters.errors import ConfigError, UnsupportedError
from moerouters.metrics import max_violation
from moerouters_conformance.case import Batch, Case, make_batch
from moerouters_conformance.forall import forall
from moerouters_conformance.histories import History, Kind
from moerouters_conformance.profile import Cost, Profile
from moerouters_conformance.readings import expect_close, experts_by_token, shown, state_of
from moerouters_conformance.requirements import (
    ADDITIVE,
    BALANCE,
    FIXED_SLOTS,
    FOLLOWS_SCORES,
    MEAN_OF_SOLVES,
    NO_NOISE,
    STATE,
)
from moerouters_conformance.rule import Group, RuleBook
from moerouters_conformance.strategies import distinct_cases
from moerouters_conformance.subject import Subject
from moerouters_conformance.violation import NotApplicable, Violation

book = RuleBook(Group.BALANCE)
E, K = 8, 2
"""Sizes of all histories: with 256 tokens the mean load is 64, and MaxVio of pure chance about 0.2."""


@book.rule(
    "B01",
    "The declared bound on MaxVio holds where popularity stays as it is.",
    why="The fullest expert sets the time of a step; a bound that does not hold misleads whoever sizes buffers by it.",
    bug="A bias that is allocated and never updated: OLMo-core#227, prime-rl PR 2953, maxtext#2494 (T21, T22).",
    requires=(BALANCE,),
)
def bound_holds_when_stationary(subject: Subject, profile: Profile) -> None:
    _expect_bound(subject, profile, Kind.STATIONARY)


@book.rule(
    "B02",
    "The declared bound holds where popularity drifts.",
    why="Gates move all through training; a balancer that has settled must still follow.",
    requires=(BALANCE,),
    cost=Cost.HISTORY,
)
def bound_holds_when_drifting(subject: Subject, profile: Profile) -> None:
    _expect_bound(subject, profile, Kind.DRIFTING)


@book.rule(
    "B03",
    "The declared bound holds again after_steps updates after popularity was turned round.",
    why="Another data mixture turns favourites into outcasts; what was learned before then pushes the wrong way.",
    requires=(BALANCE,),
    cost=Cost.HISTORY,
)
def bound_holds_after_switches(subject: Subject, profile: Profile) -> None:
    _expect_bound(subject, profile, Kind.SWITCHING)


@book.rule(
    "B04",
    "The declared bound holds while popularity grows without rest.",
    why="Collapse feeds itself: chosen experts get better and are chosen more, and a bounded bias gives up.",
    bug="Routers collapse in long runs: torchtitan#1246 (T28); EP steps get slower in RL, verl PR 4103 (T26).",
    requires=(BALANCE,),
    cost=Cost.HISTORY,
)
def bound_holds_against_collapse(subject: Subject, profile: Profile) -> None:
    _expect_bound(subject, profile, Kind.COLLAPSING)


def _expect_bound(subject: Subject, profile: Profile, kind: Kind) -> None:
    bound = subject.capabilities.balance
    assert bound is not None
    for family, seed in _runs(subject, profile):
        history = History(kind=kind, num_experts=E, seed=seed, after_steps=bound.after_steps)
        router = _router(subject, family)
        for step, (logits_TE, held) in enumerate(history):
            load_E = _learn(subject, router, logits_TE).load_E
            seen = float(max_violation(load_E))
            if held and seen > bound.at_most:
                raise Violation(
                    f"MaxVio is {seen:.2f} in step {step} of a {kind} history (seed {seed}, {family}, E={E}, "
                    f"K={K}, T={history.tokens}); declared is at most {bound.at_most} after {bound.after_steps} "
                    f"updates. load_E is {load_E.tolist()}"
                )


@book.rule(
    "B05",
    "Learning does not make balance worse than that of a fresh router on the same batches.",
    why="A flipped sign trains without an error, and sends the fullest expert still more tokens.",
    bug="scores - beta in training and + beta in inference: review of Megatron-LM PR 6802 (T43).",
    requires=(STATE,),
)
def learning_does_not_hurt(subject: Subject, profile: Profile) -> None:
    for family, seed in _runs(subject, profile):
        history = History(kind=Kind.STATIONARY, num_experts=E, seed=seed, after_steps=50)
        batches = [logits_TE for logits_TE, _ in history]
        router = _router(subject, family)
        for logits_TE in batches[:-10]:
            _learn(subject, router, logits_TE)
        for training in (True, False):
            learned = _mean_violation(subject, router.train(training), batches[-10:])
            fresh = _mean_violation(subject, _router(subject, family).train(training), batches[-10:])
            # Both see the same ten batches: 0.05, three tokens of 64, is far outside what chance does to a mean.
            if learned > fresh + 0.05:
                raise Violation(
                    f"mean MaxVio over 10 batches in {'training' if training else 'eval'} is {learned:.2f} after "
                    f"{len(batches) - 10} updates, and {fresh:.2f} without any (stationary, seed {seed}, {family})",
                    likely="the sign of the update or of the bias is flipped",
                )


@book.rule(
    "B06",
    "An expert that no token wanted gets load again when its popularity returns.",
    why="An expert given up for dead is memory without use, for the rest of the run.",
    bug="Experts that starve and never come back: torchtitan#1246 (T28).",
    requires=(BALANCE,),
    cost=Cost.HISTORY,
)
def starved_experts_recover(subject: Subject, profile: Profile) -> None:
    bound = subject.capabilities.balance
    assert bound is not None
    for family, seed in _runs(subject, profile):
        router, lonely = _router(subject, family), seed % E
        flat = History(kind=Kind.STATIONARY, num_experts=E, seed=seed, after_steps=bound.after_steps, strength=0.0)
        for logits_TE, _ in flat:
            starving_TE = logits_TE.clone()
            starving_TE[:, lonely] -= 8.0
            _learn(subject, router, starving_TE)
        loads_SE = torch.stack([_learn(subject, router, logits_TE).load_E for logits_TE, _ in flat])
        last_E = loads_SE[bound.after_steps :].double().mean(dim=0)
        # Half of its share: the mean of 30 batches around a share of 64 tokens errs by 2 tokens.
        if last_E[lonely] < 0.5 * last_E.mean():
            raise Violation(
                f"expert {lonely} starved for {flat.steps} steps; {bound.after_steps} steps after its popularity "
                f"came back it gets {float(last_E[lonely]):.1f} tokens per batch where the mean is "
                f"{float(last_E.mean()):.1f} (seed {seed}, {family})"
            )


@book.rule(
    "B07",
    "State per expert settles on a stationary history: neither its spread nor its mean runs away.",
    why="An offset that all experts share changes no choice, and eats the bits that differences are stored in.",
    bug="torchtitan centres its bias updates for this; the published dual clips at 0 and drifts (T43, T28).",
    requires=(STATE, BALANCE),
    cost=Cost.HISTORY,
)
def state_settles(subject: Subject, profile: Profile) -> None:
    bound = subject.capabilities.balance
    assert bound is not None
    for family in _families(subject)[: profile.histories]:
        router = _router(subject, family)
        history = History(kind=Kind.STATIONARY, num_experts=E, after_steps=bound.after_steps)
        early = _after(subject, router, history)
        _after(subject, router, history)
        late = _after(subject, router, history)
        for name, before_E in early.items():
            spread, offset = _spread(before_E), float((late[name] - before_E).mean().abs())
            # Twice the time brings a settled state nothing but noise; half as much again is none.
            if _spread(late[name]) > 1.5 * spread + 1e-6 or offset > 0.5 * spread + 1e-6:
                raise Violation(
                    f"{name} is {shown(before_E)} after {history.steps} updates and {shown(late[name])} after "
                    f"{3 * history.steps} of the same popularity ({family})"
                )


@book.rule(
    "B08",
    "A batch that is balanced stays balanced, however often it comes.",
    why="A balancer that corrects what needs no correction undoes itself.",
    requires=(STATE, NO_NOISE),
)
def balance_is_left_alone(subject: Subject, profile: Profile) -> None:
    for family in _families(subject)[: profile.histories]:
        router, batch = _router(subject, family), _balanced_batch(subject)
        for step in range(60):
            assignment = subject.route(router, batch)
            load_E = assignment.load_E.tolist()
            if len(set(load_E)) > 1:
                if step == 0:
                    raise NotApplicable("before it has learned anything it does not balance a batch that is balanced")
                raise Violation(f"load_E is {load_E} after {step} updates on a batch that was balanced ({family})")
            subject.update(router, dict(assignment.stats))


@book.rule(
    "B09",
    "Stats of micro-batches add up to the stats of the whole batch, and leave the same state.",
    why="Whoever halves the micro-batch to save memory must not train another model.",
    bug="Bias updates under gradient accumulation: torchtitan PR 1304, PR 1593; counts over the current "
    "micro-batch's tokens: Megatron-LM#7213 (T16, T28).",
    requires=(ADDITIVE, NO_NOISE),
)
@forall(lambda subject: distinct_cases(subject, masks=True, training=True))
def micro_batches_add_up(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    whole = dict(subject.route(router, batch).stats)
    expected = _updated(subject, router, whole)
    for sizes, parts in _splits(batch):
        total = _sums([subject.route(router, part).stats for part in parts])
        when = f"in micro-batches of {sizes} tokens"
        # Sums of floats in another order differ in the last bits of float64 or float32.
        expect_close(total, whole, when=f"summed over stats {when}", rtol=1e-5, atol=1e-6)
        expect_close(state_of(_updated(subject, router, total)), state_of(expected), when=when, atol=1e-6)


@book.rule(
    "B10",
    "The state after micro-batches is the mean of the states after each alone, weighted by their tokens.",
    why="A micro-batch of one token must not speak as loudly as one of a thousand; an empty one says nothing.",
    bug="Means of means where token counts differ: Megatron-LM#7213 (T16).",
    requires=(MEAN_OF_SOLVES, NO_NOISE),
)
@forall(lambda subject: distinct_cases(subject, masks=True, training=True))
def micro_batches_weigh_by_tokens(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    names = router.state_names()
    for sizes, parts in _splits(batch):
        assignments = [subject.route(router, part) for part in parts]
        together = state_of(_updated(subject, router, _sums([a.stats for a in assignments])))
        weighted = {name: torch.zeros_like(router.get_buffer(name), dtype=torch.float64) for name in names}
        tokens = sum(int(assignment.tokens) for assignment in assignments)
        for assignment in assignments:
            alone = _updated(subject, router, dict(assignment.stats))
            for name in names:
                weighted[name] += alone.get_buffer(name).double() * int(assignment.tokens) / max(tokens, 1)
        expected = weighted if tokens else {name: router.get_buffer(name) for name in names}
        got = {name: together[name] for name in names}
        # State is float32: each of the states that the mean is taken of is rounded.
        expect_close(got, expected, when=f"after micro-batches of {sizes} tokens, weighted mean", atol=1e-6)


@book.rule(
    "B11",
    "Where the K highest scores are balanced already, training routes to them.",
    why="Balance costs quality; a balancer that moves tokens without need pays for nothing.",
    requires=(FOLLOWS_SCORES, FIXED_SLOTS, NO_NOISE),
)
def balanced_choice_is_kept(subject: Subject, profile: Profile) -> None:
    for family in _families(subject)[: profile.histories]:
        batch = _balanced_batch(subject)
        chosen = experts_by_token(subject.route(_router(subject, family), batch))
        for token, experts in enumerate(chosen):
            best = sorted((token + place) % E for place in range(K))
            if experts != best:
                raise Violation(
                    f"token {token} goes to experts {experts} in training; its {K} highest scores are at {best}, and "
                    f"all tokens at their highest would be balanced ({family})"
                )


def _families(subject: Subject) -> tuple[str, ...]:
    """Histories run under the two scores that models use; else under what the router accepts first."""
    both = tuple(name for name in ("softmax", "sigmoid") if name in subject.families)
    return both or subject.families[:1]


def _runs(subject: Subject, profile: Profile) -> Iterator[tuple[str, int]]:
    """(family, seed) of each history; families take turns, since each history costs some hundred updates."""
    families = _families(subject)
    for seed in range(profile.histories):
        yield families[seed % len(families)], seed


def _router(subject: Subject, family: str) -> Router:
    """A fresh router in training, of the sizes of histories."""
    try:
        return subject.make(subject.settings(num_experts=E, top_k=K, family=family)).train()
    except (ConfigError, UnsupportedError):
        raise NotApplicable(f"it refuses, in due form, {E} experts with {K} a token") from None


def _learn(subject: Subject, router: Router, logits_TE: Tensor) -> Assignment:
    """One training step on one batch."""
    with torch.no_grad():
        assignment = subject.route(router, make_batch(logits_TE, hidden_size=subject.hidden_size))
        subject.update(router, dict(assignment.stats))
    return assignment


def _mean_violation(subject: Subject, router: Router, batches: Sequence[Tensor]) -> float:
    with torch.no_grad():
        routed = [subject.route(router, make_batch(b, hidden_size=subject.hidden_size)) for b in batches]
    return float(torch.stack([max_violation(assignment.load_E) for assignment in routed]).mean())


def _after(subject: Subject, router: Router, history: History) -> Mapping[str, Tensor]:
    """State per expert after one pass over the history."""
    for logits_TE, _ in history:
        _learn(subject, router, logits_TE)
    return _per_expert(router)


def _per_expert(router: Router) -> dict[str, Tensor]:
    """State with one number per expert, in float64; a count of steps, for one, may grow for ever."""
    state = {name: router.get_buffer(name).detach().double().clone() for name in router.state_names()}
    return {name: value for name, value in state.items() if tuple(value.shape) == (router.gating.num_experts,)}


def _spread(value_E: Tensor) -> float:
    return float(value_E.max() - value_E.min())


def _balanced_batch(subject: Subject) -> Batch:
    """4 E tokens; token t likes expert t best, t + 1 next, and so on round the circle, so all experts are alike."""
    tokens_T1, experts_E = torch.arange(4 * E).unsqueeze(1), torch.arange(E)
    logits_TE = -0.5 * ((experts_E - tokens_T1) % E).float()
    return make_batch(logits_TE, hidden_size=subject.hidden_size)


def _splits(batch: Batch) -> Iterator[tuple[list[int], list[Batch]]]:
    """Uneven ways to split a batch, with empty parts, and in another order than that of the tokens."""
    T = batch.num_tokens
    for sizes in ([0, 1, T - 1], [T - T // 3, 0, T // 3]):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        parts = [batch.rows(slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
        yield sizes[::-1], parts[::-1]


def _sums(stats: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Added as `RunningStats` does, in the dtype of the stat."""
    return {name: torch.stack([part[name] for part in stats]).sum(dim=0).to(stats[0][name].dtype) for name in stats[0]}


def _updated(subject: Subject, router: Router, stats: Mapping[str, Tensor]) -> Router:
    """A copy of the router after one update."""
    other = copy.deepcopy(router)
    subject.update(other, stats)
    return other
