"""A dispatcher of a plugin: it lets the built-in all_to_all fly, and counts."""

from typing import Any

from torch import Tensor

from moerouters.dispatch.all_to_all import AllToAllDispatcher
from moerouters.dispatch.base import Arrival, Pending
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.site import Site


class Pigeon:
    """Carries tokens there and back."""

    replicated = False

    def __init__(self, *, site: Site) -> None:
        self.site, self.flights = site, 0
        self._inner = AllToAllDispatcher(site)

    @property
    def num_ranks(self) -> int:
        return self.site.num_ranks

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Arrival]:
        self.flights += 1
        return self._inner.dispatch(x_TD, plan)

    def combine(self, y_RD: Tensor, arrival: Any, weights: Tensor) -> Pending[Tensor]:
        self.flights += 1
        return self._inner.combine(y_RD, arrival, weights)
