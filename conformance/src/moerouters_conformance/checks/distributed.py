"""Distributed: several ranks learn one state, from gloo processes that really exchange it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

from moerouters import StateAlgebra
from moerouters_conformance.neighbours import other_configs
from moerouters_conformance.pool import WORLD_SIZE, rank_pool
from moerouters_conformance.profile import Cost, Profile
from moerouters_conformance.ranks import (
    Layout,
    State,
    attach_different,
    collectives_of_forward,
    learn,
    learn_alone,
    learn_replicated,
    route_same,
)
from moerouters_conformance.readings import expect_close, expect_same_bits
from moerouters_conformance.requirements import STATE
from moerouters_conformance.rule import Group, Requirement, RuleBook
from moerouters_conformance.subject import Subject
from moerouters_conformance.violation import Violation

book = RuleBook(Group.DISTRIBUTED)


def _can_be_sent(subject: Subject) -> bool:
    try:
        pickle.dumps(subject)
    except Exception:
        return False
    return True


SENDABLE = Requirement(text="a factory that can be sent to another process", holds=_can_be_sent)
SHARDS = (((8, 8, 8, 8), (8, 8, 8, 8)), ((7, 1, 3, 21), (2, 16, 5, 9), (4, 4, 4, 4)))
EMPTY = (((0, 8, 0, 8), (8, 0, 8, 0)), ((16, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 5)))


def _layouts(subject: Subject, profile: Profile, sizes: tuple[tuple[tuple[int, ...], ...], ...]) -> Iterator[Layout]:
    """Every kind of size with each accepted family of gatings, as many families as the profile has time for."""
    for family in subject.families[: max(1, profile.examples // 50)]:
        settings = subject.settings(num_experts=subject.hidden_size, top_k=2, family=family)
        for tokens in sizes:
            yield Layout(settings=settings, tokens=tokens)


def _expect_one_state(states: list[State], expected: State, *, layout: Layout, by: str) -> None:
    for rank, state in enumerate(states):
        when = f"on rank {rank}, with {layout.tokens} tokens per step and rank,"
        # Sums of floats run in another order; the state is float32.
        expect_close(state, expected, when=f"{when} (else: {by})", rtol=1e-5, atol=1e-6)


@book.rule(
    "D01",
    "Ranks that hold shards end in the state of one process that holds all of them.",
    why="A balancer that sees its own rank's load balances each rank for itself, and the whole not at all.",
    bug="Losses and counters per micro-batch or rank and not per batch: Megatron-LM#7213, OLMo-core#227 (T16, T21).",
    requires=(STATE, SENDABLE),
    cost=Cost.RANKS,
)
def shards_learn_as_one(subject: Subject, profile: Profile) -> None:
    for layout in _layouts(subject, profile, SHARDS):
        states = rank_pool().run(learn, subject, layout)
        shards = range(WORLD_SIZE)
        parts = learn_alone(subject, layout, shards=shards)
        _expect_one_state(states, parts, layout=layout, by="one process")
        if subject.capabilities.state is StateAlgebra.ADDITIVE:
            whole = learn_alone(subject, layout, shards=shards, whole=True)
            _expect_one_state(states, whole, layout=layout, by="one process, all shards in one batch")


@book.rule(
    "D02",
    "All ranks end in the same bits of state.",
    why="Ranks that drift apart send equal tokens to other experts; a checkpoint then holds one rank's truth.",
    bug="Router weights and biases diverge across ranks: torchtitan PR 2416, Automodel PR 2995 (T35).",
    requires=(STATE, SENDABLE),
    cost=Cost.RANKS,
)
def ranks_agree_on_state(subject: Subject, profile: Profile) -> None:
    for layout in _layouts(subject, profile, SHARDS + EMPTY):
        first, *others = rank_pool().run(learn, subject, layout)
        for rank, state in enumerate(others, start=1):
            expect_same_bits(state, first, when=f"on rank {rank} (else: on rank 0) with {layout.tokens} tokens")


@book.rule(
    "D03",
    "Ranks without tokens take part and change nothing.",
    why="With expert parallelism a rank may run dry at any step; if it skips a call, the others wait for ever.",
    bug="Zero-token ranks hang, crash or skip gradients: Automodel PR 3680, PR 532, pytorch#126616 (T36).",
    requires=(SENDABLE,),
    cost=Cost.RANKS,
)
def empty_ranks_take_part(subject: Subject, profile: Profile) -> None:
    for layout in _layouts(subject, profile, EMPTY):
        states = rank_pool().run(learn, subject, layout)
        alone = learn_alone(subject, layout, shards=range(WORLD_SIZE))
        _expect_one_state(states, alone, layout=layout, by="one process")


@book.rule(
    "D04",
    "Tokens that tensor-parallel ranks hold twice count once.",
    why="Loads doubled by replicas look balanced in the sum and are wrong in every absolute threshold.",
    bug="Silent corruption of Tutel under tensor parallelism, DeepSpeed PR 8195 (T39).",
    requires=(STATE, SENDABLE),
    cost=Cost.RANKS,
)
def replicas_count_once(subject: Subject, profile: Profile) -> None:
    for layout in _layouts(subject, profile, (((8, 8), (3, 11)),)):
        states = rank_pool().run(learn_replicated, subject, layout, 2)
        alone = learn_alone(subject, layout, shards=range(2))
        _expect_one_state(states, alone, layout=layout, by="one process that holds each token once")


@book.rule(
    "D05",
    "Ranks that run other routers or other settings are told so when they attach.",
    why="Their sums mean different things, and the shared state is garbage that no error announces.",
    bug="vLLM only documents that every process has to load the same plugins; vllm#51005 (T6).",
    requires=(SENDABLE,),
    cost=Cost.RANKS,
)
def different_ranks_are_refused(subject: Subject, profile: Profile) -> None:
    settings = subject.settings(num_experts=subject.hidden_size, top_k=2)
    wider = subject.settings(num_experts=subject.hidden_size, top_k=3)
    _expect_refusal(subject, subject, settings, wider, what="another top_k")
    for field, config in other_configs(subject):
        _expect_refusal(subject, subject.with_config(config), settings, settings, what=f"another {field}")


def _expect_refusal(subject: Subject, other: Subject, settings: object, others: object, *, what: str) -> None:
    answers = rank_pool().run(attach_different, (subject, other), (settings, others))
    silent = [rank for rank, answer in enumerate(answers) if not answer]
    if silent:
        raise Violation(
            f"the last rank has {what}, and attach raised nothing on ranks {silent}",
            likely="the router does not keep its config as `self.config`, so nothing tells the two apart",
        )


@book.rule(
    "D06",
    "A route does not depend on the rank that computes it.",
    why="Tensor-parallel and pipeline ranks route the same tokens each for itself, and must agree.",
    bug="About 10 % of routers disagree between two engines: vllm PR 28284, Megatron-LM#4168 (T32).",
    requires=(SENDABLE,),
    cost=Cost.RANKS,
)
def routes_do_not_depend_on_the_rank(subject: Subject, profile: Profile) -> None:
    for layout in _layouts(subject, profile, SHARDS):
        first, *others = rank_pool().run(route_same, subject, layout)
        for rank, routed in enumerate(others, start=1):
            expect_same_bits(routed, first, when=f"on rank {rank} (else: on rank 0)")


@book.rule(
    "D07",
    "Forward talks to other ranks where forward_collective is declared, and then with no tokens too.",
    why="Schedulers skip forwards of empty micro-batches unless they are told that others wait.",
    bug="A collective inside the gate deadlocks ranks without tokens: prime-rl PR 3411, THUDM/slime PR 1010 (T36).",
    requires=(SENDABLE,),
    cost=Cost.RANKS,
)
def forward_talks_as_declared(subject: Subject, profile: Profile) -> None:
    declared = subject.capabilities.forward_collective
    for layout in _layouts(subject, profile, SHARDS[:1]):
        for rank, seen in enumerate(rank_pool().run(collectives_of_forward, subject, layout)):
            if seen and not declared:
                raise Violation(f"forward runs {seen[0]} on rank {rank}, and declares forward_collective=False")
            if declared and len(seen) < 2:
                raise Violation(f"forward runs {len(seen)} collectives on rank {rank} with and without tokens")
