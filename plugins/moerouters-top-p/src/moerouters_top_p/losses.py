"""The two losses of arXiv:2403.07652, of one forward's tokens. Rows that do not count are False in valid_T."""

from __future__ import annotations

import torch
from torch import Tensor


def dynamic_loss(probabilities_TE: Tensor, valid_T: Tensor) -> Tensor:
    """0-d: mean entropy in nats of the tokens' probabilities, rows that sum to 1; 0 without any token.

    Less entropy means fewer experts to reach p.
    """
    # log of a number that underflowed is -inf, and 0 * inf in backward is NaN.
    logs_TE = probabilities_TE.clamp_min(torch.finfo(probabilities_TE.dtype).tiny).log()
    return -_mean(probabilities_TE * logs_TE, valid_T).sum()


def balance_loss(probabilities_TE: Tensor, load_E: Tensor, valid_T: Tensor) -> Tensor:
    """0-d: E * sum over experts of (share of the routed pairs) * (mean probability); 1 at balance, up to E.

    Shares of pairs, where the paper takes shares of tokens, which sum to the mean number m of experts: its loss is m at
    balance, and its coefficient m times this one.
    """
    E = load_E.shape[0]
    share_E = load_E.to(probabilities_TE.dtype) / load_E.sum().clamp_min(1)
    return E * (share_E * _mean(probabilities_TE, valid_T)).sum()


def _mean(values_TE: Tensor, valid_T: Tensor) -> Tensor:
    """[E]"""
    return torch.where(valid_T.unsqueeze(1), values_TE, 0.0).sum(dim=0) / valid_T.sum().clamp_min(1)
