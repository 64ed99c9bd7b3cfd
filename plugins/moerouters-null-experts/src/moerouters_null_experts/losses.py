"""The balance loss as functions of tensors: 0-d, without its coefficient.

    f_i = E / (slots in all) * (slots of expert i)       P_i = mean over tokens of the probability of i
    loss = sum_i f_i P_i                                 1 when balanced, up to E when collapsed

AdaMoE (arXiv:2406.13233, section 3.2): where the gate has null experts, each of them counts with the mean load of all
of them. They do the same, so nothing is gained by balancing one against the other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shared_load(load_E: Tensor, slots: Tensor, *, num_real: int, dtype: torch.dtype) -> Tensor:
    """[E] of `dtype`: load_E with its last E - num_real entries, if any, at an equal part of the slots left over.

    load_E: int64; slots: int64 0-d, in all. What real experts did not take, null ones did.
    """
    real_N, num_null = load_E[:num_real], load_E.shape[0] - num_real
    if num_null == 0:
        return load_E.to(dtype)
    left = (slots - real_N.sum()).clamp_min(0).to(dtype)
    return torch.cat([real_N.to(dtype), (left / num_null).expand(num_null)])


def balance_loss(load_E: Tensor, probabilities_TE: Tensor, valid_T: Tensor) -> Tensor:
    """sum_i f_i P_i of loads in the dtype of the probabilities; 0 where nothing was routed."""
    tiny = torch.finfo(load_E.dtype).tiny  # a sum of counts is 0, or 1 at least
    fraction_E = load_E * load_E.shape[0] / load_E.sum().clamp_min(tiny)
    probability_E = (probabilities_TE * valid_T.unsqueeze(1)).sum(dim=0) / valid_T.sum().clamp_min(1)
    return (fraction_E * probability_E).sum()
