"""`moerouters bench layer`: MoE layers against their roofline, dense MLPs of their FLOPs, and peers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from moerouters.bench.case import Build, Case, Request, Run, Unavailable
from moerouters.bench.dense import DenseMLP, gemm_run
from moerouters.bench.gpu_peers import COMPUTES_ELSE, GPU_PEERS
from moerouters.bench.peers import (
    Layer,
    grouped_mm_layer,
    moerouters_layer,
    torchtitan_style_layer,
    transformers_layer,
)
from moerouters.bench.shapes import Shape
from moerouters.bench.weights import Weights, make_weights, normal, plain_layer

MAKERS: dict[str, Callable[[Shape, Weights], Layer]] = {
    "moerouters": moerouters_layer,
    "moerouters-hf": partial(transformers_layer, "moerouters"),
    "grouped_mm": grouped_mm_layer,
    "torchtitan-style": torchtitan_style_layer,
    "hf-grouped_mm": partial(transformers_layer, "grouped_mm"),
    "hf-batched_mm": partial(transformers_layer, "batched_mm"),
    "hf-eager": partial(transformers_layer, "eager"),
    **GPU_PEERS,
}
OURS = ("moerouters", "moerouters-hf")
FORWARD, BOTH = "forward", "forward+backward"
_COMPARED = 32
"""Tokens whose outputs are compared before anything is timed."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of the error's norm over the output's norm."""


def layer_cases(request: Request) -> Iterator[Case]:
    """Forward alone, and with backward; of a growing series the latter."""
    for shape in request.shapes:
        for passes in (BOTH,) if shape.grows else (FORWARD, BOTH):
            yield LayerCase(request, shape, passes)


class LayerCase(Case):
    """`shape.layers` layers in a row with residual connections, all live before backward.

    Forward alone is in eval mode, without gradients. Backward reaches weights and input; gradients are let go at the
    end of each run, which counts.
    """

    baselines = ("gemm", "dense_rows", "dense_wide", "moerouters")

    def __init__(self, request: Request, shape: Shape, passes: str) -> None:
        super().__init__(request, shape)
        self.passes = passes

    def builds(self) -> Mapping[str, Build]:
        shape, dtype = self.shape, self.request.torch_dtype
        gemm = partial(gemm_run, shape, device=self.device, dtype=dtype, backward=self.passes == BOTH)
        dense: dict[str, Build] = {
            "gemm": gemm,
            "dense_rows": partial(self._dense, shape.N, shape.F),
            "dense_wide": partial(self._dense, shape.T, shape.K * shape.F),
        }
        return dense | {name: partial(self._layers, name) for name in MAKERS}

    def peers(self, samples: Mapping[str, Sequence[float]]) -> dict[str, str]:
        faster = min(("dense_rows", "dense_wide"), key=lambda name: statistics.median(samples[name]))
        return super().peers(samples) | {"dense_mlp": faster}

    def values(self, name: str, seconds: float) -> dict[str, float]:
        flops = 6 * self.shape.N * self.shape.D * self.shape.F * self.shape.layers * (3 if self.passes == BOTH else 1)
        return {"tflops": flops / seconds / 1e12}

    @cached_property
    def _weights(self) -> list[Weights]:
        return make_weights(self.shape, device=self.device, dtype=self.request.torch_dtype)

    def _dense(self, rows: int, hidden: int) -> Run:
        shape, dtype = self.shape, self.request.torch_dtype
        mlps = [DenseMLP(shape.D, hidden, device=self.device, dtype=dtype) for _ in range(shape.layers)]
        parameters = [parameter for mlp in mlps for parameter in mlp.parameters()]
        # N rows have no residual connection in a MoE layer, which adds T of them: what only costs this baseline is left
        # out.
        return self._run(list(mlps), parameters, rows=rows, residual=rows == shape.T)

    def _layers(self, name: str) -> Run:
        made = self._made(name)
        parameters = {p for weights in self._weights for p in weights.parameters()}
        for layer in made:
            if isinstance(layer, nn.Module):
                layer.train(self.passes == BOTH)
                parameters |= set(layer.parameters())
        return self._run(made, parameters, rows=self.shape.T)

    def _made(self, name: str) -> list[Layer]:
        """The layers, of which the first was compared with the plain one."""
        try:
            made = [MAKERS[name](self.shape, weights) for weights in self._weights]
            if name not in COMPUTES_ELSE:
                expect_agreement(made[0], self._weights[0], self.shape)
        except Exception as error:
            # A library that breaks on this machine or at this shape must not end the others' run; ours must.
            if isinstance(error, Unavailable) or name in OURS:
                raise
            raise Unavailable(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
        return made

    def _run(
        self, layers: Sequence[Layer], parameters: Iterable[nn.Parameter], *, rows: int, residual: bool = True
    ) -> Run:
        x = normal(rows, self.shape.D, device=self.device, dtype=self.request.torch_dtype)
        grad = normal(rows, self.shape.D, device=self.device, dtype=self.request.torch_dtype, seed=2)

        trained = tuple(parameters)

        def forward() -> Tensor:
            y = x
            for layer in layers:
                y = y + layer(y) if residual else layer(y)
            return y

        def without_gradients() -> None:
            with torch.no_grad():
                forward()

        def with_gradients() -> None:
            x.requires_grad_()
            torch.autograd.backward(forward(), grad)
            for tensor in (x, *trained):
                tensor.grad = None

        return with_gradients if self.passes == BOTH else without_gradients


def expect_agreement(layer: Layer, weights: Weights, shape: Shape) -> None:
    """Raise Unavailable for a layer whose output is not that of `plain_layer`: it would be no peer."""
    dtype = weights.up_eFD.dtype
    x_TD = normal(min(_COMPARED, shape.T), shape.D, device=weights.up_eFD.device, dtype=dtype, seed=3)
    with torch.no_grad():
        expected = plain_layer(weights, x_TD, top_k=shape.K).float()
        error_T = (layer(x_TD).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    # In low precision two experts may score alike, and either may be chosen: one token in eight may differ.
    allowed = 0 if dtype == torch.float32 else _COMPARED // 8
    apart = int((~(error_T <= _TOLERANCE[dtype])).sum())
    if apart > allowed:
        raise Unavailable(f"it computes something else: {apart} of {len(error_T)} tokens differ, {error_T.max():.1g}")
