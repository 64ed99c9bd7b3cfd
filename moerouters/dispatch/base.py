"""The contract of a dispatcher back-end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.site import Site

T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """Something that is under way. What is computed before `wait` overlaps with the communication."""

    def wait(self) -> T_co:
        """The result. Called once."""
        ...


@dataclass(frozen=True)
class Ready(Generic[T_co]):
    """Nothing to wait for."""

    value: T_co

    def wait(self) -> T_co:
        return self.value


@dataclass(frozen=True)
class Later(Generic[T_co]):
    """The rest of the work, to be done when the result is wanted."""

    finish: Callable[[], T_co]

    def wait(self) -> T_co:
        return self.finish()


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """Rows that reached this rank's experts."""

    x_RD: Tensor
    """Rows grouped by expert. Those past load_e.sum() are padding, their content is undefined."""
    load_e: Tensor
    """int64 [e], rows of each expert on this rank; on the CPU where it is the same for every batch."""
    plan: DispatchPlan
    way_back: Any = None
    """What the back-end remembers of the way here."""


class Dispatcher(Protocol):
    """Brings rows to experts and results back. Differentiable in x, y and weights.

    Every rank of the group calls both methods equally often and in the same order, also with no tokens.
    """

    @property
    def num_ranks(self) -> int:
        """Over how many ranks the experts are split."""
        ...

    @property
    def replicated(self) -> bool:
        """Whether every rank of the group holds the same tokens (a tensor-parallel group) and not its own."""
        ...

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Arrival]:
        """Start to bring tokens to the experts that the plan names."""
        ...

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Pending[Tensor]:
        """Start to bring results back: y_TD = for every token the sum of weight * row over its pairs.

        `weights` is in the assignment's shape. The result is in the weights' dtype (float32 sums of bf16 rows).
        """
        ...


class OverRanks:
    """What every back-end over the ranks of a Site has in common; by default they hold different tokens."""

    replicated = False
    slices = 1
    """Over how many ranks each expert is cut; these hold the same tokens."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @property
    def num_ranks(self) -> int:
        """Over how many ranks the experts are split."""
        return self.site.num_ranks
