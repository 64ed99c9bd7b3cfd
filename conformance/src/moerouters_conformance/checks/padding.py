"""Padding and packing: rows that are no tokens matter to nobody, and sequences in one batch do not know each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moerouters import Assignment, Router
from moerouters.gating import GatingSettings
from moerouters_conformance.case import Batch, Case
from moerouters_conformance.forall import forall
from moerouters_conformance.pairs import pairs_of_tokens, renamed_pairs
from moerouters_conformance.readings import (
    expect_close,
    expect_same_bits,
    expect_same_pairs,
    experts_by_token,
    shown,
    state_of,
    tensors_of,
    weights_by_pair,
)
from moerouters_conformance.requirements import BATCH_INVARIANT, LOSSES, NO_NOISE
from moerouters_conformance.rule import Group, RuleBook
from moerouters_conformance.snapshots import readout
from moerouters_conformance.strategies import distinct_cases, gatings
from moerouters_conformance.subject import Subject, blame
from moerouters_conformance.violation import Violation

book = RuleBook(Group.PADDING)
RTOL = 1e-9
"""For weights in float64: another number of rows may change the last bits of vectorised exp and log."""
SUMS_RTOL = 1e-6
"""For losses and stats, which add over tokens in an order that the number of rows changes, in float32 at least."""


def _padded_cases(
    subject: Subject,
    *,
    training: bool | None = None,
    settings: SearchStrategy[GatingSettings] | None = None,
) -> SearchStrategy[Case]:
    """Cases that always have a mask, and in most draws some padding."""

    def mask(case: Case) -> Case:
        return (
            case if case.valid is not None else replace(case, valid=tuple(t % 2 == 0 for t in range(len(case.logits))))
        )

    return distinct_cases(subject, masks=True, training=training, settings=settings).map(mask)


@st.composite
def _square_cases(draw: st.DrawFn, subject: Subject) -> Case:
    """Cases where T is E or K, with at least one row of padding and one token."""
    settings = draw(gatings(subject, min_experts=2, min_k=2))
    T = draw(st.sampled_from([settings.num_experts, settings.top_k]))
    case = draw(distinct_cases(subject, min_tokens=T, max_tokens=T, settings=st.just(settings)))
    valid = draw(st.tuples(*[st.booleans()] * T).filter(lambda mask: any(mask) and not all(mask)))
    return replace(case, valid=valid)


@book.rule(
    "P01",
    "Padding gets no expert.",
    why="Padding that is routed takes capacity, skews loads, and pays for experts that compute nothing.",
    bug="Padding must leave counts, bias, capacity and dispatch: torchtitan PR 4594, Megatron-LM PR 4776 (T24).",
)
@forall(lambda subject: _padded_cases(subject), share=0.3)
def padding_gets_no_expert(subject: Subject, case: Case) -> None:
    assert case.valid is not None
    for token, expert in sorted(weights_by_pair(subject.run(case))):
        if not case.valid[token]:
            raise Violation(f"row {token} is padding, and goes to expert {expert}")


@book.rule(
    "P02",
    "What padding holds changes no route, weight, loss, stat or load.",
    why="Rows of padding hold whatever was there before: a balance that counts them depends on stale memory.",
    bug="Padding in the aux loss: transformers#28505, PR 28517, Megatron-LM#6111 (T24).",
)
@forall(lambda subject: _padded_cases(subject), share=0.5)
def what_padding_holds_does_not_matter(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    expected = subject.route(router, batch)
    for garbage in (float("nan"), float("inf"), 1e4):
        got = subject.route(router, _filled(batch, garbage))
        _expect_same_outcome(got, expected, when=f"with {garbage} and other ids in the rows of padding")


@book.rule(
    "P03",
    "Padding at the end equals no padding.",
    why="Batches are padded to the longest sequence; the loss would depend on who is in the batch.",
    bug="4-D masks and padding in the aux loss: transformers PR 29363, #38910 (T24).",
)
@forall(lambda subject: distinct_cases(subject, max_tokens=4), share=0.5)
def trailing_padding_equals_none(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    T = batch.num_tokens
    expected = subject.route(router, batch)
    for more in (1, 5):
        longer = batch.rows(torch.arange(T + more).clamp(max=T - 1))
        got = subject.route(router, longer.with_context(valid_T=torch.arange(T + more) < T))
        with _unless_the_last_bits_decide(subject, router, batch):
            _expect_same_outcome(got, expected, when=f"with {more} rows of padding after {T} tokens")


@book.rule(
    "P04",
    "Padding anywhere equals the batch without those rows.",
    why="Left-padded prompts and packed batches hold padding everywhere.",
    bug="Padding must leave counts, bias and dispatch: Megatron-LM PR 5542, PR 6114 (T24).",
    requires=(NO_NOISE,),
)
@forall(lambda subject: _padded_cases(subject), share=0.5)
def padding_equals_absence(subject: Subject, case: Case) -> None:
    assert case.valid is not None
    router, batch = subject.prepared(case), case.batch(subject)
    kept = [token for token, valid in enumerate(case.valid) if valid]
    compact = batch.rows(torch.tensor(kept, dtype=torch.int64)).with_context(valid_T=None)
    got, expected = subject.route(router, compact), subject.route(router, batch)
    with _unless_the_last_bits_decide(subject, router, batch):
        _expect_same_outcome(got, expected, when="without the rows of padding", tokens=kept)


@book.rule(
    "P05",
    "A batch of nothing but padding changes no state, and its losses and their gradients are finite.",
    why="The last micro-batch of an epoch, or a rank without data, must not move the balance or end the run.",
    bug="Zero-token ranks crash or skip gradients: Automodel PR 3680, prime-rl PR 3411 (T36).",
)
@forall(lambda subject: distinct_cases(subject, training=True), share=0.5)
def padding_only(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    before = state_of(router)
    logits_TE = batch.logits_TE.clone().requires_grad_()
    nothing = batch.with_logits(logits_TE).with_context(valid_T=torch.zeros(batch.num_tokens, dtype=torch.bool))
    assignment = subject.route(router, nothing)
    for name, loss in assignment.losses.items():
        if not bool(torch.isfinite(loss)):
            raise Violation(f"losses[{name!r}] is {loss.item()} in a batch of padding only")
    for name, gradient in _gradients(router, assignment, {"logits_TE": logits_TE}).items():
        if not bool(torch.isfinite(gradient).all()):
            raise Violation(f"the gradient of {name} is {shown(gradient)} in a batch of padding only")
    subject.update(router, dict(assignment.stats))
    expect_same_bits(state_of(router), before, when="after an update on a batch of padding only")


@book.rule(
    "P06",
    "Padding gets a gradient of exactly zero, and does not change the gradient of the tokens.",
    why="What reaches the rows of padding trains the gate, and the layers below, on nothing.",
    bug="Padding in the aux loss: transformers#28505, Megatron-LM#6111, PR 6114 (T24).",
)
@forall(lambda subject: _padded_cases(subject), share=0.5)
def padding_gets_no_gradient(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    expected = _gradients_of_batch(subject, router, batch)
    got = _gradients_of_batch(subject, router, _filled(batch, 1e4))
    padding_T = ~_valid_T(batch)
    for held, gradients in {"ordinary numbers": expected, "1e4": got}.items():
        for name in ("logits_TE", "hidden_TD"):
            rows = gradients[name][padding_T]
            if bool((rows != 0).any()):
                raise Violation(f"rows of padding, which hold {held}, get the gradient {shown(rows)} in {name}")
    expect_close(
        {f"the gradient of {n}": g for n, g in got.items()},
        {f"the gradient of {n}": g for n, g in expected.items()},
        when="with 1e4 in the rows of padding",
        rtol=SUMS_RTOL,
        atol=1e-9,
    )


@book.rule(
    "P07",
    "NaN or infinity in the rows of padding makes no gradient NaN.",
    why="Attention over nothing leaves NaN in padding; 0 * NaN in a backward pass is NaN, and ends the run.",
    bug="The loss is correct and only the gradient is wrong: transformers#48687 (T34); T24.",
)
@forall(lambda subject: _padded_cases(subject), share=0.5)
def broken_padding_breaks_no_gradient(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    for garbage in (float("nan"), float("inf")):
        for name, gradient in _gradients_of_batch(subject, router, _filled(batch, garbage)).items():
            if not bool(torch.isfinite(gradient).all()):
                raise Violation(
                    f"the gradient of {name} is {shown(gradient)} with {garbage} in the rows of padding",
                    likely="torch.where after the operation that gave NaN: its backward is 0 * NaN; mask the input",
                )


@book.rule(
    "P08",
    "With as many tokens as experts, or as choices, the mask still masks tokens.",
    why="A flat mask broadcasts over the last axis without an error just where T equals its length.",
    bug="A flat mask broadcast on the expert axis: Megatron-LM PR 4776, PR 5542 (T24).",
    requires=(NO_NOISE,),
)
@forall(lambda subject: _square_cases(subject), share=0.5)
def masks_go_by_token(subject: Subject, case: Case) -> None:
    assert case.valid is not None
    router, batch = subject.prepared(case), case.batch(subject)
    kept = [token for token, valid in enumerate(case.valid) if valid]
    compact = batch.rows(torch.tensor(kept, dtype=torch.int64)).with_context(valid_T=None)
    T, E, K = batch.num_tokens, case.settings.num_experts, case.settings.top_k
    when = f"without the rows of padding (T={T}, E={E}, K={K})"
    got, expected = subject.route(router, compact), subject.route(router, batch)
    with _unless_the_last_bits_decide(subject, router, batch):
        _expect_same_outcome(got, expected, when=when, tokens=kept)


@book.rule(
    "P09",
    "A mask without padding equals no mask.",
    why="Collators hand a mask to every batch; whether it is needed must not matter.",
    bug="Results with an all-ones mask differ: transformers PR 28517, #38910 (T24).",
)
@forall(lambda subject: distinct_cases(subject), share=0.3)
def an_empty_mask_equals_none(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    expected = subject.route(router, batch)
    got = subject.route(router, batch.with_context(valid_T=torch.ones(batch.num_tokens, dtype=torch.bool)))
    _expect_same_outcome(got, expected, when="with valid_T all True")


@book.rule(
    "P10",
    "In eval, sequences packed into one batch are routed as alone.",
    why="Packing saves padding; it must not make answers depend on who shares the pack.",
    bug="Logits depend on other samples of the batch: Megatron-Bridge#4635 (T37).",
    requires=(BATCH_INVARIANT,),
)
@forall(lambda subject: distinct_cases(subject, min_tokens=2, masks=True, training=False), share=0.5)
def packed_sequences_are_alone(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    T = batch.num_tokens
    packs = {"one after the other": torch.arange(T) * 2 // T, "interleaved": torch.arange(T) % 2}
    for name, sequence_ids_T in packs.items():
        packed = batch.with_context(sequence_ids_T=sequence_ids_T, num_sequences=2)
        whole = weights_by_pair(subject.route(router, packed))
        for sequence in (0, 1):
            tokens = (sequence_ids_T == sequence).nonzero().flatten()
            # Alone it is the only sequence, number 0.
            alone = batch.rows(tokens).with_context(sequence_ids_T=torch.zeros_like(tokens), num_sequences=1)
            got = renamed_pairs(weights_by_pair(subject.route(router, alone)), tokens.tolist())
            expected = pairs_of_tokens(whole, tokens.tolist())
            when = f"alone, sequence {sequence} of two that were packed {name}"
            expect_same_pairs(got, expected, when=when, rtol=RTOL)


@book.rule(
    "P11",
    "Which sequence padding is said to belong to changes nothing.",
    why="Collators give padding the number 0, or the last one, or one of its own.",
    bug="Padding in per-sequence losses: Megatron-LM#6111, PR 6114 (T24).",
    requires=(LOSSES,),
)
@forall(lambda subject: _padded_cases(subject, training=True), share=0.5)
def padding_is_in_no_sequence(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    sequence_ids_T = torch.arange(batch.num_tokens) % 2
    expected = subject.route(router, batch.with_context(sequence_ids_T=sequence_ids_T, num_sequences=4))
    for number in (0, 3):
        given_T = torch.where(_valid_T(batch), sequence_ids_T, number)
        got = subject.route(router, batch.with_context(sequence_ids_T=given_T, num_sequences=4))
        _expect_same_outcome(got, expected, when=f"with padding in sequence {number}")


def _valid_T(batch: Batch) -> Tensor:
    assert batch.ctx.valid_T is not None
    return batch.ctx.valid_T


def _filled(batch: Batch, garbage: float) -> Batch:
    """The batch with garbage in the logits and hidden states of padding, and with other token ids there."""
    valid_T, ctx = _valid_T(batch), batch.ctx
    assert ctx.token_ids_T is not None and ctx.hidden_TD is not None
    return batch.with_logits(torch.where(valid_T.unsqueeze(1), batch.logits_TE, garbage)).with_context(
        token_ids_T=torch.where(valid_T, ctx.token_ids_T, ctx.token_ids_T + 31),
        hidden_TD=torch.where(valid_T.unsqueeze(1), ctx.hidden_TD, garbage),
    )


def _gradients_of_batch(subject: Subject, router: Router, batch: Batch) -> dict[str, Tensor]:
    """Gradients that all weights and losses give the logits, the hidden states and the router's parameters."""
    assert batch.ctx.hidden_TD is not None
    inputs = {
        "logits_TE": batch.logits_TE.clone().requires_grad_(),
        "hidden_TD": batch.ctx.hidden_TD.to(batch.logits_TE.dtype).requires_grad_(),
    }
    given = batch.with_logits(inputs["logits_TE"]).with_context(hidden_TD=inputs["hidden_TD"])
    return _gradients(router, subject.route(router, given), inputs)


def _gradients(router: Router, assignment: Assignment, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = inputs | {name: parameter for name, parameter in router.named_parameters() if parameter.requires_grad}
    total = readout(assignment)
    if not total.requires_grad:
        return {name: torch.zeros_like(value) for name, value in inputs.items()}
    try:
        found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        raise Violation(f"the backward pass raised {blame(error)}") from error
    return dict(zip(inputs, found, strict=True))


@contextmanager
def _unless_the_last_bits_decide(subject: Subject, router: Router, batch: Batch) -> Iterator[None]:
    """Let a violation pass where rounding alone moves the routes of this batch.

    Where memory ends a vector, exp is rounded otherwise, and where it ends goes by the number of rows. A solver whose
    thresholds are tokens' own scores then breaks its ties otherwise, rightly.
    """
    try:
        yield
    except Violation:
        routes = experts_by_token(subject.route(router, batch))
        random = torch.Generator().manual_seed(0)
        for _ in range(8):
            noise_TE = torch.randn(batch.logits_TE.shape, generator=random, dtype=subject.precise)
            # Far above the rounding of numbers of this size, far below the distance of any two logits.
            nudge = 1e-12 if subject.precise == torch.float64 else 1e-6
            nudged = batch.with_logits(batch.logits_TE + nudge * noise_TE)
            if experts_by_token(subject.route(router, nudged)) != routes:
                return
        raise


def _expect_same_outcome(got: Assignment, expected: Assignment, *, when: str, tokens: list[int] | None = None) -> None:
    """Same pairs, load, counts, losses and stats; row i of `got` is token tokens[i]."""
    pairs = weights_by_pair(got)
    expect_same_pairs(
        renamed_pairs(pairs, tokens) if tokens else pairs, weights_by_pair(expected), when=when, rtol=RTOL
    )
    # Places, empty ones included, may be laid out otherwise; the pairs above are what they say.
    others, wanted = ({n: t for n, t in tensors_of(a).items() if n not in _PLACES} for a in (got, expected))
    expect_close(others, wanted, when=when, rtol=SUMS_RTOL, atol=1e-9)


_PLACES = ("expert_ids", "weights", "token_ids_N")
