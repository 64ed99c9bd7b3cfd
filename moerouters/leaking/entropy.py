"""Entropy in bits from counts, and the interval of a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 2000


def entropy_bits(counts: Sequence[int]) -> float:
    """Of a distribution that was drawn from sum(counts) times; 0 exactly where one outcome was seen.

    The plug-in estimate is too small by about (outcomes - 1) / (2 draws) nats, which is added (Miller and Madow, 1955).
    No estimate from n draws sees more than about log2(n) bits.
    """
    draws = sum(counts)
    plug_in = sum(count / draws * math.log2(draws / count) for count in counts)
    return plug_in + (len(counts) - 1) / (2 * draws * math.log(2))


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95% of means over values drawn again (percentile bootstrap, Efron 1979); always the same draws."""
    taken = np.asarray(values, dtype=float)
    redrawn = np.random.default_rng(0).choice(taken, (DRAWS, taken.size)).mean(axis=1)
    low, high = np.percentile(redrawn, [2.5, 97.5])
    return float(low), float(high)


def expert_choice_bits(num_experts: int, top_k: int) -> float | None:
    """K log2((1 - R) / R) with R = K / E: the figure of arXiv:2408.15664 for expert choice, per token and layer.

    Each expert takes the share R of the tokens, so one token's row of the assignment can carry E h(R) bits, h the
    binary entropy; this is the part of it that the paper states. None from R = 1/2 on, where it is not above 0.
    """
    share = top_k / num_experts
    return top_k * math.log2((1 - share) / share) if share < 0.5 else None
