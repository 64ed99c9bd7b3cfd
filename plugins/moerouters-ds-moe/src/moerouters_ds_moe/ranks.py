"""Sums over the tokens of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def over_ranks(sums: Tensor, tokens: Tensor, *, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Both summed over `group` (None: the world), as they are where torch.distributed does not run.

    A collective: every rank of the group calls it, also without tokens. No gradient crosses ranks: this rank's part
    gets it times the number of ranks, so that their mean, which data parallelism takes, is the gradient of the sum.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return sums, tokens
    everyone = torch.cat([sums.detach().double(), tokens.double().unsqueeze(0)])
    dist.all_reduce(everyone, group=group)  # torch.compile traces it as a functional collective
    own = sums * dist.get_world_size(group)
    return everyone[:-1].to(sums.dtype) + (own - own.detach()), everyone[-1].to(sums.dtype)
