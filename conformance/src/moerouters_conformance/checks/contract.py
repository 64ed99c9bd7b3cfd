"""Contract: what an assignment looks like, for every input that is legal."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moerouters import Assignment, AssignmentKind
from moerouters.gating import GatingSettings
from moerouters_conformance.case import Case, make_batch, warm_up_logits
from moerouters_conformance.forall import forall
from moerouters_conformance.profile import Profile
from moerouters_conformance.readings import (
    expect_same_bits,
    expect_same_pairs,
    experts_by_token,
    tensors_of,
    weights_by_pair,
)
from moerouters_conformance.requirements import FIXED_SLOTS, FOLLOWS_SCORES, STATE
from moerouters_conformance.rule import Group, RuleBook
from moerouters_conformance.strategies import EXTREME, cases, distinct_cases, gatings
from moerouters_conformance.subject import Subject
from moerouters_conformance.violation import Violation

book = RuleBook(Group.CONTRACT)
WIDE = {"float16": torch.float32, "bfloat16": torch.float32, "float32": torch.float32, "float64": torch.float64}


@book.rule(
    "C01",
    "The assignment is of the declared kind, and ids and weights have its one shape.",
    why="A dispatcher picks its path by the kind; a shape of another kind is read as other tokens' experts.",
    bug="Expert choice does not fit token-centric interfaces, DeepEP#595, DeepSpeed#2517 (T10).",
)
@forall(lambda subject: cases(subject, masks=True))
def kind_and_shapes(subject: Subject, case: Case) -> None:
    assignment = subject.run(case)
    declared = subject.capabilities.assignment
    if assignment.kind is not declared:
        raise Violation(f"kind is {assignment.kind}, declared is assignment={declared}")
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
    _in_range("expert_ids", assignment.expert_ids, E)
    if assignment.token_ids_N is not None:
        _in_range("token_ids_N", assignment.token_ids_N, T - 1)


def _in_range(name: str, ids: Tensor, highest: int) -> None:
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
    _finite_losses(assignment)


@book.rule(
    "C09",
    "Losses are 0-d and finite, whatever the finite logits.",
    why="One NaN loss ends a run; a loss with a shape broadcasts into the training loss.",
    bug="Squared coefficients of variation through std are NaN at balance: vmoe PR 218 (T45).",
)
@forall(lambda subject: cases(subject, values=EXTREME, masks=True, training=True))
def losses_are_finite_scalars(subject: Subject, case: Case) -> None:
    _finite_losses(subject.run(case))


def _finite_losses(assignment: Assignment) -> None:
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


@book.rule(
    "C12",
    "With K = E every token gets every expert, and the update leaves finite state.",
    why="There is no (K+1)-th score: a threshold read from nowhere is garbage, and the state keeps it.",
    bug="Quantile balancing asserts on sizes that do not divide: Megatron-LM PR 5349 (T43).",
    requires=(FIXED_SLOTS,),
)
@forall(lambda subject: cases(subject, settings=_all_experts(subject), min_tokens=1, training=True))
def all_experts(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    assignment = subject.route(router, case.batch(subject))
    E = case.settings.num_experts
    for token, experts in enumerate(experts_by_token(assignment)):
        if experts != list(range(E)):
            raise Violation(f"token {token} goes to {experts} with K = E = {E}")
    subject.update(router, dict(assignment.stats))
    for name, value in router.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise Violation(f"{name} is {value.tolist()} after an update with K = E = {E}")


@book.rule(
    "C13",
    "One expert is routed to as the only one there is.",
    why="A dense model is a MoE with one expert; formulas with E - 1 divide by zero there.",
)
@forall(lambda subject: cases(subject, settings=gatings(subject, max_experts=1, max_k=1), training=True), share=0.3)
def one_expert(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    assignment = subject.route(router, case.batch(subject))
    _in_range("expert_ids", assignment.expert_ids, 1)
    _finite_losses(assignment)
    subject.update(router, dict(assignment.stats))
    for name, value in router.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise Violation(f"{name} is {value.tolist()} after an update with E = 1")


@book.rule(
    "C14",
    "Ids above 255 and above 65535 are handed out as they are.",
    why="Ids that wrap around send tokens to experts that nobody chose, without an error.",
    bug="uint8 and uint16 ids overflow: ms-swift PR 9981, prime-rl PR 3051, NeMo-RL PR 3113 (T33).",
    requires=(FOLLOWS_SCORES,),
)
def many_experts(subject: Subject, profile: Profile) -> None:
    for E in (300, 70000):
        router = subject.build(subject.settings(num_experts=E, top_k=2)).eval()
        logits_TE = torch.full((2, E), -20.0)
        logits_TE[0, [E - 1, E - 3]] = torch.tensor([5.0, 3.0])
        logits_TE[1, [E - 2, 1]] = torch.tensor([5.0, 3.0])
        assignment = subject.route(router, make_batch(logits_TE, hidden_size=subject.hidden_size))
        chosen, expected = experts_by_token(assignment), [[E - 3, E - 1], [1, E - 2]]
        if chosen != expected:
            raise Violation(f"with E={E} the two highest scores of each token stand at {expected}, it chose {chosen}")


@book.rule(
    "C15",
    "Logits may be laid out in any way: transposed, strided, expanded.",
    why="A kernel that assumes contiguous rows reads other tokens' logits, without an error.",
    bug="Silent corruption from layouts that a kernel did not expect: DeepSpeed PR 8195 (T39).",
)
@forall(lambda subject: distinct_cases(subject))
def any_layout(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    expected = subject.route(router, batch)
    logits_TE = batch.logits_TE
    wide = torch.full((logits_TE.shape[0] * 2, logits_TE.shape[1] * 2), 77.0, dtype=logits_TE.dtype)
    wide[::2, ::2] = logits_TE
    layouts = {"transposed": logits_TE.t().contiguous().t(), "strided": wide[::2, ::2]}
    for name, laid_out in layouts.items():
        got = subject.route(router, batch.with_logits(laid_out))
        # Vectorised exp and log may round the last bit otherwise where memory is strided.
        expect_same_pairs(weights_by_pair(got), weights_by_pair(expected), when=f"with {name} logits", rtol=1e-9)


@book.rule(
    "C16",
    "Logits of every declared dtype are taken; weights come in float32, or float64 for float64.",
    why="Weights rounded to bfloat16 have 8 bits; sums over experts drift away from 1.",
    bug="Router outputs in the model's narrow dtype: Megatron-LM#1482, sglang PR 31213 (T18).",
)
@forall(lambda subject: cases(subject, max_tokens=4))
def every_declared_dtype(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    for dtype in sorted(subject.capabilities.dtypes):
        narrow_TE = batch.logits_TE.to(getattr(torch, dtype))
        assignment = subject.route(router, batch.with_logits(narrow_TE))
        if assignment.weights.dtype != WIDE[dtype]:
            raise Violation(f"weights are {assignment.weights.dtype} for {dtype} logits; {WIDE[dtype]} was expected")
        wide = subject.route(router, batch.with_logits(narrow_TE.to(WIDE[dtype])))
        expect_same_bits(tensors_of(assignment), tensors_of(wide), when=f"with {dtype} logits, not widened before")


@book.rule(
    "C17",
    "Under autocast the assignment has the same bits as without.",
    why="bfloat16 inside the router makes scores tie and loads round: other experts than in evaluation.",
    bug="bfloat16 counters flip the sign of a bias update: Megatron-LM PR 7081 (T17).",
)
@forall(lambda subject: cases(subject, masks=True))
def autocast_changes_nothing(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    expected = tensors_of(subject.route(router, batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = tensors_of(subject.route(router, batch))
    expect_same_bits(got, expected, when="under autocast to bfloat16")


@book.rule(
    "C18",
    "Rows with NaN or infinite logits get legal ids, and leave the other tokens' routes alone.",
    why="Without it one broken row poisons a whole batch, or hangs an exchange, before anybody can report it.",
    bug="NaN logits give ids out of range in top-k kernels: vllm PR 55514 (T31).",
)
@forall(lambda subject: distinct_cases(subject, min_tokens=2))
def broken_rows_stay_alone(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    broken_TE = batch.logits_TE.clone()
    broken_TE[1, 0] = float("nan")
    assignment = subject.route(router, batch.with_logits(broken_TE))
    _in_range("expert_ids", assignment.expert_ids, case.settings.num_experts)
    for name, stat in assignment.stats.items():
        if stat.is_floating_point() and not bool(torch.isfinite(stat).all()):
            raise Violation(f"stats[{name!r}] is {stat.tolist()} with NaN in row 1")
    infinite_TE = broken_TE.clone()
    infinite_TE[1, :] = float("inf")
    other = subject.route(router, batch.with_logits(infinite_TE))
    healthy = [token for token in range(batch.num_tokens) if token != 1]
    routes, others = experts_by_token(assignment), experts_by_token(other)
    for token in healthy:
        if routes[token] != others[token]:
            raise Violation(
                f"token {token} goes to {routes[token]} with NaN in row 1, and to {others[token]} with infinity there"
            )


@book.rule(
    "C19",
    "Forced ids are used as they are: nothing is selected, and nothing observed.",
    why="Replay and recompute must repeat a route bit by bit; learning from it would count tokens twice.",
    bug="Routers disagree between sampler and trainer: Megatron-LM#4168, vllm PR 28284 (T32).",
)
@forall(lambda subject: cases(subject, min_tokens=1, training=True))
def forced_ids_are_kept(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    E, K = case.settings.num_experts, case.settings.top_k
    forced_TK = (torch.arange(batch.num_tokens).unsqueeze(1) + torch.arange(K)) % E
    assignment = subject.route(router, replace(batch, ctx=replace(batch.ctx, forced_ids_TK=forced_TK)))
    if assignment.expert_ids.tolist() != forced_TK.tolist():
        raise Violation(f"forced_ids_TK = {forced_TK.tolist()}, expert_ids are {assignment.expert_ids.tolist()}")
    if assignment.stats:
        raise Violation(f"forced ids were observed: stats {sorted(assignment.stats)}")


@book.rule(
    "C20",
    "It routes under torch.no_grad and torch.inference_mode.",
    why="Serving runs there; a router that needs autograd cannot be deployed.",
)
@forall(lambda subject: cases(subject, training=False), share=0.3)
def routes_without_autograd(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    expected = tensors_of(subject.route(router, batch))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            got = tensors_of(subject.route(router, batch))
            expect_same_bits(got, expected, when=f"under torch.{type(mode).__name__}")


@book.rule(
    "C21",
    "State is float32, whatever torch's default dtype was when the router was built.",
    why="Model loaders build models under set_default_dtype(bfloat16); a bias in bfloat16 never learns.",
    bug="Expert bias silently in bfloat16: 238 biases collapse to 8 values, Megatron-LM#1482 (T18).",
    requires=(STATE,),
)
def state_ignores_the_default_dtype(subject: Subject, profile: Profile) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = subject.build(subject.settings(num_experts=4, top_k=2))
    finally:
        torch.set_default_dtype(before)
    for step in range(2):
        batch = make_batch(warm_up_logits(step, 4), hidden_size=subject.hidden_size)
        subject.update(router, dict(subject.route(router.train(), batch).stats))
    for name in router.state_names():
        dtype = router.get_buffer(name).dtype
        if dtype not in (torch.float32, torch.float64, torch.int64):
            raise Violation(f"{name} is {dtype} in a router built under set_default_dtype(bfloat16)")


def _all_experts(subject: Subject) -> SearchStrategy[GatingSettings]:
    return gatings(subject, max_experts=5).map(lambda s: s.model_copy(update={"top_k": s.num_experts}))
