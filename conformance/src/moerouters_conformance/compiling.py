"""Comparing a compiled router with the same one in eager mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moerouters import Assignment, Router
from moerouters_conformance.case import Batch
from moerouters_conformance.readings import expect_close, experts_by_token, tensors_of
from moerouters_conformance.snapshots import logits_gradient, quiet
from moerouters_conformance.subject import Subject, blame
from moerouters_conformance.violation import Violation

BACKEND_BITS = 1e-12
"""aot_eager runs the operations of eager mode on float64; a decomposition may round its last bits otherwise."""


def well_separated_logits(num_tokens: int, num_experts: int) -> Tensor:
    """[T, E] whose rows are permutations of levels 0.5 apart, with small offsets, so that no two rows are equal."""
    random = torch.Generator().manual_seed(3)
    order_TE = torch.rand(num_tokens, num_experts, generator=random).argsort(dim=1)
    offsets_TE = torch.rand(num_tokens, num_experts, generator=random)
    return (order_TE - num_experts / 2) * 0.5 + offsets_TE * 0.1


def compare_compiled(
    subject: Subject, batch: Batch, *, training: bool, backend: str, tolerance: float, may_differ: float
) -> None:
    """Raise Violation unless the compiled router takes the batch in one graph and chooses and weighs as in eager.

    may_differ: share of tokens whose experts may be others; losses, stats and gradients are then left uncompared.
    """
    mode = f"compiled by {backend}, in {'training' if training else 'eval'}"
    router = subject.build(subject.settings(num_experts=batch.logits_TE.shape[1], top_k=2))
    subject.warm_up(router, 3)
    router.train(training)
    expected, gradient_TE = _run(router, router, batch, mode="in eager mode")
    torch._dynamo.reset()
    try:
        with quiet():
            compiled = torch.compile(router, fullgraph=True, backend=backend)
            actual, actual_gradient_TE = _run(compiled, router, batch, mode=mode)
    finally:
        torch._dynamo.reset()
    routes, others = experts_by_token(expected), experts_by_token(actual)
    moved = [token for token in range(batch.num_tokens) if routes[token] != others[token]]
    if len(moved) > may_differ * batch.num_tokens:
        token = moved[0]
        raise Violation(
            f"{mode}, {len(moved)} of {batch.num_tokens} tokens go elsewhere; token {token} to {others[token]}, "
            f"else to {routes[token]}"
        )
    if moved:
        return
    # Slots of one token may stand in another order where scores are within rounding, so weights go by expert.
    found = tensors_of(actual) | {"weights": _by_expert(actual), "gradient of logits_TE": actual_gradient_TE}
    wanted = tensors_of(expected) | {"weights": _by_expert(expected), "gradient of logits_TE": gradient_TE}
    for name in ("expert_ids", "token_ids_N"):
        found.pop(name, None)
        wanted.pop(name, None)
    for name, value in wanted.items():
        # Sums over thousands of tokens that nearly cancel are off by rounding of their terms, not of the sum.
        largest = float(value.double().abs().max()) if value.numel() else 0.0
        pair = ({name: found[name]}, {name: value}) if name in found else (found, wanted)
        expect_close(*pair, when=mode, rtol=tolerance, atol=tolerance * max(0.01, largest))


def _run(call: Callable[..., Assignment], router: Router, batch: Batch, *, mode: str) -> tuple[Assignment, Tensor]:
    """The assignment, and in training the gradient that the logits get of all weights and losses."""
    logits_TE = batch.logits_TE.clone().requires_grad_(router.training)
    try:
        assignment = call(logits_TE, batch.ctx)
        gradient_TE = logits_gradient(assignment, logits_TE) if router.training else torch.zeros_like(logits_TE)
    except Exception as error:
        raise Violation(f"{type(router).__name__} {mode} raised {blame(error)}") from error
    return assignment, gradient_TE


def _by_expert(assignment: Assignment) -> Tensor:
    """[T, E] weights."""
    token_ids_N, expert_ids_N, weights_N = assignment.pairs()
    T, E = assignment.num_tokens, assignment.num_experts
    table = weights_N.new_zeros(T, E + 1).index_put((token_ids_N, expert_ids_N), weights_N, accumulate=True)
    return table[:, :E].detach()
