"""The mutual-information loss (arXiv:2404.05567, Eq. 4 and 5), without its coefficient.

    p(e) = mean over tokens of p(e|x);  H(p) = -sum_e p_e log p_e
    L = -H(p(e)) + mean over tokens of H(p(e|x)) = -I(e; x)

From -log E (one-hot tokens, spread evenly over the experts) to 0 (every token the same distribution, whichever it is).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pool = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From (sums over these tokens, how many they are) to those over all tokens that count."""

_LEAST = 1e-20
"""Below it p log p is at most 5e-19, and the slope of the logarithm stays finite."""


def entropy(p: Tensor) -> Tensor:
    """In nats, over the last axis."""
    return -(p * p.clamp_min(_LEAST).log()).sum(dim=-1)


def mutual_information_loss(probabilities_TE: Tensor, valid_T: Tensor, pool: Pool) -> Tensor:
    """0-d. Rows that are not valid count nowhere, and are finite; 0 without any tokens."""
    p_TE = torch.where(valid_T.unsqueeze(1), probabilities_TE, 0.0)
    # The entropy of the mean is no sum over ranks, so what is pooled is what it is made of.
    sums, tokens = pool(torch.cat([p_TE.sum(dim=0), entropy(p_TE).sum().unsqueeze(0)]), valid_T.sum())
    means = sums / tokens.clamp_min(1)
    return means[-1] - entropy(means[:-1])
