"""Expert parallelism of Hugging Face models by our dispatchers, under names for their own one-line config.

import moerouters.hf
config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation="moerouters")
model = AutoModelForCausalLM.from_pretrained(..., distributed_config=config)

Every rank of the expert group holds a block of experts. Within it the ranks of a tensor-parallel group hold the same
batch, and each makes the whole of its gradient; gradients of experts are sums over the batches of the group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moerouters.dispatch.base import Dispatcher
from moerouters.dispatch.exchange import AllGather, Started, start
from moerouters.dispatch.site import Site
from moerouters.errors import ConfigError
from moerouters.hf_experts import NAME, expert_rows, routed_slots
from moerouters.sharding import make_dispatcher
from moerouters.swapping.guards import expect_expert_parallel_transformers

expect_expert_parallel_transformers()

from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface  # noqa: E402


class DispatchedExperts(EPImplementation):
    """`moerouters`: tensor_sliced where the expert group shares one batch, else what `auto` chooses.

    Where a tensor-parallel group within the expert group shares a batch, each of its ranks sends its part of the tokens
    and the results are gathered, unless the back-end takes the batch as it is.
    """

    backend: ClassVar[str] = ""
    """Name of the dispatcher; empty: by what the ranks share."""

    def __init__(self, experts: Any, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        from moerouters.dispatch.eager import through_experts_eager

        backend = self.backend or ("tensor_sliced" if self.shares_batch else "auto")
        site = Site(ep_mesh.get_group(), layer=_name_of(experts), backend=backend)
        self.dispatcher: Dispatcher = make_dispatcher(backend, site)
        if self.dispatcher.replicated and not self.shares_batch:
            raise ConfigError(
                f"ep_implementation='{NAME}_{backend}' needs all ranks of the expert group to hold the same batch.",
                where=str(site),
                why="each rank computes its experts' part of every token, and the parts are summed",
                fix=f"set ep_size to tp_size, or take ep_implementation='{NAME}'",
            )
        self.num_experts: int = experts.num_experts * site.num_ranks
        self._experts = experts
        self._through_experts = through_experts_eager
        self._shared = Site(tp_mesh.get_group(), layer=site.layer, backend=backend)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, D] of this rank's batch to [T, D], in the dtype of top_k_weights [T, K]; top_k_index is int64 [T, K] of
        all ranks' experts, with their number for an empty slot."""
        if self._shared.num_ranks == 1 or self.dispatcher.replicated:
            return self._run(hidden_states, top_k_index, top_k_weights)
        # Parts are equal; the rows that this adds at the end have empty slots, and go nowhere.
        num_tokens = hidden_states.shape[0]
        extra = -num_tokens % self._shared.num_ranks
        x_tD = start(F.pad(hidden_states, (0, 0, 0, extra)), OwnPart(self._shared)).wait()
        weights_tK = start(F.pad(top_k_weights, (0, 0, 0, extra)), OwnPart(self._shared)).wait()
        ids_tK = _part(F.pad(top_k_index, (0, 0, 0, extra), value=self.num_experts), self._shared)
        y_tD = self._run(x_tD, ids_tK, weights_tK)
        return start(y_tD, JoinedParts(self._shared)).wait()[:num_tokens]

    def _run(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        assignment = routed_slots(ids_TK, weights_TK, self.num_experts)
        y_TD: Tensor = self._through_experts(self.dispatcher, x_TD, assignment, self._rows)
        return y_TD

    def _rows(self, x_RD: Tensor, load_e: Tensor) -> Tensor:
        """Rows by expert through this rank's experts, by the implementation that the model was told to take."""
        implementation = self._experts.config._experts_implementation
        if implementation == NAME:
            return expert_rows(self._experts, x_RD, load_e)
        return _rows_by_id(self.experts_forward, x_RD, load_e, cut=implementation == "eager")


class OwnPart(AllGather):
    """This rank's equal part of rows that all ranks hold alike; backward gathers the gradients of all parts."""

    def forth(self, rows: Tensor) -> Started:
        return _part(rows, self.site).clone(), None

    def back(self, grad: Tensor) -> Started:
        return super().forth(grad)


class JoinedParts(AllGather):
    """The parts of all ranks, which then make the same of them; backward is this rank's part of their one gradient."""

    def back(self, grad: Tensor) -> Started:
        return _part(grad, self.site).clone(), None


def _rows_by_id(forward: Callable[..., Tensor], x_RD: Tensor, load_e: Tensor, *, cut: bool) -> Tensor:
    """Rows grouped by expert through a forward that wants ids and weights.

    Rows past load_e.sum() get the id of no expert, and are zeros before and after. cut: such ids are not understood
    (eager, in some classes), so these rows are left out, for which the host reads their number as eager does anyway.
    """
    load_e = load_e.to(x_RD.device)  # a back-end that knows its loads beforehand has them on the host
    x_rD = x_RD[: int(load_e.sum())] if cut else x_RD
    if len(x_rD) == 0:
        # One row keeps experts and input in the graph: other ranks wait for this one in backward.
        once = load_e.new_zeros(1, 1)
        y_rD = forward(F.pad(x_rD, (0, 0, 0, 1)), once, x_rD.new_ones(1, 1))[:0]
    else:
        places_r = torch.arange(len(x_rD), device=x_rD.device)
        experts_r1 = torch.searchsorted(load_e.cumsum(0), places_r, right=True).unsqueeze(1)
        none_r1 = experts_r1 == load_e.shape[0]
        y_rD = forward(x_rD.masked_fill(none_r1, 0), experts_r1, (~none_r1).to(x_rD.dtype))
    return F.pad(y_rD, (0, 0, 0, len(x_RD) - len(y_rD)))


def _part(rows: Tensor, site: Site) -> Tensor:
    return rows.chunk(site.num_ranks)[site.rank] if len(rows) else rows


def _name_of(experts: nn.Module) -> str:
    """Name of the module in its model, which transformers knows where it calls us and does not pass on."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_locals.get("module") is experts and isinstance(frame.f_locals.get("name"), str):
            return str(frame.f_locals["name"])
        frame = frame.f_back
    return type(experts).__name__


def ep_implementation(backend: str) -> str:
    """The name under which `DistributedConfig(ep_implementation=...)` finds a dispatcher, built in or of a plug-in."""
    name = f"{NAME}_{backend}"
    made = type(f"Dispatched_{backend}", (DispatchedExperts,), {"backend": backend, "__doc__": f"`{name}`."})
    EPImplementationInterface.register(name, made)
    return name


EPImplementationInterface.register(NAME, DispatchedExperts)
for _backend in ("all_gather", "all_to_all", "tensor_sliced"):  # padded needs a capacity, which no router here sets
    ep_implementation(_backend)
