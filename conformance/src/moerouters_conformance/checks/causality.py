"""Causality, where it is declared: a token's route depends on no later token in training, on no neighbour in eval.

Sums and products of one token's own numbers come in one order whatever the batch, so the tolerance in float64 only has
to cover what vectorised exp and log round otherwise at the end of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters import Router
from moerouters_conformance.case import Batch, Case
from moerouters_conformance.forall import forall
from moerouters_conformance.pairs import pairs_of_tokens, renamed_pairs
from moerouters_conformance.readings import Pairs, expect_same_pairs, shown, weights_by_pair
from moerouters_conformance.requirements import BATCH_INVARIANT, CAUSAL
from moerouters_conformance.rule import Group, RuleBook
from moerouters_conformance.strategies import distinct_cases
from moerouters_conformance.subject import Subject
from moerouters_conformance.violation import Violation

book = RuleBook(Group.CAUSALITY)
RTOL = 1e-9


@book.rule(
    "A01",
    "In training no later token of the batch changes a token's experts or weights.",
    why="A decoder that looks ahead in training learns from what it will not have when it generates.",
    bug="Routers that solve over the batch they route leak the future: expert choice, arXiv:2202.09368, section 6.",
    requires=(CAUSAL,),
)
@forall(lambda subject: distinct_cases(subject, min_tokens=2, max_tokens=5, masks=True, training=True))
def later_tokens_change_nothing(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    whole = weights_by_pair(subject.route(router, batch))
    for cut in sorted({1, batch.num_tokens // 2, batch.num_tokens - 1}):
        first = slice(0, cut)
        expected = pairs_of_tokens(whole, range(cut))
        alone = weights_by_pair(subject.route(router, batch.rows(first)))
        expect_same_pairs(alone, expected, when=f"with tokens {cut} and later cut off", rtol=RTOL)
        followed = weights_by_pair(subject.route(router, _with_other_tokens_from(batch, cut)))
        early = pairs_of_tokens(followed, range(cut))
        expect_same_pairs(early, expected, when=f"with other tokens from {cut} on", rtol=RTOL)


@book.rule(
    "A02",
    "In eval a token's experts and weights do not depend on the tokens beside it.",
    why="Otherwise answers change with the load of the server, and no result can be repeated.",
    bug="Logits depend on other samples of the batch: Megatron-Bridge#4635 (T37).",
    requires=(BATCH_INVARIANT,),
)
@forall(lambda subject: distinct_cases(subject, min_tokens=2, masks=True, training=False), share=0.5)
def neighbours_change_nothing(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    whole = weights_by_pair(subject.route(router, batch))
    T = batch.num_tokens
    for name, kept in {"every other token": list(range(1, T, 2)), "the last token first": [T - 1, 0]}.items():
        got = weights_by_pair(subject.route(router, batch.rows(torch.tensor(kept))))
        _expect_tokens(got, whole, kept, when=f"in a batch of {name}")
    among_others = weights_by_pair(subject.route(router, _with_other_tokens_from(batch, 1)))
    _expect_tokens(pairs_of_tokens(among_others, [0]), whole, [0], when="among other tokens")


@book.rule(
    "A03",
    "In eval, decoding token by token gives what one pass over all tokens gives.",
    why="Generation with a cache must continue the text that the prompt's pass began.",
    bug="Training and inference apply the bias otherwise: Megatron-LM PR 6802, review (T43).",
    requires=(BATCH_INVARIANT,),
)
@forall(lambda subject: distinct_cases(subject, max_tokens=5, training=False), share=0.5)
def decoding_equals_the_full_pass(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    _expect_chunks(subject, router, batch, [1] * batch.num_tokens, when="decoded by itself")


@book.rule(
    "A04",
    "In eval, a prompt taken in chunks of any size goes where it goes in one piece.",
    why="Servers cut prompts into chunks as it suits their load.",
    bug="Routers disagree between prefill and training: Megatron-LM#4168, vllm PR 28284 (T32).",
    requires=(BATCH_INVARIANT,),
)
@forall(lambda subject: distinct_cases(subject, min_tokens=3, max_tokens=7, training=False), share=0.4)
def chunks_equal_the_full_pass(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    T = batch.num_tokens
    for size in sorted({2, T - 1}):
        sizes = [size] * (T // size) + ([T % size] if T % size else [])
        _expect_chunks(subject, router, batch, sizes, when=f"in a chunk of at most {size}")


@book.rule(
    "A05",
    "No gradient flows from a token's weights to another token that must not matter to it.",
    why="A value that looks causal may still be trained by the future, through a straight-through term.",
    requires=(CAUSAL,),
)
@forall(lambda subject: distinct_cases(subject, min_tokens=2, training=True), share=0.5)
def no_gradient_into_the_future(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    logits_TE = batch.logits_TE.clone().requires_grad_()
    token_ids_N, _, weights_N = subject.route(router, batch.with_logits(logits_TE)).pairs()
    slopes_N = torch.linspace(1, 2, weights_N.numel(), dtype=weights_N.dtype)
    for token in range(batch.num_tokens - 1):
        own = torch.where(token_ids_N == token, weights_N * slopes_N, 0.0).sum()
        if not own.requires_grad:
            return
        (gradient_TE,) = torch.autograd.grad(
            own, logits_TE, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        reached = [later for later in range(token + 1, batch.num_tokens) if bool((gradient_TE[later] != 0).any())]
        if reached:
            raise Violation(
                f"the weights of token {token} have the gradient {shown(gradient_TE[reached[0]])} "
                f"with respect to the logits of token {reached[0]}"
            )


def _with_other_tokens_from(batch: Batch, first: int) -> Batch:
    """The batch, and three tokens more, with everything about the tokens from `first` on replaced; none is padding."""
    T, ctx = batch.num_tokens, batch.ctx
    rows = torch.cat([torch.arange(T), torch.zeros(3, dtype=torch.int64)])
    longer = batch.rows(rows)
    other_T = torch.arange(T + 3) >= first
    # Far from anything that was drawn, and in another order of experts.
    other_TE = 3 - 2 * longer.logits_TE.flip(1) + torch.arange(T + 3).unsqueeze(1) * 0.37
    fields: dict[str, Tensor] = {}
    assert longer.ctx.token_ids_T is not None and longer.ctx.hidden_TD is not None
    fields["token_ids_T"] = torch.where(other_T, longer.ctx.token_ids_T + 1000, longer.ctx.token_ids_T)
    fields["hidden_TD"] = torch.where(other_T.unsqueeze(1), 5 - longer.ctx.hidden_TD, longer.ctx.hidden_TD)
    if ctx.valid_T is not None:
        assert longer.ctx.valid_T is not None
        fields["valid_T"] = longer.ctx.valid_T | other_T
    logits_TE = torch.where(other_T.unsqueeze(1), other_TE, longer.logits_TE)
    return longer.with_logits(logits_TE).with_context(**fields)


def _expect_chunks(subject: Subject, router: Router, batch: Batch, sizes: list[int], *, when: str) -> None:
    whole = weights_by_pair(subject.route(router, batch))
    start = 0
    for size in sizes:
        got = weights_by_pair(subject.route(router, batch.rows(slice(start, start + size))))
        _expect_tokens(got, whole, list(range(start, start + size)), when=when)
        start += size


def _expect_tokens(got: Pairs, whole: Pairs, tokens: list[int], *, when: str) -> None:
    """got: pairs of a batch whose row i is token tokens[i] of the whole; compared under the whole batch's numbers."""
    expect_same_pairs(renamed_pairs(got, tokens), pairs_of_tokens(whole, tokens), when=when, rtol=RTOL)
