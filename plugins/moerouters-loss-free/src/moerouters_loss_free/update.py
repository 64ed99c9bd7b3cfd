"""Algorithm 1 of arXiv:2408.15664: from the load of one step to the step of the bias.

With c_i the tokens of expert i and E experts, the violation is e_i = mean(c) - c_i. Here everything starts from
E * e_i = sum(c) - E * c_i, which is an integer, so no sign ever flips by rounding. Floats would round the counts first:
bfloat16 to multiples of 256 from 32768 tokens on, float32 to even numbers from 2**24 on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def violation(load_E: Tensor) -> Tensor:
    """int64 [E]: E times (mean load - load); positive where an expert got too few tokens, 0 without any token."""
    return load_E.sum() - load_E.shape[0] * load_E


def sign_step(load_E: Tensor) -> Tensor:
    """float32 [E] in {-1, 0, 1}: up where an expert got too few tokens, down where it got too many."""
    return violation(load_E).sign().to(torch.float32)


def error_step(load_E: Tensor) -> Tensor:
    """float32 [E] in [1 - E, 1]: (mean load - load) / mean load; zeros without any token.

    Relative, since raw counts would dwarf scores between 0 and 1. float32 is named: the quotient of integers would
    take torch's default dtype, which may be bfloat16.
    """
    return violation(load_E).to(torch.float32) / load_E.sum().clamp_min(1).to(torch.float32)


def centred(step_E: Tensor) -> Tensor:
    """[E] the step without its mean over experts, so that the mean of the bias stays where it is."""
    return step_E - step_E.mean()
