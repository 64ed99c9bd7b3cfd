"""Contract: what an assignment looks like, for every input that is legal."""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters import Assignment, AssignmentKind
from moerouters_conformance.case import Case
from moerouters_conformance.forall import forall
from moerouters_conformance.readings import (
    weights_by_pair,
)
from moerouters_conformance.rule import Group, RuleBook
from moerouters_conformance.strategies import EXTREME, cases
from moerouters_conformance.subject import Subject
from moerouters_conformance.violation import Violation

book = RuleBook(Group.CONTRACT)


@book.rule(
    "C01",
    "The assignment is of the declared kind, and ids and weights have its one shape.",
    why="A dispatcher picks its path by the kind; a shape of another kind is read as other tokens' experts.",
    bug="Expert choice does not fit token-centric interfaces, DeepEP#595, DeepSpeed#2517 (T10).",
)
@forall(lambda subject: cases(subject, masks=True))
def kind_and_shapes(subject: Subject, case: Case) -> None:
    assignment = subject.run(case)
    promise = subject.capabilities
    other_in_eval = promise.eval_assignment is not None and not case.training
    declared = promise.eval_assignment if other_in_eval else promise.assignment
    if assignment.kind is not declared:
        field = "eval_assignment" if other_in_eval else "assignment"
        raise Violation(f"kind is {assignment.kind}, declared is {field}={declared}")
    T, E = len(case.logits), case.settings.num_experts
    ids, weights = assignment.expert_ids, assignment.weights
    if (assignment.num_tokens, assignment.num_experts) != (T, E):
        raise Violation(f"num_tokens={assignment.num_tokens}, num_experts={assignment.num_experts}; T={T}, E={E}")
    legal = {
        AssignmentKind.SLOTS: ids.dim() == 2 and ids.shape[0] == T and ids.shape[1] <= E,
        AssignmentKind.DENSE: tuple(ids.shape) == (T, E),
        AssignmentKind.PAIRS: ids.dim() == 1 and assignment.token_ids_N is not None,
    }
    if not legal[assignment.kind]:
        raise Violation(f"expert_ids have shape {list(ids.shape)} for kind {assignment.kind}, T={T}, E={E}")
    if weights.shape != ids.shape:
        raise Violation(f"weights have shape {list(weights.shape)}, expert_ids {list(ids.shape)}")


@book.rule(
    "C02",
    "Ids, loads and token counts are int64.",
    why="Narrow ids overflow: uint8 at 256 experts, int16 at 32768; narrow counts stop at 2**24 or 2**31.",
    bug="uint8 and uint16 ids overflow for more than 256 experts: ms-swift PR 9981, prime-rl PR 3051 (T33).",
)
@forall(lambda subject: cases(subject, max_tokens=3))
def ids_and_counts_are_int64(subject: Subject, case: Case) -> None:
    assignment = subject.run(case)
    for name in ("expert_ids", "token_ids_N", "load_E", "tokens", "nonfinite"):
        value = getattr(assignment, name)
        if value is not None and value.dtype != torch.int64:
            raise Violation(f"{name} is {value.dtype}")


@book.rule(
    "C03",
    "Expert ids lie in 0..E-1, or are E, which marks an empty place; token ids lie in 0..T-1.",
    why="An id out of range reads another expert's memory in a kernel, or hangs an exchange.",
    bug="Sentinel ids handled as experts under expert parallelism: transformers PR 48689, PR 45473 (T34).",
)
@forall(lambda subject: cases(subject, values=EXTREME, masks=True))
def ids_in_range(subject: Subject, case: Case) -> None:
    assignment = subject.run(case)
    E, T = case.settings.num_experts, len(case.logits)
    expect_in_range("expert_ids", assignment.expert_ids, E)
    if assignment.token_ids_N is not None:
        expect_in_range("token_ids_N", assignment.token_ids_N, T - 1)


def expect_in_range(name: str, ids: Tensor, highest: int) -> None:
    bad = ids[(ids < 0) | (ids > highest)]
    if bad.numel():
        raise Violation(f"{name} holds {bad.flatten()[0].item()}; legal is 0 to {highest}")


@book.rule(
    "C04",
    "No expert stands twice at one token.",
    why="The expert would run twice on the same row and its output would count twice.",
    bug="Ties and masked groups let a top-k loop pick one expert again; transformers#45440 (T20).",
)
@forall(lambda subject: cases(subject, values=EXTREME, masks=True))
def experts_are_distinct(subject: Subject, case: Case) -> None:
    assignment = subject.run(case)
    token_ids_N, expert_ids_N, _ = assignment.pairs()
    seen: set[tuple[int, int]] = set()
    for token, expert in zip(token_ids_N.tolist(), expert_ids_N.tolist(), strict=True):
        if expert < assignment.num_experts and (token, expert) in seen:
            at_token = expert_ids_N[token_ids_N == token].tolist()
            raise Violation(f"expert {expert} stands twice at token {token}: its experts are {at_token}")
        seen.add((token, expert))


@book.rule(
    "C05",
    "An empty place carries weight 0.",
    why="Foreign models run a filler expert at an empty place; only the weight 0 keeps it out of the output.",
    bug="Sentinels with weights give a wrong or NaN router gradient: transformers#48687 (T34).",
)
@forall(lambda subject: cases(subject, values=EXTREME, masks=True))
def empty_places_weigh_nothing(subject: Subject, case: Case) -> None:
    assignment = subject.run(case)
    empty = assignment.expert_ids == assignment.num_experts
    heavy = assignment.weights[empty]
    if bool((heavy != 0).any()):
        raise Violation(f"an empty place carries the weight {heavy[heavy != 0][0].item()}")


@book.rule(
    "C06",
    "load_E counts the ids that are handed out.",
    why="Balancers, metrics and dispatch plans live on the load; a wrong one balances something else.",
    bug="Counters that disagree with the routes: torchtitan PR 1593, Automodel#3325 (T28, T30).",
)
@forall(lambda subject: cases(subject, masks=True))
def load_is_the_count(subject: Subject, case: Case) -> None:
    assignment = subject.run(case)
    counted = [0] * assignment.num_experts
    for _, expert in weights_by_pair(assignment):
        counted[expert] += 1
    if assignment.load_E.tolist() != counted:
        raise Violation(f"load_E is {assignment.load_E.tolist()}, the ids count {counted}")


@book.rule(
    "C07",
    "tokens counts the rows that are neither padding nor non-finite, nonfinite the broken ones.",
    why="Means over tokens, and the error that names the layer whose gate broke, are made of these counts.",
    bug="Losses normalised by another number of tokens than they were summed over: Megatron-LM#7213 (T16).",
)
@forall(lambda subject: cases(subject, masks=True))
def tokens_are_counted(subject: Subject, case: Case) -> None:
    batch = case.batch(subject)
    broken_TE = batch.logits_TE.clone()
    broken_TE[1::3, 0] = float("nan")
    assignment = subject.route(subject.prepared(case), batch.with_logits(broken_TE))
    real = [True] * len(case.logits) if case.valid is None else list(case.valid)
    bad = [t % 3 == 1 for t in range(len(real))]
    expected = {
        "tokens": sum(r and not b for r, b in zip(real, bad, strict=True)),
        "nonfinite": sum(r and b for r, b in zip(real, bad, strict=True)),
    }
    for name, count in expected.items():
        if int(getattr(assignment, name)) != count:
            raise Violation(f"with NaN in rows 1, 4, ..., {name} is {int(getattr(assignment, name))}, not {count}")


@book.rule(
    "C08",
    "A batch without tokens routes nothing, and its losses are finite.",
    why="Ranks run out of tokens in expert-parallel runs; a mean over nothing is NaN and ends the run.",
    bug="Zero-token ranks hang, crash or skip gradients: Automodel PR 3680, pytorch#126616 (T36).",
)
@forall(lambda subject: cases(subject, max_tokens=0), share=0.3)
def no_tokens(subject: Subject, case: Case) -> None:
    assignment = subject.run(case)
    if int(assignment.load_E.sum()) or int(assignment.tokens):
        raise Violation(f"load_E is {assignment.load_E.tolist()}, tokens is {int(assignment.tokens)} with T=0")
    expect_finite_losses(assignment)


@book.rule(
    "C09",
    "Losses are 0-d and finite, whatever the finite logits.",
    why="One NaN loss ends a run; a loss with a shape broadcasts into the training loss.",
    bug="Squared coefficients of variation through std are NaN at balance: vmoe PR 218 (T45).",
)
@forall(lambda subject: cases(subject, values=EXTREME, masks=True, training=True))
def losses_are_finite_scalars(subject: Subject, case: Case) -> None:
    expect_finite_losses(subject.run(case))


def expect_finite_losses(assignment: Assignment) -> None:
    for name, loss in assignment.losses.items():
        if loss.dim() != 0:
            raise Violation(f"losses[{name!r}] has shape {list(loss.shape)}; 0-d was expected")
        if not bool(torch.isfinite(loss)):
            raise Violation(f"losses[{name!r}] is {loss.item()}")


@book.rule(
    "C10",
    "Names, shapes and dtypes of losses and stats are the same in every training forward, also with no tokens.",
    why="Sums over micro-batches and ranks are laid out once, from a forward of zero tokens.",
    bug="A loss list whose length differs per pass leaks and miscounts: megablocks#64, #82 (T29).",
)
@forall(lambda subject: cases(subject, masks=True, training=True))
def stats_have_one_layout(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    some, none = subject.route(router, batch), subject.route(router, batch.rows(slice(0, 0)))
    for kind in ("losses", "stats"):
        given, empty = getattr(some, kind), getattr(none, kind)
        if given.keys() != empty.keys():
            raise Violation(f"{kind} are {sorted(given)}, and {sorted(empty)} with no tokens")
        for name, value in given.items():
            layout, other = (value.dtype, list(value.shape)), (empty[name].dtype, list(empty[name].shape))
            if layout != other:
                raise Violation(
                    f"{kind}[{name!r}] is {layout[0]} {layout[1]}, and {other[0]} {other[1]} with no tokens"
                )


@book.rule(
    "C11",
    "In eval mode there are no losses and no stats.",
    why="What is observed in evaluation would change the next training step.",
    bug="An observation hook ran in eval and changed the next update: torchtitan PR 4412, review (T43).",
)
@forall(lambda subject: cases(subject, training=False), share=0.3)
def eval_observes_nothing(subject: Subject, case: Case) -> None:
    assignment = subject.run(case)
    if assignment.losses or assignment.stats:
        raise Violation(f"in eval mode: losses {sorted(assignment.losses)}, stats {sorted(assignment.stats)}")
