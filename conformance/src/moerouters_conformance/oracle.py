"""What a gating says, worked out for one token at a time in plain floats.

Slow and short. It takes settings as data and shares no code with moerouters or torch, so that a mistake in either shows
as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moerouters.gating import GatingSettings


def scores(settings: GatingSettings, logits: Sequence[float]) -> list[float]:
    """One token's score of every expert."""
    cap = settings.soft_cap
    capped = [x if cap is None else cap * math.tanh(x / cap) for x in logits]
    match settings.score:
        case "softmax":
            return _softmax(capped)
        case "sigmoid":
            return [_sigmoid(x) for x in capped]
        case "sqrtsoftplus":
            return [math.sqrt(max(x, 0.0) + math.log1p(math.exp(-abs(x)))) for x in capped]
        case "relu":
            return [max(x, 0.0) for x in capped]
        case "identity":
            return capped


def weights(settings: GatingSettings, logits: Sequence[float], chosen: Sequence[int]) -> list[float]:
    """The combine weights of one token's chosen experts, in their order."""
    if not chosen:
        return []
    of_chosen = [scores(settings, logits)[expert] for expert in chosen]
    if settings.softmax_after_topk:
        of_chosen = _softmax(of_chosen)
    if settings.renormalize:
        total = sum(of_chosen) + settings.eps
        of_chosen = [score / total for score in of_chosen]
    return [score * settings.scale for score in of_chosen]


def choose(settings: GatingSettings, adjusted: Sequence[float]) -> list[int]:
    """One token's K highest adjusted scores inside its kept groups, rising ids."""
    size = settings.num_experts // settings.num_groups
    group_scores = []
    for group in range(settings.num_groups):
        members = sorted(adjusted[group * size : (group + 1) * size], reverse=True)
        group_scores.append(members[0] if settings.group_score == "max" else members[0] + members[1])
    kept = highest(group_scores, settings.kept_groups)
    open_ids = [expert for expert in range(settings.num_experts) if expert // size in kept]
    return sorted(open_ids[place] for place in highest([adjusted[e] for e in open_ids], settings.top_k))


def highest(values: Sequence[float], count: int) -> list[int]:
    """Places of the highest values, falling; among equal values the lower place comes first."""
    return sorted(range(len(values)), key=lambda place: (-values[place], place))[:count]


def _softmax(values: Sequence[float]) -> list[float]:
    peak = max(values)
    powers = [math.exp(x - peak) for x in values]
    total = sum(powers)
    return [power / total for power in powers]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
