"""The `mesh3d` back-end: ranks in three dimensions, data x expert x model (Du et al., arXiv:2405.15052, Table 1).

Experts are spread over the axis `expert`, and each of them over the axis `model`; tokens travel along `expert` only.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from moerouters.dispatch.all_to_all import AllToAllDispatcher
from moerouters.dispatch.base import Arrival, Later, OverRanks, Pending
from moerouters.dispatch.exchange import AllGather, EnterRegion, GatherRegion, ReduceScatter, ScatterRegion, start
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.replicas import ReplicaCheck
from moerouters.dispatch.site import Site
from moerouters.errors import ConfigError


class Mesh3dDispatcher(OverRanks):
    """Ranks along `data` and `expert` hold different tokens, those along `model` the same ones.

    Each rank along `model` sends a slice of a row's columns to the ranks of its expert. There those along `model`
    gather whole rows, each computes its slice of the expert (`moerouters.mesh_experts`), and each sends its columns of
    their sum back. Nothing travels along `data`: gradients of experts are to be reduced over it.

    The width of a row is a multiple of the ranks along `model`. The gradients of inputs and of the gate are whole on
    each of these; an auxiliary loss, which they compute alike, counts once.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        if site.mesh is None or site.mesh.ndim != 3:
            raise ConfigError(
                "the mesh3d back-end needs a mesh of three dimensions.",
                where=str(site),
                why="experts are spread over the second and cut over the third",
                fix="shard_experts(model, init_device_mesh(device, (data, expert, model), mesh_dim_names=...))",
            )
        self.expert, self.model = (
            replace(site, group=site.mesh.get_group(axis), backend=f"{site.backend}, along {name}", mesh=None)
            for axis, name in ((1, "expert"), (2, "model"))
        )
        self.slices = self.model.num_ranks
        self._whole_rows = AllToAllDispatcher(self.expert)
        self._expect_same_tokens = ReplicaCheck(site, replicas=self.model, others=self.expert)

    @property
    def num_ranks(self) -> int:
        """Over how many ranks the experts are split: along `expert` and `model`."""
        return self.expert.num_ranks * self.slices

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Arrival]:
        if self.slices == 1:
            return self._whole_rows.dispatch(x_TD, plan)
        self._expect_same_tokens(x_TD, plan)
        own_columns = start(self._by_columns(x_TD), ScatterRegion(self.model)).wait()
        coming = self._whole_rows.dispatch(own_columns, plan)

        def arrive() -> Arrival:
            arrival = coming.wait()
            columns = start(arrival.x_RD, AllGather(self.model)).wait()
            return replace(arrival, x_RD=self._whole(columns))

        return Later(arrive)

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Pending[Tensor]:
        if self.slices == 1:
            return self._whole_rows.combine(y_RD, arrival, weights)
        weights = start(weights, EnterRegion(self.model)).wait()
        own_columns = start(self._by_columns(y_RD), ReduceScatter(self.model)).wait()
        home = self._whole_rows.combine(own_columns, arrival, weights)
        return Later(lambda: self._whole(start(home.wait(), GatherRegion(self.model)).wait()))

    def _by_columns(self, rows: Tensor) -> Tensor:
        """From [R, D] to [slices * R, D / slices], slice by slice."""
        R, D = rows.shape
        return rows.reshape(R, self.slices, D // self.slices).transpose(0, 1).reshape(-1, D // self.slices)

    def _whole(self, columns: Tensor) -> Tensor:
        """And back."""
        R, width = columns.shape[0] // self.slices, columns.shape[1]
        return columns.reshape(self.slices, R, width).transpose(0, 1).reshape(R, self.slices * width)
