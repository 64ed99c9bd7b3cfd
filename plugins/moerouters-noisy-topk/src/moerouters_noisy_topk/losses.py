"""Importance and load of experts as differentiable numbers, and the loss of both (arXiv:1701.06538, Eq. 6 to 11).

Rows that do not count are False in valid_T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters import Gating
from moerouters.gating import take_along_experts


def importance(weights_TK: Tensor, expert_ids_TK: Tensor, valid_T: Tensor, num_experts: int) -> Tensor:
    """[E]: the combine weights of each expert, summed over tokens. The id E marks an empty slot."""
    weights_TK = torch.where(valid_T.unsqueeze(1), weights_TK, 0.0)
    sums = weights_TK.new_zeros(num_experts + 1)
    return sums.index_add(0, expert_ids_TK.reshape(-1), weights_TK.reshape(-1))[:num_experts]


def expected_load(logits_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, valid_T: Tensor, gating: Gating) -> Tensor:
    """[E]: the number of tokens that each expert would get if its own noise were drawn anew, that of the others kept.

    P(x, i) = Phi((logit_i - kth_excluding(noisy, K, i)) / std_i) summed over tokens, where kth_excluding is the K-th
    largest of the other experts: the (K+1)-th of all for one that is chosen, the K-th for one that is not. Needs K < E.
    std_TE: above 0, [T, E] or 0-d.
    """
    K = gating.top_k
    noisy_TE = torch.where(valid_T.unsqueeze(1), noisy_TE, 0.0)
    ids = gating.top(noisy_TE.detach(), K + 1)
    border_T2 = take_along_experts(noisy_TE, ids[:, K - 1 :])
    last_in_T1, first_out_T1 = border_T2[:, :1], border_T2[:, 1:]
    bar_TE = torch.where(noisy_TE > first_out_T1, first_out_T1, last_in_T1)
    logits_TE = torch.where(valid_T.unsqueeze(1), logits_TE, 0.0)
    chance_TE = torch.special.ndtr((logits_TE - bar_TE) / std_TE)
    return torch.where(valid_T.unsqueeze(1), chance_TE, 0.0).sum(dim=0)


def squared_variation(values_E: Tensor) -> Tensor:
    """0-d: the squared coefficient of variation, variance over squared mean (population form); 0 where all are 0.

    Straight from the variance: the gradient of its root is infinite at balance.
    """
    return values_E.var(correction=0) / (values_E.mean().square() + 1e-10)
