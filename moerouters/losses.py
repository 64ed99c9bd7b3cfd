"""How auxiliary losses meet the autograd graph: `collect` or `inject`, exactly one of them per run.

* collect: the layer hands its losses out and whoever owns the training loss adds them.
* inject: nobody adds anything; an identity on the combine weights feeds each loss its gradient in the backward pass
  (Megatron calls it an auto-scaler). Right under reentrant checkpointing, pipelines and trainers with a loss of their
  own, where a returned loss is lost.

Either way every loss that is differentiated leaves a mark on the layer's `probe`, a leaf whose gradient counts. So at
the optimizer step a loss that nobody consumed is an error and not a router that silently never balances.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

LossMode = Literal["collect", "inject"]


class _Collect(torch.autograd.Function):
    """Identity on a 0-d loss; its backward adds 1 to the gradient of `probe`, unless the loss arrives with factor 0."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, probe: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        # An output that nobody used still gets a gradient, of zeros, from reentrant checkpointing and compiled graphs.
        return grad, (grad != 0).to(torch.float32)


class _Inject(torch.autograd.Function):
    """Identity on the weights; its backward gives the loss the gradient `scale` and adds 1 to that of `probe`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, scale: Tensor, probe: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype
        return weights.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        (grad,) = grads
        (scale,) = ctx.saved_tensors
        return grad, scale.to(ctx.loss_dtype), None, torch.ones_like(scale, dtype=torch.float32)


def collect_loss(loss: Tensor, probe: Tensor) -> Tensor:
    """loss, unchanged, for the caller to add to the training loss; its backward marks `probe`."""
    return _Collect.apply(loss, probe)  # type: ignore[no-untyped-call, no-any-return]


def inject_losses(weights: Tensor, losses: list[Tensor], *, scale: Tensor, probe: Tensor) -> Tensor:
    """weights, unchanged; the backward pass through them differentiates scale * sum(losses). scale is 0-d float32."""
    total = torch.stack(losses).sum()
    return _Inject.apply(weights, total, scale, probe)  # type: ignore[no-untyped-call, no-any-return]
