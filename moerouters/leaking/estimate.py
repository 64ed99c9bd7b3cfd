"""The experiment: hold the tokens up to t, draw those after t again and again, and see where token t goes.

A router is a function, so given all tokens up to t the experts A_t of token t depend on the later tokens alone:

    I(A_t; X_>t | X_<=t) = H(A_t | X_<=t) - H(A_t | X) = H(A_t | X_<=t)

The entropy is estimated for one past at a time, over `samples` futures, and averaged over positions and pasts. It is 0
exactly, not about, where no future moves token t.
"""

from __future__ import annotations

from collections import Counter

import torch

from moerouters.capabilities import AssignmentKind
from moerouters.lab.determinism import deterministic
from moerouters.leaking.entropy import entropy_bits, expert_choice_bits, interval_of_mean
from moerouters.leaking.layer import Tokens, experts_of, route, settle
from moerouters.leaking.report import Experiment, PositionLeak, RouterLeak
from moerouters.router import Router


@torch.no_grad()
def measure(router: Router, experiment: Experiment, *, label: str) -> RouterLeak:
    """The leak of one layer in train mode. Every router is shown the same tokens; the same seed gives the same numbers.

    The router learns while it settles, and nothing after.
    """
    router.train()
    at = experiment.at
    entropies: list[list[float]] = []
    distinct = 0
    with deterministic():
        settle(
            router,
            updates=experiment.updates,
            tokens=experiment.tokens,
            generator=torch.Generator().manual_seed(experiment.seed),
        )
        for repeat in range(experiment.repeats):
            # Seeds of their own for the pasts, far from that of the batches that were learned from.
            generator = torch.Generator().manual_seed(experiment.seed + 1_000_003 * (repeat + 1))
            past = Tokens.draw(experiment.tokens, experiment.num_experts, generator)
            seen = [_outcomes(router, past, token, experiment, generator) for token in at]
            entropies.append([entropy_bits(list(counter.values())) for counter in seen])
            distinct = max(distinct, *(len(counter) for counter in seen))
    by_repeat = [sum(row) / len(row) for row in entropies]
    low, high = interval_of_mean(by_repeat)
    promised = router.capabilities
    paired = promised.assignment is AssignmentKind.PAIRS and not promised.causal
    return RouterLeak(
        label=label,
        causal=promised.causal,
        bits=sum(by_repeat) / len(by_repeat),
        low=low,
        high=high,
        distinct=distinct,
        positions=tuple(
            PositionLeak(position=token, bits=sum(column) / len(column))
            for token, column in zip(at, zip(*entropies, strict=True), strict=True)
        ),
        expert_choice_bits=expert_choice_bits(experiment.num_experts, experiment.top_k) if paired else None,
    )


def _outcomes(
    router: Router, past: Tokens, token: int, experiment: Experiment, generator: torch.Generator
) -> Counter[tuple[int, ...]]:
    """How often token t got which experts, over futures."""
    later = experiment.tokens - token - 1
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(experiment.samples):
        future = Tokens.draw(later, experiment.num_experts, generator)
        seen[experts_of(route(router, past.then(token + 1, future)), token)] += 1
    return seen
