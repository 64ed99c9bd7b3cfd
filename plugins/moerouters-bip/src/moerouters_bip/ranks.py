"""What several ranks know together: sums and maxima over those that hold other tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from moerouters.errors import DispatchError


@dataclass(frozen=True)
class Ranks:
    """Every method is a collective: all ranks call them equally often and in the same order, also without tokens.

    With alone=True there are no others, and nothing is sent. Raises DispatchError where another rank died or is late.
    """

    group: dist.ProcessGroup | None = None
    """None: the world."""
    alone: bool = False

    def sum(self, values: Tensor) -> Tensor:
        """A new tensor, or the same one if alone."""
        return self._reduced(values, largest=False)

    def max(self, values: Tensor) -> Tensor:
        """A new tensor, or the same one if alone."""
        return self._reduced(values, largest=True)

    def _reduced(self, values: Tensor, *, largest: bool) -> Tensor:
        if self.alone:
            return values
        result = values.clone()
        try:
            # torch.compile traces it as a functional collective
            dist.all_reduce(result, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=self.group)
        except RuntimeError as error:
            raise DispatchError(
                "the router 'bip' could not balance over all ranks: its all-reduce failed.",
                where=f"rank {dist.get_rank(self.group)} of {dist.get_world_size(self.group)}",
                why=str(error).strip().partition("\n")[0],
                fix="look for the rank that raised, was killed or is late; all ranks route equally often in training",
            ) from error
        return result


ALONE = Ranks(alone=True)


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """The ranks of `group` (None: the world), or ALONE where torch.distributed does not run or the group has one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return ALONE
    return Ranks(group)
