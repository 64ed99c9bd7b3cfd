"""Weights and inputs that all implementations of a benchmark share, so that they compute the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moerouters.bench.shapes import Shape


@dataclass(frozen=True)
class Weights:
    """Of one MoE layer: softmax over E logits, the K largest renormalised, SwiGLU experts without biases."""

    gate_ED: nn.Parameter
    up_eFD: nn.Parameter
    """[E, 2F, D], the gate projection first, as `moerouters` and transformers keep them."""
    down_eDF: nn.Parameter

    def parameters(self) -> tuple[nn.Parameter, ...]:
        return self.gate_ED, self.up_eFD, self.down_eDF


def make_weights(shape: Shape, *, device: torch.device, dtype: torch.dtype) -> list[Weights]:
    """One per layer, uniform in +-1/sqrt(fan in), the same each time."""
    generator = torch.Generator(device).manual_seed(0)

    def uniform(*sizes: int) -> nn.Parameter:
        bound = 1 / math.sqrt(sizes[-1])
        values = torch.empty(sizes, device=device, dtype=dtype).uniform_(-bound, bound, generator=generator)
        return nn.Parameter(values)

    D, E, F = shape.D, shape.E, shape.F
    return [Weights(uniform(E, D), uniform(E, 2 * F, D), uniform(E, D, F)) for _ in range(shape.layers)]


def normal(*sizes: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Numbers from the normal distribution, the same each time."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(sizes, generator=generator, device=device, dtype=dtype)


def plain_layer(weights: Weights, x_TD: Tensor, *, top_k: int) -> Tensor:
    """What every implementation computes, one token at a time; for few tokens."""
    scores_TE = torch.softmax((x_TD @ weights.gate_ED.t()).float(), dim=-1)
    chosen_TK, ids_TK = scores_TE.topk(top_k)
    weights_TK = chosen_TK / chosen_TK.sum(dim=-1, keepdim=True)
    rows = []
    for x_D, w_K, ids_K in zip(x_TD, weights_TK, ids_TK.tolist(), strict=True):
        y_D = torch.zeros_like(x_D, dtype=torch.float32)
        for weight, expert in zip(w_K, ids_K, strict=True):
            gate_F, up_F = (weights.up_eFD[expert] @ x_D).chunk(2)
            y_D += weight * (weights.down_eDF[expert] @ (torch.nn.functional.silu(gate_F) * up_F))
        rows.append(y_D)
    return torch.stack(rows).to(x_TD.dtype)
