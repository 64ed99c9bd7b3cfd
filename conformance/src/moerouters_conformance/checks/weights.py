"""Weights: what the chosen experts weigh, and that only the gating's scores say so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from moerouters import Assignment, Router
from moerouters.gating import GatingSettings
from moerouters_conformance import oracle
from moerouters_conformance.case import Case
from moerouters_conformance.forall import forall
from moerouters_conformance.readings import (
    Pairs,
    expect_same_pairs,
    expect_same_routes,
    experts_by_token,
    weights_by_pair,
)
from moerouters_conformance.requirements import FIXED_SLOTS, FLOAT64, FOLLOWS_SCORES
from moerouters_conformance.rule import Group, RuleBook
from moerouters_conformance.strategies import EXTREME, cases, distinct_cases, gatings
from moerouters_conformance.subject import ALL_FAMILIES, FAMILIES, Subject
from moerouters_conformance.violation import Violation

book = RuleBook(Group.WEIGHTS)
NEAR_TIES = (1e-6, 2e-6, 3e-6)
"""Logits that float32 can tell from 0 and from each other, also as scores."""

SCORED = tuple(name for name, family in ALL_FAMILIES.items() if not family.get("softmax_after_topk"))
"""Families whose weights are made of scores; the others take a softmax over the chosen logits."""
SHARED_OUT = tuple(name for name, family in FAMILIES.items() if family.get("renormalize", True) or name not in SCORED)
"""Families whose weights sum to the scale."""
BIASED = tuple(name for name, family in FAMILIES.items() if family.get("correction_bias"))
BELOW_ZERO = (*BIASED, "softmax after top-k")
"""Families whose adjusted scores can all be negative."""


@book.rule(
    "W01",
    "Weights are finite, whatever the finite logits.",
    why="One NaN weight makes the layer's output NaN, and with it the loss and every gradient.",
    bug="A sum of underflowed sigmoids as divisor, the reason for the 1e-20 in Megatron-LM#1545 (T19).",
)
@forall(lambda subject: cases(subject, values=EXTREME, max_tokens=4).map(_with_hard_rows))
def weights_are_finite(subject: Subject, case: Case) -> None:
    for token, expert, weight in _weighed(subject.run(case)):
        if not math.isfinite(weight):
            raise Violation(f"the weight of token {token} at expert {expert} is {weight}")


@book.rule(
    "W02",
    "Weights are not negative.",
    why="A negative weight subtracts what an expert says; no gating of the field means that.",
)
@forall(lambda subject: cases(subject, values=EXTREME, max_tokens=4).map(_with_hard_rows))
def weights_are_not_negative(subject: Subject, case: Case) -> None:
    for token, expert, weight in _weighed(subject.run(case)):
        if weight < 0:
            raise Violation(f"the weight of token {token} at expert {expert} is {weight:.8g}")


@book.rule(
    "W03",
    "With renormalisation the weights of every token that has experts sum to the scale.",
    why="The layer's output would shrink or grow with the confidence of the gate; the model was not trained so.",
    bug="An epsilon of the size of the scores takes part in the sum: Megatron-LM#1545 (T19).",
)
@forall(lambda subject: cases(subject, values=EXTREME, masks=True, settings=gatings(subject, families=SHARED_OUT)))
def weights_sum_to_the_scale(subject: Subject, case: Case) -> None:
    settings = case.settings
    # A row of low scores in every case: that is where an epsilon shows.
    valid = None if case.valid is None else (*case.valid, True)
    case = replace(case, logits=(*case.logits, (-20.0,) * settings.num_experts), valid=valid)
    assignment = subject.run(case)
    weights = weights_by_pair(assignment)
    for token, chosen in enumerate(experts_by_token(assignment)):
        if not chosen:
            continue
        total = sum(weights[token, expert] for expert in chosen)
        scores = oracle.scores(settings, case.logits[token])
        of_chosen = sum(scores[expert] for expert in chosen)
        # Scores that underflow, or that eps outweighs, leave less to share out. 1e6 times eps costs 1e-6 of the sum.
        lowest = settings.scale if settings.softmax_after_topk or of_chosen > 1e6 * settings.eps else 0.0
        # float32: each of at most 6 weights is off by a few 6e-8.
        slack = 1e-5 * settings.scale
        if not lowest - slack <= total <= settings.scale + slack:
            raise Violation(
                f"the weights of token {token} sum to {total:.8g}, the scale is {settings.scale}; "
                f"its experts are {chosen}, whose scores sum to {of_chosen:.4g}"
            )


@book.rule(
    "W04",
    "Weights are what the gating makes of the unadjusted scores of the chosen experts, also after learning.",
    why="A bias is there to move tokens; in the weights it changes what the model computes, and gets no gradient.",
    bug="Biased scores as combine weights; DeepSeek-V3 adds its bias for the choice only, DeepSeek-V3#741 (T20, T22).",
)
@forall(lambda subject: distinct_cases(subject))
def weights_come_from_scores(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    _bias_choices(router, torch.linspace(0.4, -0.3, case.settings.num_experts))
    _expect_weights(subject.route(router, case.batch(subject)), case)


@book.rule(
    "W05",
    "Without renormalisation weights are the scores times the scale.",
    why="A second softmax, or a sum that divides after all, flattens the weights without an error.",
    bug="Softmax of a softmax: transformers#45120, PR 45131, and in DBRX #39055 (T13).",
)
@forall(
    lambda subject: distinct_cases(subject, settings=gatings(subject, families=SCORED, renormalize=False, scale=2.5))
)
def plain_weights_are_scaled_scores(subject: Subject, case: Case) -> None:
    _expect_weights(subject.run(case), case)


@book.rule(
    "W06",
    "Doubling the scale doubles every weight and moves no route.",
    why="It belongs to the combine: before the renormalisation it cancels, before the choice it moves tokens.",
)
@forall(lambda subject: distinct_cases(subject, settings=gatings(subject)))
def scale_is_a_factor(subject: Subject, case: Case) -> None:
    scale = case.settings.scale
    twofold = replace(case, settings=case.settings.model_copy(update={"scale": 2 * scale}))
    single, doubled = subject.run(case), subject.run(twofold)
    expected = Pairs({pair: 2 * weight for pair, weight in weights_by_pair(single).items()})
    # A factor of 2 is exact in floats.
    expect_same_pairs(
        weights_by_pair(doubled), expected, when=f"with scale={2 * scale} and not {scale}", rtol=1e-12, atol=0.0
    )


@book.rule(
    "W07",
    "With expert groups a token's experts lie in at most kept_groups of them.",
    why="Groups are nodes: they bound how many machines a token travels to, and buffers are sized for that.",
    bug="Group limits that leak, sglang PR 3705, vllm PR 13474 (T20).",
    requires=(FIXED_SLOTS, FOLLOWS_SCORES),
)
@forall(lambda subject: cases(subject, settings=_grouped(subject)))
def groups_are_kept(subject: Subject, case: Case) -> None:
    assignment = subject.run(case)
    settings = case.settings
    size = settings.num_experts // settings.num_groups
    for token, chosen in enumerate(experts_by_token(assignment)):
        groups = sorted({expert // size for expert in chosen})
        if len(groups) > settings.kept_groups:
            raise Violation(
                f"token {token} goes to experts {chosen} in groups {groups} of {size}; "
                f"kept_groups is {settings.kept_groups}"
            )


@book.rule(
    "W08",
    "Groups are kept where every adjusted score is negative.",
    why="A mask filled with 0.0 beats negative scores: closed experts win, and tokens leave their groups.",
    bug="Group mask of 0.0 instead of -inf: transformers#45440, sglang PR 3705, DeepSeek-V3#741 (T20).",
    requires=(FLOAT64, FIXED_SLOTS, FOLLOWS_SCORES),
)
@forall(
    lambda subject: distinct_cases(subject, training=False, max_warm_up=0, settings=_grouped(subject, BELOW_ZERO)).map(
        _sunk
    )
)
def groups_are_kept_below_zero(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    # The same for every expert, so that it moves nothing.
    _bias_choices(router, torch.full((case.settings.num_experts,), -3.0))
    routes = experts_by_token(subject.route(router, case.batch(subject)))
    for token, row in enumerate(case.logits):
        expected = oracle.choose(case.settings, oracle.scores(case.settings, row))
        if routes[token] != expected:
            raise Violation(
                f"token {token} goes to {routes[token]}, the best in its {case.settings.kept_groups} kept groups "
                f"are {expected}; all its adjusted scores are negative"
            )


@book.rule(
    "W09",
    "Before it has learned anything, in eval, it chooses the K highest scores, and among equal ones the lower id.",
    why="A fresh balancer in a trained model must not change what that computes; ties must fall one way.",
    bug="Ties fall differently per device and call: torchtitan PR 3600, vllm PR 55514 (T31).",
    requires=(FIXED_SLOTS, FOLLOWS_SCORES),
)
@forall(lambda subject: cases(subject, values=(*EXTREME, *NEAR_TIES), training=False, max_warm_up=0))
def fresh_choice_is_top_k(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    # The gating's own bits: saturated scores tie in float32, and only there.
    scores_TE = router.gating.score(router.gating.prepare(batch.logits_TE)).tolist()
    routes = experts_by_token(subject.route(router, batch))
    for token, scores in enumerate(scores_TE):
        expected = oracle.choose(case.settings, scores)
        if routes[token] != expected:
            raise Violation(f"token {token} goes to {routes[token]}; its highest scores {scores} are {expected}'s")


@book.rule(
    "W10",
    "The model's correction bias steers the choice and never touches the weights.",
    why="DeepSeek-V3, GLM and Kimi are trained with it: left out it sends tokens elsewhere, weighed in it scales them.",
    bug="A correction bias that is ignored, rounded or mixed in: Megatron-LM#1971, sglang PR 8729 (T12, T18).",
)
@forall(
    lambda subject: distinct_cases(subject, training=False, max_warm_up=0, settings=gatings(subject, families=BIASED))
)
def correction_bias_steers(subject: Subject, case: Case) -> None:
    router, (E, K) = subject.prepared(case), (case.settings.num_experts, case.settings.top_k)
    # Sigmoids lie between 0 and 1, so 4 outbids every score.
    _bias_choices(router, torch.where(torch.arange(E) >= E - K, 4.0, 0.0))
    assignment = subject.route(router, case.batch(subject))
    if subject.follows_scores and subject.fixed_slots:
        favoured = list(range(E - K, E))
        expect_same_routes(
            [favoured] * len(case.logits),
            experts_by_token(assignment),
            when=f"by a correction bias of 4 for {favoured} over sigmoid scores",
        )
    _expect_weights(assignment, case)


@book.rule(
    "W11",
    "Logits are soft-capped once, before they become scores.",
    why="Grok and Gemma cap their logits; without the cap, or under two, confident tokens weigh otherwise.",
)
@forall(
    lambda subject: distinct_cases(subject, settings=gatings(subject, families=SCORED, renormalize=False, soft_cap=1.5))
)
def cap_comes_before_scores(subject: Subject, case: Case) -> None:
    _expect_weights(subject.run(case), case)


@book.rule(
    "W12",
    "Before it has learned anything, in eval, the kept groups are those of the highest group score.",
    why="DeepSeek-V2 ranks groups by their best expert, V3 by the sum of the best two; mixed up, tokens go elsewhere.",
    bug="Group-limited choices that differ from the model's: transformers PR 45441, flashinfer#2168 (T20).",
    requires=(FLOAT64, FIXED_SLOTS, FOLLOWS_SCORES),
)
@forall(lambda subject: distinct_cases(subject, training=False, max_warm_up=0, settings=_grouped(subject)))
def kept_groups_are_the_best(subject: Subject, case: Case) -> None:
    settings = case.settings
    routes = experts_by_token(subject.run(case))
    for token, row in enumerate(case.logits):
        expected = oracle.choose(settings, oracle.scores(settings, row))
        if routes[token] != expected:
            raise Violation(
                f"token {token} goes to {routes[token]}; the best in the {settings.kept_groups} of "
                f"{settings.num_groups} groups with the highest {settings.group_score} are {expected}"
            )


@book.rule(
    "W13",
    "Forced ids weigh what the gating makes of the scores at hand.",
    why="Replay repeats the sampler's choice; weights that are not the trainer's own give the gate a wrong gradient.",
    bug="Replayed routes with weights of another choice: Megatron-LM#4168, RL PR 2590 (T32).",
)
@forall(lambda subject: distinct_cases(subject))
def forced_ids_are_weighed(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    E, K = case.settings.num_experts, case.settings.top_k
    forced_TK = (torch.arange(batch.num_tokens).unsqueeze(1) + torch.arange(K)) % E
    _expect_weights(subject.route(router, batch.with_context(forced_ids_TK=forced_TK)), case)


def _expect_weights(assignment: Assignment, case: Case) -> None:
    """Raise Violation at the first pair that does not weigh what the oracle says of the ids that were chosen."""
    given = weights_by_pair(assignment)
    for token, chosen in enumerate(experts_by_token(assignment)):
        expected = oracle.weights(case.settings, case.logits[token], chosen)
        for expert, weight in zip(chosen, expected, strict=True):
            # In float64 the functions of libm and of torch differ by some 1e-16 of the value.
            if not math.isclose(given[token, expert], weight, rel_tol=max(1e-9, given.precision)):
                raise Violation(
                    f"the weight of token {token} at expert {expert} is {given[token, expert]:.10g}; "
                    f"the gating makes {weight:.10g} of the unadjusted scores of its experts {chosen}"
                )


def _weighed(assignment: Assignment) -> Iterator[tuple[int, int, float]]:
    for (token, expert), weight in weights_by_pair(assignment).items():
        yield token, expert, weight


def _bias_choices(router: Router, bias_E: torch.Tensor) -> None:
    """Set the model's own correction bias, where the gating has one."""
    if router.gating.settings.correction_bias:
        router.gating.correction_bias_E.copy_(bias_E)


def _with_hard_rows(case: Case) -> Case:
    """Two more tokens: one whose logits are all hopeless, and one with a single expert far above the others."""
    E = case.settings.num_experts
    hopeless, dominant = (-1e4,) * E, (1e4,) + (-1e4,) * (E - 1)
    return replace(case, logits=(*case.logits, hopeless, dominant))


def _sunk(case: Case) -> Case:
    """All logits below zero, where the choice is made on logits."""
    if case.settings.score != "identity":
        return case
    return replace(case, logits=tuple(tuple(logit - 50.0 for logit in row) for row in case.logits))


@st.composite
def _grouped_settings(draw: st.DrawFn, subject: Subject, families: Sequence[str]) -> GatingSettings:
    group_score = draw(st.sampled_from(("max", "top2_sum")), label="group_score")
    size = draw(st.integers(2 if group_score == "top2_sum" else 1, 3), label="group size")
    groups = draw(st.integers(2, 4), label="num_groups")
    kept = draw(st.integers(1, groups - 1), label="kept_groups")
    K = draw(st.integers(1, min(4, kept * size)), label="K")
    E = groups * size
    grouping: dict[str, Any] = {"num_groups": groups, "kept_groups": kept, "group_score": group_score}
    return draw(gatings(subject, min_experts=E, max_experts=E, min_k=K, max_k=K, families=families, **grouping))


def _grouped(subject: Subject, families: Sequence[str] = tuple(ALL_FAMILIES)) -> SearchStrategy[GatingSettings]:
    """Gatings that keep some of their groups, by either score of a group."""
    return _grouped_settings(subject, families)
