"""One layer fed with random tokens: what a router is given, and what it chose for one token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moerouters.capabilities import StateAlgebra
from moerouters.router import Router
from moerouters.types import Assignment, RouteContext

HIDDEN, VOCABULARY = 8, 32768


class Tokens(NamedTuple):
    """Tokens that are independent of each other, and all that a router may look at."""

    logits_TE: Tensor
    token_ids_T: Tensor
    hidden_TD: Tensor

    @classmethod
    def draw(cls, number: int, num_experts: int, generator: torch.Generator) -> Tokens:
        """Logits are normal, plus a popularity from +1 to -1 over the experts: something to balance."""
        return cls(
            torch.randn(number, num_experts, generator=generator) + torch.linspace(1, -1, num_experts),
            torch.randint(VOCABULARY, (number,), generator=generator),
            torch.randn(number, HIDDEN, generator=generator),
        )

    def then(self, first: int, others: Tokens) -> Tokens:
        """The first tokens of these, and the others after them."""
        return Tokens(*(torch.cat([mine[:first], theirs]) for mine, theirs in zip(self, others, strict=True)))


def route(router: Router, tokens: Tokens) -> Assignment:
    """One forward over one sequence. The noise is the same in every call: it is no part of what tokens tell."""
    T = tokens.logits_TE.shape[0]
    ctx = RouteContext(
        sequence_ids_T=torch.zeros(T, dtype=torch.int64),
        num_sequences=1,
        token_ids_T=tokens.token_ids_T,
        hidden_TD=tokens.hidden_TD,
        noise_key=torch.zeros(4, dtype=torch.int64),
    )
    assignment: Assignment = router(tokens.logits_TE, ctx)
    return assignment


def settle(router: Router, *, updates: int, tokens: int, generator: torch.Generator) -> None:
    """Let the router learn from as many batches: what it has committed is not that of a first step."""
    for _ in range(updates):
        assignment = route(router, Tokens.draw(tokens, router.gating.num_experts, generator))
        if assignment.stats and router.capabilities.state is not StateAlgebra.STATELESS:
            router.update(assignment.stats)


def experts_of(assignment: Assignment, token: int) -> tuple[int, ...]:
    """The experts of one token, rising."""
    token_ids_N, expert_ids_N, _ = assignment.pairs()
    own_N = expert_ids_N[(token_ids_N == token) & (expert_ids_N < assignment.num_experts)]
    return tuple(sorted(own_N.tolist()))
