"""Sinkhorn's iteration on the log of the plan (S-BASE, arXiv:2202.01169; Sinkhorn distances, arXiv:1306.0895).

Entropy-regularised balanced assignment of n tokens to E experts, for logits l and a temperature:

    max  sum_te P_te l_te + temperature * H(P)   subject to   sum_e P_te = 1   and   sum_t P_te = n / E

Its solution is P_te = exp((l_te - a_t - b_e) / temperature), and Sinkhorn finds the potentials by normalising rows and
columns in turn:

    a_t = temperature * log sum_e exp((l_te - b_e) / temperature)
    b_e = temperature * log sum_t exp((l_te - a_t) / temperature)  + a constant, which keeps the mean of b at 0

The K largest P of a token are the K largest l - b, so b, one number per expert, is all that has to be kept. Nothing is
exponentiated but differences to a maximum: no logit is too large, and there is no epsilon to take part in a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPINION = 1 - 2.0**-10
"""Factor on the potentials that are found. Where a batch holds one token, or one token repeated, the plan is uniform,
and l - b the same for all experts up to rounding; with a thousandth of b left out the logits decide."""


def sinkhorn_potential(
    logits_TE: Tensor, potential_E: Tensor, *, iterations: int, temperature: float, valid_T: Tensor | None = None
) -> Tensor:
    """b after `iterations` normalisations that start at potential_E; [E], in the dtype of the logits.

    logits_TE: float32 or float64, finite where valid_T (bool [T], None: everywhere) is True and never read elsewhere.
    Without any token potential_E comes back. No gradient, no host synchronisation.
    """
    start_E = potential_E.to(logits_TE.dtype)
    if logits_TE.shape[0] == 0:
        return start_E
    if valid_T is None:
        valid_T = torch.ones(logits_TE.shape[0], dtype=torch.bool, device=logits_TE.device)
    found_E: Tensor = _potential(logits_TE.detach(), start_E.detach(), valid_T, iterations, temperature)
    return found_E


@torch.library.custom_op("moerouters_sinkhorn::potential", mutates_args=())
def _potential(logits_TE: Tensor, start_E: Tensor, valid_T: Tensor, iterations: int, temperature: float) -> Tensor:
    """One operator for tracers: unrolled, 8 iterations kept inductor busy for over two minutes (two loaded cores)."""
    valid_T1 = valid_T.unsqueeze(1)
    scaled_TE = torch.where(valid_T1, logits_TE, 0.0) / temperature
    b_E = start_E / temperature
    for _ in range(iterations):
        rows_TE = (scaled_TE - b_E).log_softmax(dim=1)
        columns_E = torch.where(valid_T1, rows_TE, -float("inf")).logsumexp(dim=0) + b_E
        b_E = columns_E - columns_E.mean()
    return torch.where(valid_T.any(), b_E * (temperature * OPINION), start_E)


@_potential.register_fake
def _(logits_TE: Tensor, start_E: Tensor, valid_T: Tensor, iterations: int, temperature: float) -> Tensor:
    return torch.empty_like(start_E)
