"""How much of the future experts that choose among tokens tell, in bits per token and layer.

Where experts choose, a token's experts depend on tokens after it. A decoder that is trained so can read in its routes
what it is to predict. Two numbers say how bad that is:

* `largest_leak`: what routes can carry at most, so what a gate could learn to send back through them (arXiv:2408.15664:
  more than K log2((1 - R) / R) bits, R = K / E).
* `measured_leak`: what the routes of given tokens tell about a future that is drawn at random.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from moerouters import Router


def largest_leak(*, top_k: int, num_experts: int) -> float:
    """E * H(K / E) bits, H the entropy of a yes or no: every expert freely picks a share K / E of very many tokens.

    It is more than K log2((1 - R) / R), R = K / E, which is its first part, the other one being -E log2(1 - R).
    """
    R = top_k / num_experts
    return 0.0 if R >= 1 else -num_experts * (R * math.log2(R) + (1 - R) * math.log2(1 - R))


@torch.no_grad()
def measured_leak(router: Router, past_TE: Tensor, futures: Iterable[Tensor]) -> float:
    """Mean over the tokens of past_TE of the entropy of their set of experts, in bits, over futures [T', E] after them.

    Past and future together fix the routes, so what is not fixed by the past is what they tell of the future. The
    entropy is that of the counts: at most log2(number of futures), and 0 for a causal router. Waits for the device.
    """
    draws = [_sets(router, torch.cat([past_TE, future_TE]))[: past_TE.shape[0]] for future_TE in futures]
    return sum(_entropy(Counter(sets)) for sets in zip(*draws, strict=True)) / max(past_TE.shape[0], 1)


def _sets(router: Router, logits_TE: Tensor) -> list[tuple[int, ...]]:
    ids_TK, _ = router(logits_TE).with_slots()
    return [tuple(row) for row in ids_TK.sort(dim=1).values.tolist()]


def _entropy(counts: Counter[tuple[int, ...]]) -> float:
    total = counts.total()
    return sum(n / total * math.log2(total / n) for n in counts.values())
