"""Symmetry: what must not matter does not - the order of tokens, the names of experts, the size of a batch.

No ties and nothing but float64 here: two ways of computing one thing differ in their last bits, and a tie turns that
into another route. T is a multiple of E, so that balancers find whole places for T * K / E and no threshold falls
onto a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moerouters import Router
from moerouters.gating import GatingSettings
from moerouters_conformance.case import Batch, Case, make_batch, warm_up_logits
from moerouters_conformance.forall import forall
from moerouters_conformance.profile import Profile
from moerouters_conformance.readings import (
    Pairs,
    expect_close,
    expect_same_pairs,
    state_of,
    weights_by_pair,
)
from moerouters_conformance.requirements import CAUSAL, LOSSES, NO_NOISE, NO_TOKEN_IDS, STATE
from moerouters_conformance.rule import Group, Requirement, RuleBook
from moerouters_conformance.strategies import distinct_cases, gatings
from moerouters_conformance.subject import Subject

book = RuleBook(Group.SYMMETRY)

NO_PARAMETERS = Requirement(
    text="parameters=False (its own parameters tell experts apart)", holds=lambda s: not s.capabilities.parameters
)
SHIFT_INVARIANT = ("softmax", "softmax, not renormalised")
"""Families whose scores forget what all logits of a token have in common."""

# float64 sums in another order are off by some 1e-16 of the value; a mean over tokens stays far below this.
TIGHT = 1e-9
# State is float32 and may have been computed in another order.
OF_STATE: dict[str, float] = {"rtol": 1e-5, "atol": 1e-6}


@book.rule(
    "Y01",
    "Tokens in another order go to the same experts with the same weights.",
    why="Where a token stands in a flat batch means nothing; shuffled and packed batches would train other routers.",
    bug="Experts that fill up in token order drop whoever comes late: DeepSpeed#2517, Megatron-LM#1971 (T10).",
    requires=(NO_NOISE,),
)
@forall(lambda subject: distinct_cases(subject, tokens_per_expert=True))
def token_order_moves_no_route(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    expected = weights_by_pair(subject.route(router, batch))
    for name, order_T in _orders(batch.num_tokens).items():
        moved = weights_by_pair(subject.route(router, batch.rows(order_T)))
        back = Pairs({(int(order_T[token]), expert): weight for (token, expert), weight in moved.items()})
        expect_same_pairs(back, expected, when=f"with the tokens {name}", rtol=TIGHT)


@book.rule(
    "Y02",
    "Tokens in another order give the same losses and the same update.",
    why="A mean that weighs early tokens more balances the first tokens of a batch only.",
    bug="Counts and losses over a part of the tokens: Megatron-LM#7213, torchtitan PR 1593 (T16, T28).",
    requires=(NO_NOISE,),
)
@forall(lambda subject: distinct_cases(subject, tokens_per_expert=True, training=True))
def token_order_changes_no_update(subject: Subject, case: Case) -> None:
    batch = case.batch(subject)
    losses, state = _learned_from(subject, subject.prepared(case), batch)
    for name, order_T in _orders(batch.num_tokens).items():
        others, other_state = _learned_from(subject, subject.prepared(case), batch.rows(order_T))
        _expect_same_losses(others, losses, when=f"with the tokens {name}")
        expect_close(other_state, state, when=f"after learning from the tokens {name}", **OF_STATE)


@book.rule(
    "Y03",
    "Experts under other ids get the same tokens with the same weights, before anything is learned.",
    why="Experts are born alike; a router that prefers some ids is a tilt that no balancer was asked for.",
    bug="Ties and group masks that favour low ids: transformers#45440, flashinfer#2168 (T20).",
    requires=(NO_NOISE, NO_TOKEN_IDS, NO_PARAMETERS),
)
@forall(lambda subject: distinct_cases(subject, tokens_per_expert=True, max_warm_up=0, training=_settled(subject)))
def expert_names_do_not_matter(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    expected = weights_by_pair(subject.route(router, batch))
    for name, order_E in _orders(case.settings.num_experts).items():
        renamed = subject.route(router, batch.with_logits(batch.logits_TE[:, order_E]))
        expect_same_pairs(
            _named_back(weights_by_pair(renamed), order_E), expected, when=f"with the experts {name}", rtol=TIGHT
        )


@book.rule(
    "Y04",
    "Experts under other ids get the same tokens after learning from the same history under those ids.",
    why="An update that mixes up experts, or learns for some only, balances whoever happens to have the right id.",
    bug="Biases that are updated for no expert or for the wrong ones: OLMo-core#227, prime-rl PR 2953 (T21).",
    requires=(STATE, NO_NOISE, NO_TOKEN_IDS, NO_PARAMETERS),
)
@forall(
    lambda subject: distinct_cases(subject, tokens_per_expert=True, max_warm_up=0, training=_settled(subject)),
    share=0.5,
)
def learned_names_do_not_matter(subject: Subject, case: Case) -> None:
    batch = case.batch(subject)
    E = case.settings.num_experts
    as_it_is, reversed_E = torch.arange(E), torch.arange(E).flip(0)
    router, other = (_taught(subject, case, order_E) for order_E in (as_it_is, reversed_E))
    expected = weights_by_pair(subject.route(router, batch))
    renamed = weights_by_pair(subject.route(other, batch.with_logits(batch.logits_TE[:, reversed_E])))
    # Learned state is float32, and only its part in a choice shows: weights do not depend on it.
    expect_same_pairs(
        _named_back(renamed, reversed_E),
        expected,
        when="with the experts reversed, and in the three updates before as well",
        rtol=TIGHT,
    )


@book.rule(
    "Y05",
    "Under a softmax a constant added to all logits of a token changes no route and no weight.",
    why="Softmax does not see it, gates drift along it, and a router that looks past the scores follows the drift.",
    bug="Scores of another function than the model's: softmax for a sigmoid model, Megatron-LM#1438 (T19).",
    requires=(NO_NOISE,),
)
@forall(
    lambda subject: distinct_cases(
        subject,
        tokens_per_expert=True,
        training=_settled(subject),
        settings=gatings(subject, min_experts=2, families=SHIFT_INVARIANT),
    )
)
def common_offset_does_not_matter(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    expected = weights_by_pair(subject.route(router, batch))
    offset_T1 = 3.5 * torch.arange(1, batch.num_tokens + 1, dtype=subject.precise).unsqueeze(1)
    for name, shifted_TE in (("added to", batch.logits_TE + offset_T1), ("taken from", batch.logits_TE - offset_T1)):
        got = weights_by_pair(subject.route(router, batch.with_logits(shifted_TE)))
        expect_same_pairs(got, expected, when=f"with 3.5 * (t + 1) {name} all logits of token t", rtol=TIGHT)


@book.rule(
    "Y06",
    "A batch that is repeated goes, both times, where it went alone.",
    why="A choice that depends on the number of tokens is another one in every micro-batch size.",
    bug="Routes that depend on the other samples of a batch: Megatron-Bridge#4635 (T37).",
    requires=(NO_NOISE,),
)
@forall(lambda subject: distinct_cases(subject, tokens_per_expert=True))
def repeated_batch_routes_alike(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    T = batch.num_tokens
    expected = weights_by_pair(subject.route(router, batch))
    both = weights_by_pair(subject.route(router, _twice(batch)))
    for start, name in ((0, "first"), (T, "second")):
        copy = Pairs({(token - start, expert): w for (token, expert), w in both.items() if start <= token < start + T})
        expect_same_pairs(copy, expected, when=f"in the {name} copy of the batch given twice", rtol=TIGHT)


@book.rule(
    "Y07",
    "A batch that is repeated gives the same update as alone.",
    why="A step that grows with the number of tokens has another learning rate in every batch size.",
    bug="Updates from counts that depend on how a batch was split: torchtitan PR 1304, Megatron-LM PR 5349 (T28, T43).",
    requires=(STATE, NO_NOISE),
)
@forall(lambda subject: distinct_cases(subject, tokens_per_expert=True, training=True))
def repeated_batch_teaches_alike(subject: Subject, case: Case) -> None:
    batch = case.batch(subject)
    _, state = _learned_from(subject, subject.prepared(case), batch)
    _, twice = _learned_from(subject, subject.prepared(case), _twice(batch))
    expect_close(twice, state, when="after learning from the batch given twice", **OF_STATE)


@book.rule(
    "Y08",
    "A batch that is repeated has the same losses as alone.",
    why="A loss that sums over tokens outweighs the language model's mean in large batches and vanishes in small ones.",
    bug="Losses normalised by another number of tokens than they were summed over: Megatron-LM#7213 (T16).",
    requires=(LOSSES, NO_NOISE),
)
@forall(lambda subject: distinct_cases(subject, tokens_per_expert=True, training=True))
def repeated_batch_costs_alike(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    alone, twice = subject.route(router, batch), subject.route(router, _twice(batch))
    _expect_same_losses(twice.losses, alone.losses, when="for the batch given twice")


@book.rule(
    "Y09",
    "Sequences under other ids, in a batch that could hold more of them, change no route and no loss.",
    why="Ids only say which tokens belong together; packing hands them out in any order and leaves some out.",
    bug="Sequence-wise losses over flattened or padded batches: transformers PR 28517, Megatron-LM PR 4776 (T24).",
    requires=(NO_NOISE,),
)
@forall(lambda subject: distinct_cases(subject, tokens_per_expert=True, training=True))
def sequence_names_do_not_matter(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    ids_T = (torch.arange(batch.num_tokens) % 3 > 0).long()
    plain = subject.route(router, batch.with_context(sequence_ids_T=ids_T, num_sequences=2))
    other = subject.route(router, batch.with_context(sequence_ids_T=3 - 2 * ids_T, num_sequences=5))
    when = "with the sequences 0 and 1 called 3 and 1, of 5"
    expect_same_pairs(weights_by_pair(other), weights_by_pair(plain), when=when, rtol=TIGHT)
    _expect_same_losses(other.losses, plain.losses, when=when)


@book.rule(
    "Y10",
    "One update learns for an expert what it learns for the same expert under another id, at 130 experts too.",
    why="Remainders, bit masks and histograms are places where an id sneaks into what should go by load alone.",
    bug="Id arithmetic that is right up to 64 or 256 experts: ms-swift PR 9981, prime-rl PR 3051 (T33).",
    # A solver's thresholds may be tokens' own values, whose ties fall by id; Y04 looks at what it learns.
    requires=(STATE, CAUSAL, NO_NOISE, NO_TOKEN_IDS, NO_PARAMETERS),
)
def updates_follow_names(subject: Subject, profile: Profile) -> None:
    _names_follow_in_small(subject, profile)
    # More experts than bits in a word, and unlike loads.
    batch = make_batch(warm_up_logits(0, 130, tokens=40).double(), hidden_size=subject.hidden_size)
    _expect_named_state(subject, subject.settings(num_experts=130, top_k=2), batch, where="with 130 experts")


@forall(lambda subject: distinct_cases(subject, max_warm_up=0, training=True), share=0.5)
def _names_follow_in_small(subject: Subject, case: Case) -> None:
    _expect_named_state(subject, case.settings, case.batch(subject), where="with the experts reversed")


def _expect_named_state(subject: Subject, settings: GatingSettings, batch: Batch, *, where: str) -> None:
    """State per expert after an update on a batch, and on the same batch with the experts reversed, is reversed."""
    E = settings.num_experts
    order_E = torch.arange(E).flip(0)
    router, other = subject.build(settings).train(), subject.build(settings).train()
    _, expected = _learned_from(subject, router, batch.with_logits(batch.logits_TE.to(subject.precise)))
    _, found = _learned_from(subject, other, batch.with_logits(batch.logits_TE[:, order_E].to(subject.precise)))
    own = {name for name in router.state_names() if expected[name].shape[:1] == (E,)}
    renamed = {name: found[name][order_E] for name in own}
    expect_close(renamed, {name: expected[name] for name in own}, when=f"{where} and read back", rtol=1e-5, atol=1e-7)


def _settled(subject: Subject) -> bool | None:
    """Modes in which no tie decides. A router that solves over its batch may put a threshold on a token, as BIP does in
    its published form: that token's best experts tie exactly, and its rounding or their ids decide. What it commits is
    free of that, so the solution is looked at in eval mode."""
    return None if subject.capabilities.causal else False


def _orders(size: int) -> dict[str, Tensor]:
    """Two orders that together leave no pattern alone: reversed, and one place further."""
    return {"reversed": torch.arange(size).flip(0), "moved on by one place": torch.arange(size).roll(1)}


def _expect_same_losses(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, when: str) -> None:
    """As tight as the losses' own dtype allows."""
    exact = all(loss.dtype == torch.float64 for loss in expected.values())
    expect_close(actual, expected, when=when, rtol=TIGHT if exact else 1e-5, atol=1e-12 if exact else 1e-7)


def _named_back(pairs: Pairs, order_E: Tensor) -> Pairs:
    """Pairs of a batch whose column i was expert order_E[i]."""
    return Pairs({(token, int(order_E[expert])): weight for (token, expert), weight in pairs.items()})


def _twice(batch: Batch) -> Batch:
    return batch.rows(torch.arange(batch.num_tokens).repeat(2))


def _learned_from(subject: Subject, router: Router, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The losses of one forward, and the state after its update."""
    assignment = subject.route(router, batch)
    subject.update(router, dict(assignment.stats))
    return dict(assignment.losses), state_of(router)


def _taught(subject: Subject, case: Case, order_E: Tensor) -> Router:
    """The case's router after three updates on batches whose experts stand in another order."""
    E, dtype = case.settings.num_experts, case.logits_TE.dtype
    router = subject.build(case.settings).train()
    for step in range(3):
        # A multiple of every E up to 6: no threshold on a token, and no sum that rounds into a tie.
        logits_TE = warm_up_logits(step, E, tokens=60).to(dtype)[:, order_E]
        _learned_from(subject, router, make_batch(logits_TE, hidden_size=subject.hidden_size))
    return router.train(case.training)
