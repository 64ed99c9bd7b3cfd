"""Slow, obviously right counterparts of what the core computes: plain Python loops over tokens, no code of ours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def top_ids(values: Sequence[float], k: int) -> list[int]:
    """The k largest by value, among equals the lower id first."""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def count(ids: Sequence[Sequence[int]], num_experts: int) -> list[int]:
    """How often each expert stands in `ids`; whatever is not in 0..E-1 is an empty place."""
    return [sum(row.count(e) for row in ids) for e in range(num_experts)]


def expert_output(x_D: Tensor, up_FD: Tensor, down_DF: Tensor, activation: str = "swiglu") -> Tensor:
    """One token through one expert."""
    inner = up_FD @ x_D
    if activation == "gelu":
        return down_DF @ F.gelu(inner)
    half = inner.shape[0] // 2
    return down_DF @ (F.silu(inner[:half]) * inner[half:])


@dataclass
class TokenLoop:
    """A softmax-gated, renormalised top-k MoE layer, token by token; keeps what its loss needs."""

    weights: Mapping[str, Tensor]
    """`gate.weight` [E, D], `experts.up_eFD`, `experts.down_eDF`, and `shared.*` if there is a shared expert."""
    top_k: int
    activation: str = "swiglu"
    bias: Sequence[float] | None = None
    keep: Callable[[int, int], bool] = lambda token, expert: True
    """Whether the pair survives the capacity limit."""
    ids: list[list[int]] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D] in, [T, D] out."""
        return torch.stack([self._token(t, x_D) for t, x_D in enumerate(x_TD)])

    def _token(self, token: int, x_D: Tensor) -> Tensor:
        gate_ED = self.weights["gate.weight"]
        scores_E = (gate_ED @ x_D).softmax(dim=0)
        bias = self.bias or [0.0] * len(scores_E)
        ids = top_ids([s + b for s, b in zip(scores_E.tolist(), bias, strict=True)], self.top_k)
        self.ids.append(ids)
        self.probabilities.append(scores_E)
        total = sum(scores_E[e] for e in ids)
        out_D = torch.zeros_like(x_D)
        for e in ids:
            if self.keep(token, e):
                out_D = out_D + scores_E[e] / total * self._expert("experts", e, x_D)
        if "shared.up_eFD" in self.weights:
            out_D = out_D + self._expert("shared", 0, x_D)
        return out_D

    def _expert(self, name: str, e: int, x_D: Tensor) -> Tensor:
        up, down = self.weights[f"{name}.up_eFD"], self.weights[f"{name}.down_eDF"]
        return expert_output(x_D, up[e], down[e], self.activation)

    @property
    def load(self) -> list[int]:
        return count(self.ids, len(self.probabilities[0]))

    def switch_loss(self, alpha: float) -> Tensor:
        """alpha * E * sum_e (share of the pairs) * (mean probability), over all tokens seen."""
        E, pairs = len(self.load), sum(self.load)
        mean_E = sum(self.probabilities) / len(self.probabilities)
        return alpha * E * sum(self.load[e] / pairs * mean_E[e] for e in range(E))


def gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """d loss / d parameter by name; zeros where the loss does not depend on it."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True)
    }
