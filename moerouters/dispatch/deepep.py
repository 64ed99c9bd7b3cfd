"""The `deepep` back-end: the exchange is DeepEP's (github.com/deepseek-ai/DeepEP), over NVLink and RDMA.

It uses `deep_ep.Buffer`, the high-throughput interface that version 1 has and version 2 keeps. Nobody has run it on
GPUs yet: the tests run it on CPUs against a stand-in with the same signatures and rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moerouters.dispatch.base import Arrival, OverRanks, Pending, Ready
from moerouters.dispatch.plan import DispatchPlan
from moerouters.dispatch.site import Site
from moerouters.errors import ConfigError, DispatchError
from moerouters.kernels.counting_sort import counting_sort

MOST_SLOTS = 32
"""Of a token: its kernels give each slot one lane of a warp."""
ROW_UNIT = 16
"""Bytes. Its kernels move rows in units of this size."""

_buffers: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""By group: all layers share one, which is as large as the widest row needs."""


class DeepEpDispatcher(OverRanks):
    """Ranks hold different tokens. A row goes to each *rank* with experts for it once, its weights with it; results are
    weighted and summed there in float32, and the ranks' sums, rounded to bfloat16, are added on the way back.

    Rows are bfloat16. Each token has slots, 32 at most. The host waits for the device once per pass. Raises ConfigError
    where `deep_ep` is missing, or has no settings for so many ranks.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._package = _package(site)

    def dispatch(self, x_TD: Tensor, plan: DispatchPlan) -> Pending[Arrival]:
        here = self.site.experts_here(plan.num_experts)
        experts = here.stop - here.start
        ids_TK = self._slots(x_TD, plan)
        journey = _Journey(self.site, _buffer(self._package, self.site, x_TD), ids_TK, plan.num_experts)
        x_MD, weights_MK = _Out.apply(x_TD, plan.weights.float(), journey)  # type: ignore[no-untyped-call]
        ids_M = journey.ids_MK.reshape(-1)
        pairs = counting_sort(torch.where(ids_M < 0, experts, ids_M), experts)
        pairs_R = pairs.order_N[: sum(journey.loads)]
        rows_R = pairs_R // ids_TK.shape[1]
        way_back = _WayBack(journey, rows_R, weights_MK.reshape(-1).index_select(0, pairs_R))
        x_RD = x_MD.index_select(0, rows_R)
        return Ready(Arrival(x_RD=x_RD, load_e=pairs.load_E, plan=plan, way_back=way_back))

    def combine(self, y_RD: Tensor, arrival: Arrival, weights: Tensor) -> Pending[Tensor]:
        way: _WayBack = arrival.way_back
        weighted_RD = y_RD.float() * way.weights_R.unsqueeze(1)
        sums_MD = weighted_RD.new_zeros(len(way.journey.ids_MK), y_RD.shape[1]).index_add(0, way.rows_R, weighted_RD)
        y_TD = _Home.apply(sums_MD.bfloat16(), way.journey)  # type: ignore[no-untyped-call]
        return Ready(y_TD.to(weights.dtype))

    def _slots(self, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """[T, K], -1 for an empty slot. Raises DispatchError for what DeepEP does not carry."""
        slots = plan.slots_per_token
        if slots is None or slots > MOST_SLOTS:
            raise DispatchError(
                f"the deepep back-end got {'free pairs' if slots is None else f'{slots} slots for each token'}.",
                where=str(self.site),
                why=f"DeepEP takes a table of at most {MOST_SLOTS} experts for each token",
                fix="choose another dispatcher for this router",
            )
        if x_TD.dtype is not torch.bfloat16 or x_TD.shape[1] * x_TD.itemsize % ROW_UNIT:
            raise DispatchError(
                f"the deepep back-end got rows of {x_TD.shape[1]} x {str(x_TD.dtype).removeprefix('torch.')}.",
                where=str(self.site),
                why=f"DeepEP exchanges bfloat16, in units of {ROW_UNIT} bytes",
                fix="run the layer in bfloat16 with a width that is a multiple of 8, or choose another dispatcher",
            )
        ids_N = plan.expert_ids_N.masked_fill(plan.expert_ids_N == plan.num_experts, -1)
        return ids_N.reshape(-1, slots).to(getattr(self._package, "topk_idx_t", torch.int64))


class _Journey:
    """One pass of rows over the buffer. What went out may come home more than once, and go out again: gradients do."""

    def __init__(self, site: Site, buffer: Any, ids_TK: Tensor, num_experts: int) -> None:
        self.site, self.buffer, self.ids_TK, self.num_experts = site, buffer, ids_TK, num_experts
        self.handle: Any = None
        self.ids_MK = ids_TK
        """Once rows are out: of the M rows that came, the expert of each slot, numbered on this rank; -1 elsewhere."""
        self.loads: list[int] = []
        """Rows for each expert of this rank."""

    def out(self, x_TD: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        with self.site.guarded("DeepEP's dispatch"):
            per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(self.ids_TK, self.num_experts)
            x_MD, self.ids_MK, weights_MK, self.loads, self.handle, _ = self.buffer.dispatch(
                x_TD.contiguous(),
                topk_idx=self.ids_TK,
                topk_weights=weights_TK.contiguous(),
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                num_tokens_per_expert=per_expert,
                is_token_in_rank=in_rank,
            )
        return x_MD, weights_MK

    def home(self, rows_MD: Tensor, weights_MK: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        with self.site.guarded("DeepEP's combine"):
            y_TD, weights_TK, _ = self.buffer.combine(
                rows_MD.contiguous(),
                self.handle,
                topk_weights=None if weights_MK is None else weights_MK.contiguous(),
            )
        return y_TD, weights_TK

    def out_again(self, rows_TD: Tensor) -> Tensor:
        with self.site.guarded("DeepEP's dispatch"):
            x_MD: Tensor = self.buffer.dispatch(rows_TD.contiguous(), handle=self.handle)[0]
        return x_MD


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, journey: _Journey) -> tuple[Tensor, Tensor]:
        ctx.journey = journey
        return journey.out(x_TD, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor, grad_MK: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return *ctx.journey.home(grad_MD, grad_MK), None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums_MD: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.home(sums_MD)[0]

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.out_again(grad_TD), None


@dataclass(frozen=True)
class _WayBack:
    journey: _Journey
    rows_R: Tensor
    """int64, which of the M rows that came a row of the experts is."""
    weights_R: Tensor
    """float32, its weight."""


def _package(site: Site) -> Any:
    try:
        return import_module("deep_ep")
    except ImportError as error:  # also where its binary part finds no CUDA
        raise ConfigError(
            "the deepep back-end needs the package deep_ep, which cannot be imported.",
            where=str(site),
            why=str(error),
            fix="build it as github.com/deepseek-ai/DeepEP says, or choose another dispatcher",
        ) from error


def _buffer(package: Any, site: Site, x_TD: Tensor) -> Any:
    """The group's, with room for rows as wide as these. A collective of the group where it has to be made."""
    ranks, row = site.num_ranks, x_TD.shape[1] * x_TD.itemsize
    try:
        configs = package.Buffer.get_dispatch_config(ranks), package.Buffer.get_combine_config(ranks)
    except AssertionError as error:
        raise ConfigError(
            f"DeepEP has no settings for this number of ranks: {ranks}.",
            where=str(site),
            why=str(error),
            fix="spread the experts over another number of ranks (2, 4, 8, 16, ...), or choose another dispatcher",
        ) from error
    nvlink = max(config.get_nvl_buffer_size_hint(row, ranks) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(row, ranks) for config in configs)
    buffer = _buffers.get(site.group)
    if buffer is None or buffer.num_nvl_bytes < nvlink or buffer.num_rdma_bytes < rdma:
        with site.guarded("making DeepEP's buffer"):
            _buffers[site.group] = buffer = package.Buffer(site.group, nvlink, rdma)
    return buffer
