"""How much is active: the share of (token, expert) pairs that are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters import Assignment, Tape


def active_share(assignment: Assignment) -> Tensor:
    """float64 0-d: of the tokens that are neither padding nor broken, the mean part of all experts that they get.

    Before dropping, on the assignment's device; 0 without tokens.
    """
    pairs = (assignment.tokens * assignment.num_experts).double()
    return assignment.load_E.sum() / pairs.clamp_min(1)


def active_shares(tape: Tape) -> dict[str, float]:
    """The same by layer of a model, over the passes that `moerouters.record` wrote down; also of swapped routers.

    Tokens without any expert are padding, and left out.
    """
    shares = {}
    for name, passes in tape.expert_ids.items():
        E = tape.num_experts[name]
        # Of 0 passes nothing is known; their sums are 0.
        active_N = torch.cat([(ids < E).sum(dim=-1).reshape(-1) for ids in passes] or [torch.zeros(0)])
        shares[name] = float(active_N.sum()) / max(int((active_N > 0).sum()) * E, 1)
    return shares
