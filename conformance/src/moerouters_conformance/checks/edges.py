"""Contract at the edges: sizes, layouts, dtypes and modes that routers are not tried with and meet all the same."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis.strategies import SearchStrategy

from moerouters.gating import GatingSettings
from moerouters_conformance.case import Case, make_batch, warm_up_logits
from moerouters_conformance.checks.contract import book, expect_finite_losses, expect_in_range
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
from moerouters_conformance.strategies import cases, distinct_cases, gatings
from moerouters_conformance.subject import Subject
from moerouters_conformance.violation import Violation

WIDE = {"float16": torch.float32, "bfloat16": torch.float32, "float32": torch.float32, "float64": torch.float64}


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
    expect_in_range("expert_ids", assignment.expert_ids, 1)
    expect_finite_losses(assignment)
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
    expect_in_range("expert_ids", assignment.expert_ids, case.settings.num_experts)
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
