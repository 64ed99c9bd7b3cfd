"""The rule that holds the budget: from the load of one step to the step of the biases (LongCat-Flash, section 2.1).

    db_i = mu * (K_e / K * 1 / N - T_i / (K T))     for the N real experts, T_i tokens of T; 0 for null experts

K_e = (1 - null_share) K is the wanted number of real experts per token. Each real expert is driven to K_e T / N tokens,
so their sum keeps the budget and they are balanced among each other. The step here is relative, 1 - T_i / (K_e T / N):
mu = rate * K N / K_e. A null expert's bias stands still, which anchors the others: they do not drift.
"""

from __future__ import annotations

import torch
from torch import Tensor


def budget_step(load_E: Tensor, tokens: Tensor, *, num_real: int, wanted: float) -> Tensor:
    """float64 [E]: up where a real expert got less than wanted * tokens / num_real, down where it got more.

    load_E: int64, of which the first num_real are real; tokens: int64 0-d. Zeros for null experts, and without tokens.
    """
    target = (wanted / num_real) * tokens.clamp_min(1).double()
    step_E = 1 - load_E.double() / target
    real_E = torch.arange(load_E.shape[0], device=load_E.device) < num_real
    return torch.where(real_E & (tokens > 0), step_E, 0.0)
