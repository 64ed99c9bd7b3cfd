"""A small model of MoE layers with a balancer, and the steps of training it."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moerouters import MoELayer
from support.balanced import balanced

WIDTH = 4


class Stack(nn.Module):
    """MoE layers in a row; returns the hidden states and the sum of the losses."""

    def __init__(self, num_layers: int = 2, loss_mode: str = "collect", checkpointing: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            MoELayer(balanced(), hidden_size=WIDTH, expert_size=3, loss_mode=loss_mode) for _ in range(num_layers)
        )
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        aux = x.new_zeros(())
        for layer in self.layers:
            if self.checkpointing == "none":
                x, more = self.one(layer, x)
            else:
                x, more = checkpoint(self.one, layer, x, use_reentrant=self.checkpointing == "reentrant")
            aux = aux + more
        return x, aux

    @staticmethod
    def one(layer: MoELayer, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, assignment = layer(x)
        return x + hidden, sum(assignment.losses.values(), x.new_zeros(()))

    def biases(self) -> list[list[float]]:
        return [layer.router.b_E.tolist() for layer in self.layers]


def batch(seed: int = 1, tokens: int = 6) -> Tensor:
    """Asks for a gradient: reentrant checkpointing cuts the graph of a block without any such input."""
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def backward(model: Stack, x: Tensor, scale: float = 1.0) -> None:
    hidden, aux = model(x)
    (scale * (hidden.square().mean() + aux)).backward()
