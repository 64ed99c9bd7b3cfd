"""The losses as functions of tensors: 0-d, without their coefficients.

    f_i = E / (routed pairs) * (pairs of expert i)      1 everywhere when balanced; integers, so it has no gradient
    P_i = mean over tokens of the probability of i      carries the gradient
    loss = sum_i f_i P_i                                1 when balanced, up to E when collapsed

This is Eq. 2 of arXiv:2408.15664, where every token has K experts and routed pairs are K T. Dividing by the pairs
themselves keeps the balanced value at 1 also where slots stay empty. Padding enters neither f nor P nor a count.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_fraction(load_BE: Tensor, dtype: torch.dtype) -> Tensor:
    """f, [..., E] of `dtype`, from int64 loads [..., E]; zeros where nothing was routed."""
    pairs_B1 = load_BE.sum(dim=-1, keepdim=True).clamp_min(1)
    return load_BE.to(dtype) * load_BE.shape[-1] / pairs_B1.to(dtype)


def mean_probability(probabilities_TE: Tensor, valid_T: Tensor) -> Tensor:
    """P, [E]: the mean over valid tokens; zeros without any."""
    return (probabilities_TE * valid_T.unsqueeze(1)).sum(dim=0) / valid_T.sum().clamp_min(1)


def balance_loss(fraction_E: Tensor, probability_E: Tensor) -> Tensor:
    """sum_i f_i P_i over the last axis."""
    return (fraction_E * probability_E).sum(dim=-1)


def sequence_loss(
    probabilities_TE: Tensor, choices_TK: Tensor, valid_T: Tensor, sequence_ids_T: Tensor, num_sequences: int
) -> Tensor:
    """The balance loss of each sequence for itself, averaged over the sequences that have a valid token.

    choices_TK: the expert ids that f counts; E marks an empty slot. sequence_ids_T: in [0, num_sequences) where valid.
    """
    B, E = num_sequences, probabilities_TE.shape[1]
    rows_T = torch.where(valid_T, sequence_ids_T, B)  # one more row takes the padding
    sums_BE = probabilities_TE.new_zeros(B + 1, E).index_add(0, rows_T, probabilities_TE)[:B]
    tokens_B = count_pairs(rows_T, torch.zeros_like(rows_T).unsqueeze(1), B, 1).squeeze(1)
    probability_BE = sums_BE / tokens_B.clamp_min(1).unsqueeze(1)
    fraction_BE = load_fraction(count_pairs(rows_T, choices_TK, B, E), probability_BE.dtype)
    return balance_loss(fraction_BE, probability_BE).sum() / (tokens_B > 0).sum().clamp_min(1)


def z_loss(logits_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Mean over valid tokens of logsumexp(logits) ** 2 (ST-MoE, arXiv:2202.08906, Eq. 5); 0 without any."""
    squares_T = logits_TE.logsumexp(dim=-1).square()
    return (squares_T * valid_T).sum() / valid_T.sum().clamp_min(1)


def count_pairs(rows_T: Tensor, ids_TK: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """int64 [num_rows, num_columns]: how often each (row, id) occurs; the row num_rows and the id num_columns are bins
    for what counts nowhere. Integers in one flat scatter: exact, and deterministic on every device."""
    width = num_columns + 1
    flat_N = (rows_T.unsqueeze(1) * width + ids_TK).reshape(-1)
    counts = torch.zeros((num_rows + 1) * width, dtype=torch.int64, device=flat_N.device)
    counts = counts.scatter_add(0, flat_N, torch.ones_like(flat_N))
    return counts.reshape(num_rows + 1, width)[:num_rows, :num_columns]
