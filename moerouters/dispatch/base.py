"""The contract of a dispatcher back-end."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moerouters.dispatch.plan import DispatchPlan


class Dispatcher(Protocol):
    """Brings rows to experts and results back. Differentiable in x, y and weights."""

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
        """(x_RD, load_e): rows of this rank's experts, grouped by expert, and how many each has (int64).

        Rows past load_e.sum() are padding, their content is undefined.
        """
        ...

    def combine(self, y_RD: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
        """y_TD = for every token the sum of weight * row over its pairs. `weights` is in the assignment's shape."""
        ...
