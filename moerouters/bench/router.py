"""`moerouters bench router`: every installed router on logits, over softmax + topk + bincount and copied bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from moerouters.bench.case import Build, Case, Request, Run, Unavailable
from moerouters.bench.routing import context, router_of
from moerouters.bench.shapes import Shape
from moerouters.bench.weights import normal
from moerouters.errors import MoeroutersError

FORWARD, BOTH, REPLAY = "forward", "forward+backward", "graph replay"


def router_cases(request: Request) -> Iterator[Case]:
    """Training's forward and backward; on a GPU also the forward as a CUDA graph, without what launching costs."""
    for shape in request.shapes:
        for passes in (FORWARD, BOTH) if request.device == "cpu" else (FORWARD, BOTH, REPLAY):
            yield RouterCase(request, shape, passes)


class RouterCase(Case):
    """logits [T, E] float32 to an assignment: training mode, so that balancers solve what they solve."""

    baselines = ("softmax_topk", "copy", "topk")
    dtype = "float32"

    def __init__(self, request: Request, shape: Shape, passes: str) -> None:
        super().__init__(request, shape)
        self.passes = passes

    def builds(self) -> Mapping[str, Build]:
        from moerouters import available

        plain: dict[str, Build] = {"softmax_topk": self._softmax_topk, "copy": self._copy}
        return plain | {name: partial(self._router, name) for name in sorted(available(), key=lambda n: n != "topk")}

    def values(self, name: str, seconds: float) -> dict[str, float]:
        return {"gb_per_s": self._bytes / seconds / 1e9}

    @property
    def _bytes(self) -> int:
        """Logits read, weights and int64 ids written; in backward two gradients of them more."""
        forward = 4 * self.shape.T * self.shape.E + 12 * self.shape.N
        return forward if self.passes != BOTH else 2 * forward + 4 * self.shape.T * self.shape.E

    def _logits(self) -> Tensor:
        return normal(self.shape.T, self.shape.E, device=self.device).requires_grad_(self.passes == BOTH)

    def _router(self, name: str) -> Run:

        ctx = context(self.shape, device=self.device)
        try:
            router = router_of(name, self.shape).to(self.device).train()
        except MoeroutersError as error:
            raise Unavailable(str(error).splitlines()[0]) from error

        def route(logits_TE: Tensor) -> list[Tensor]:
            assignment = router(logits_TE, ctx)
            return [assignment.weights, *assignment.losses.values()]

        return self._ready(route)

    def _softmax_topk(self) -> Run:
        def route(logits_TE: Tensor) -> list[Tensor]:
            weights_TK, ids_TK = torch.softmax(logits_TE, dim=-1).topk(self.shape.K)
            torch.bincount(ids_TK.flatten(), minlength=self.shape.E)
            return [weights_TK]

        return self._ready(route)

    def _copy(self) -> Run:
        source = torch.ones(self._bytes // 8, device=self.device)  # as many bytes are read as written
        target = torch.empty_like(source)
        return _captured(partial(target.copy_, source)) if self.passes == REPLAY else partial(target.copy_, source)

    def _ready(self, route: Callable[[Tensor], list[Tensor]]) -> Run:
        logits_TE = self._logits()

        def forward() -> object:
            with torch.no_grad():
                return route(logits_TE)

        def both() -> None:
            outputs = [output for output in route(logits_TE) if output.requires_grad]
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            logits_TE.grad = None

        run = both if self.passes == BOTH else forward
        try:
            if self.passes == REPLAY:
                return _captured(run)
            run()
        except (MoeroutersError, RuntimeError) as error:
            raise Unavailable(str(error).splitlines()[0]) from error
        return run


def _captured(run: Run) -> Run:
    """The same work as a CUDA graph. RuntimeError for work that waits for the device."""
    aside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
