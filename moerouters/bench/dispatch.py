"""`moerouters bench dispatch`: bringing rows to experts and back, by every back-end, over a plain copy of the bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial

import torch
import torch.distributed as dist
from torch import Tensor

from moerouters.bench.case import Build, Case, Request, Run, Unavailable
from moerouters.bench.shapes import Shape
from moerouters.bench.weights import normal
from moerouters.dispatch.base import Dispatcher
from moerouters.dispatch.local import LocalDispatcher
from moerouters.dispatch.names import BACKENDS, built_in
from moerouters.dispatch.plan import DispatchPlan, make_plan
from moerouters.dispatch.site import Site
from moerouters.errors import MoeroutersError
from moerouters.types import Assignment

PLAN, DISPATCH, COMBINE, BOTH = "plan", "dispatch", "combine", "forward+backward"


def dispatch_cases(request: Request) -> Iterator[Case]:
    """One table for each part, and one for the way there, back and backward."""
    for shape in request.shapes:
        for passes in (PLAN, DISPATCH, COMBINE, BOTH):
            yield DispatchCase(request, shape, passes)


class DispatchCase(Case):
    """Experts that do nothing: rows come back as they went. All ranks hold the same tokens; none is dropped."""

    baselines = ("copy",)

    def __init__(self, request: Request, shape: Shape, passes: str) -> None:
        super().__init__(request, shape)
        self.passes = passes

    def builds(self) -> Mapping[str, Build]:
        copy: dict[str, Build] = {"copy": self._copy}
        if self.passes == PLAN:
            return copy | {"moerouters": self._plan, "argsort": self._argsort}
        names = [name for name in BACKENDS if name not in ("auto", "mesh3d")]  # one of them, and one for cut experts
        local = [] if self.request.ranks > 1 else ["local"]
        return copy | {name: partial(self._backend, name) for name in (*local, *names)}

    def values(self, name: str, seconds: float) -> dict[str, float]:
        return {"tb_per_s": self._bytes / seconds / 1e12}

    @property
    def _bytes(self) -> int:
        """What must be read and written at least; sums over a token's rows are float32.

        A plan: ids read, order, its inverse and sorted ids written. Backward of a combination reads rows once more, for
        the gradient of the weights.
        """
        row = self.shape.D * self.request.torch_dtype.itemsize
        tokens, rows, sums = self.shape.T * row, self.shape.N * row, 4 * self.shape.T * self.shape.D
        both = 2 * (tokens + rows) + (rows + sums) + (sums + 2 * rows)
        return {PLAN: 32 * self.shape.N, DISPATCH: tokens + rows, COMBINE: rows + sums, BOTH: both}[self.passes]

    @cached_property
    def _assignment(self) -> Assignment:
        from moerouters import Gating, build

        logits_TE = normal(self.shape.T, self.shape.E, device=self.device)
        assignment: Assignment = build("topk", Gating.softmax(self.shape.E, self.shape.K)).to(self.device)(logits_TE)
        return assignment

    def _copy(self) -> Run:
        source = torch.ones(self._bytes // 8, device=self.device)  # as many bytes are read as written
        return partial(torch.empty_like(source).copy_, source)

    def _plan(self) -> Run:
        return partial(make_plan, self._assignment)

    def _argsort(self) -> Run:
        ids_N = self._assignment.expert_ids.flatten()

        def run() -> object:
            return ids_N.argsort(stable=True).argsort(), torch.bincount(ids_N, minlength=self.shape.E)

        return run

    def _backend(self, name: str) -> Run:
        shape, dtype = self.shape, self.request.torch_dtype
        # As much room as the fullest expert needs: `padded` sends all of it.
        capacity = int(self._assignment.load_E.max()) if name == "padded" else None
        x_TD = normal(shape.T, shape.D, device=self.device, dtype=dtype).requires_grad_(self.passes == BOTH)
        grad_TD = normal(shape.T, shape.D, device=self.device, seed=2)
        weights_TK = self._assignment.weights.detach().requires_grad_(self.passes == BOTH)
        plan = make_plan(replace(self._assignment, weights=weights_TK), capacity=capacity)
        try:
            dispatcher = LocalDispatcher() if name == "local" else built_in(name, Site(_world(), backend=name))
            return self._run(dispatcher, plan, x_TD, weights_TK, grad_TD)
        except MoeroutersError as error:
            raise Unavailable(str(error).splitlines()[0]) from error

    def _run(
        self, dispatcher: Dispatcher, plan: DispatchPlan, x_TD: Tensor, weights_TK: Tensor, grad_TD: Tensor
    ) -> Run:
        if self.passes == DISPATCH:
            return lambda: dispatcher.dispatch(x_TD, plan).wait()
        if self.passes == COMBINE:
            arrival = dispatcher.dispatch(x_TD, plan).wait()
            return lambda: dispatcher.combine(arrival.x_RD, arrival, weights_TK).wait()

        def run() -> None:
            arrival = dispatcher.dispatch(x_TD, plan).wait()
            y_TD = dispatcher.combine(arrival.x_RD, arrival, weights_TK).wait()
            torch.autograd.backward(y_TD, grad_TD)
            x_TD.grad = weights_TK.grad = None

        return run


def _world() -> dist.ProcessGroup:
    """The ranks of this job; of a process alone, a group with nobody else in it."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD
