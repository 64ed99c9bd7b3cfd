"""The baselines of a layer: its matrix products alone, and dense SwiGLU MLPs of the same FLOPs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerouters.bench.shapes import Shape
from moerouters.bench.weights import normal


class DenseMLP(nn.Module):
    """Three bias-free Linears."""

    def __init__(self, width: int, hidden: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def gemm_run(shape: Shape, *, device: torch.device, dtype: torch.dtype, backward: bool) -> Callable[[], object]:
    """The GEMMs of the experts, on N rows as if all had one expert, into buffers that exist: the roofline.

    Gate and up projection in one: two GEMMs a layer, and four in backward. Layers have weights of their own.
    """
    N, D, F_ = shape.N, shape.D, shape.F

    def make(*sizes: int) -> Tensor:
        return normal(*sizes, device=device, dtype=dtype)

    x_ND, hidden_NF, grad_y_ND, grad_h_NF = make(N, D), make(N, F_), make(N, D), make(N, 2 * F_)
    up_N2F, y_ND = make(N, 2 * F_), make(N, D)
    ups = [make(2 * F_, D) for _ in range(shape.layers)]
    downs = [make(D, F_) for _ in range(shape.layers)]
    grad_up, grad_down = make(2 * F_, D), make(D, F_)

    def run() -> None:
        with torch.no_grad():
            for up, down in zip(ups, downs, strict=True):
                torch.mm(x_ND, up.t(), out=up_N2F)
                torch.mm(hidden_NF, down.t(), out=y_ND)
            if not backward:
                return
            for up, down in zip(ups, downs, strict=True):
                torch.mm(grad_y_ND, down, out=hidden_NF)
                torch.mm(grad_y_ND.t(), hidden_NF, out=grad_down)
                torch.mm(grad_h_NF, up, out=y_ND)
                torch.mm(grad_h_NF.t(), x_ND, out=grad_up)

    return run
