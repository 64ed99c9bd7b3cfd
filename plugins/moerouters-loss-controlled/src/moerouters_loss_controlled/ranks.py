"""The load of this forward over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(load_E: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A new int64 [E] summed over `group` (None: the world); load_E itself where torch.distributed does not run.

    A collective: every rank of the group calls it, also with no tokens. Under torch.no_grad() it is left out, on all
    ranks alike: nothing can be differentiated there, and a layer that is being built on one rank must not wait.
    """
    if not torch.is_grad_enabled() or not (dist.is_available() and dist.is_initialized()):
        return load_E
    total_E = load_E.clone()
    dist.all_reduce(total_E, group=group)  # torch.compile traces it as a functional collective
    return total_E
