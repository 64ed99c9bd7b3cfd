"""The three losses of DeepSeek-V2 (arXiv:2405.04434, Eq. 23 to 31) as functions of tensors: 0-d, without coefficients.

    f_i   = E / (K T) * (tokens of expert i)              P_i = mean over tokens of the probability of i
    expert          sum_i f_i P_i
    device          sum_d f'_d P'_d                       f'_d = mean of f_i on d,   P'_d = sum of P_i on d
    communication   sum_d f''_d P'_d                      f''_d = D / (M T) * (tokens sent to d)

f, f' and f'' come from integers and carry no gradient, P does. K T are the routed pairs, T the valid tokens: padding
enters neither. Each loss is 1 at perfect balance, `communication` where every token reaches exactly M devices. With all
tokens at one expert `expert` is E, `device` D, and `communication` D / M.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mean_probability(probabilities_TE: Tensor, valid_T: Tensor) -> Tensor:
    """P, [E]: the mean over valid tokens; zeros without any."""
    return (probabilities_TE * valid_T.unsqueeze(1)).sum(dim=0) / valid_T.sum().clamp_min(1)


def expert_loss(load_E: Tensor, probability_E: Tensor) -> Tensor:
    """load_E: int64 tokens per expert."""
    return (_fraction(load_E, probability_E.dtype) * probability_E).sum()


def device_loss(load_E: Tensor, probability_E: Tensor, num_devices: int) -> Tensor:
    """load_E: int64 tokens per expert; experts stand on devices in equal, contiguous blocks."""
    fraction_D = _fraction(load_E.reshape(num_devices, -1).sum(dim=-1), probability_E.dtype)
    return (fraction_D * _per_device(probability_E, num_devices)).sum()


def communication_loss(sent_TD: Tensor, probability_E: Tensor, *, tokens: Tensor, most: int) -> Tensor:
    """sent_TD: bool, the devices each token is sent to; tokens: int64 0-d, valid ones; most: M."""
    num_devices = sent_TD.shape[1]
    received_D = sent_TD.sum(dim=0).to(probability_E.dtype) * num_devices
    fraction_D = received_D / (most * tokens).clamp_min(1).to(probability_E.dtype)
    return (fraction_D * _per_device(probability_E, num_devices)).sum()


def _fraction(load_N: Tensor, dtype: torch.dtype) -> Tensor:
    """N times each share of the load; 1 everywhere when balanced, zeros where nothing was routed.

    Over devices that is the mean of f over a device's experts, (D / E) * sum f_i.
    """
    return load_N.to(dtype) * load_N.shape[0] / load_N.sum().clamp_min(1).to(dtype)


def _per_device(probability_E: Tensor, num_devices: int) -> Tensor:
    return probability_E.reshape(num_devices, -1).sum(dim=-1)
