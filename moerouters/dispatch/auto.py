"""The `auto` back-end: whichever of the others costs least for the first batch, kept from then on."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters.dispatch.base import Arrival, Dispatcher, OverRanks, Pending
from moerouters.dispatch.cost import Sizes, Speeds, costs, default_speeds
from moerouters.dispatch.local import LocalDispatcher
from moerouters.dispatch.names import built_in
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.site import Site

_log = logging.getLogger("moerouters")


class AutoDispatcher(OverRanks):
    """all_to_all, all_gather or padded, by the model of moerouters/dispatch/cost.py; never one that asks for the same
    tokens on all ranks. In a group of one rank, local.

    Ranks agree at the first forward: the costs of the rank with most tokens count. The choice is kept, and the group's
    first rank logs it. padded is chosen only where all ranks have the same capacity at that time; later batches must
    keep to that then. speeds: what `measure(group)` of that module found; None for what is assumed of the device:

        layer.set_dispatcher(AutoDispatcher(Site(group, layer="layer", backend="auto"), speeds=measure(group)))
    """

    def __init__(self, site: Site, *, speeds: Speeds | None = None) -> None:
        super().__init__(site)
        self.speeds = speeds
        self.chosen: str | None = None
        """Name of the back-end; None before the first forward."""
        self._dispatcher: Dispatcher | None = None

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Arrival]:
        if self._dispatcher is None:
            self._dispatcher = self._choose(x_TD, plan)
        return self._dispatcher.dispatch(x_TD, plan)

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Pending[Tensor]:
        assert self._dispatcher is not None, "what arrived was dispatched"
        return self._dispatcher.combine(y_RD, arrival, weights)

    def _choose(self, x_TD: Tensor, plan: DispatchPlan) -> Dispatcher:
        if self.num_ranks == 1:
            self.chosen = "local"
            return LocalDispatcher()
        seconds = self._agreed_costs(x_TD, plan)
        self.chosen = min(seconds, key=lambda name: seconds[name])
        if self.site.rank == 0:
            modelled = ", ".join(f"{name} {1000 * s:.3g} ms" for name, s in seconds.items() if math.isfinite(s))
            layer = f"layer '{self.site.layer}': " if self.site.layer else ""
            _log.info("%sdispatcher %s (modelled for a step: %s)", layer, self.chosen, modelled)
        return built_in(self.chosen, replace(self.site, backend=self.chosen))

    def _agreed_costs(self, x_TD: Tensor, plan: DispatchPlan) -> dict[str, float]:
        """Seconds by back-end, the same numbers on every rank: the largest of all ranks."""
        sizes = Sizes(
            num_ranks=self.num_ranks,
            tokens=plan.num_tokens,
            pairs=plan.order_N.numel(),
            num_experts=plan.num_experts,
            width=x_TD.shape[1],
            bytes_per_element=x_TD.element_size(),
            capacity=plan.capacity,
        )
        own = costs(sizes, self.speeds or default_speeds(x_TD.device))
        capacity = -1 if plan.capacity is None else plan.capacity
        largest = torch.tensor([*own.values(), capacity, -capacity], dtype=torch.float64, device=x_TD.device)
        with self.site.guarded("the choice of a back-end"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.site.group)
        *seconds, most, least = largest.tolist()
        agreed = dict(zip(own, seconds, strict=True))
        if most != -least:
            agreed["padded"] = math.inf
        return agreed
