"""What sparse inference costs a trained model: its loss against the parameters that are active."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from moerouters import MoELayer, record
from moerouters_ds_moe.config import Inference
from moerouters_ds_moe.modes import routers_of, sparse, train_dense
from moerouters_ds_moe.shares import active_shares

Model = TypeVar("Model", bound=nn.Module)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Rule(_Record):
    """One way of inference; see DsMoeConfig."""

    inference: Inference
    eps: float | None = None
    top_k: int | None = None


class Point(_Record):
    """What one rule came to."""

    rule: Rule
    loss: float
    expert_share: float
    """Of all (token, expert) pairs, mean over layers."""
    layer_shares: tuple[float, ...]
    active_parameters: int | None
    """Mean per token; None where experts are not those of a MoELayer, and nobody here knows their size."""


class Curve(_Record):
    """A model's loss when every expert is active, and under each rule. Losses are in nats per token."""

    dense_loss: float
    parameters: int
    points: tuple[Point, ...]

    def perplexity_ratio(self, point: Point) -> float:
        """Perplexity at a point over that of the dense model."""
        return math.exp(point.loss - self.dense_loss)

    def best_within(self, share: float) -> Point | None:
        """The point of the lowest loss among those with at most this part of all parameters active."""
        fitting = [p for p in self.points if p.active_parameters is not None and self.part(p) <= share]
        return min(fitting, key=lambda point: point.loss, default=None)

    def part(self, point: Point) -> float:
        """Active parameters over all."""
        assert point.active_parameters is not None
        return point.active_parameters / self.parameters


def default_rules(num_experts: int) -> list[Rule]:
    """Thresholds around the paper's 0.48, some of them averaged to a K for the batch, and every power of 2 as K."""
    thresholds = [Rule(inference="threshold", eps=eps) for eps in (0.1, 0.25, 0.48, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)]
    averaged = [Rule(inference="threshold_top_k", eps=eps) for eps in (0.25, 0.48, 1.0, 2.0, 3.0)]
    powers = [2**n for n in range(num_experts.bit_length()) if 2**n < num_experts]
    return [*thresholds, *averaged, *(Rule(inference="top_k", top_k=K) for K in powers)]


@torch.no_grad()
def sweep(
    model: Model, loss_of: Callable[[Model], float], rules: Sequence[Rule] | None = None, *, layers: str = "*"
) -> Curve:
    """The model's loss under every rule, and the part of its experts that each makes active.

    loss_of: evaluates the model, in eval mode and without gradients, and returns the mean loss per token. rules:
    default `default_rules`. layers: as in `sparse`; other routers are dense. Settings and mode of the model are put
    back. Raises ConfigError for a model without `ds-moe` routers.
    """
    routers, training = routers_of(model), model.training
    configs = {name: router.config for name, router in routers.items()}
    num_experts = max(router.gating.num_experts for router in routers.values())
    try:
        train_dense(model)
        dense_loss = loss_of(model.eval())
        chosen = default_rules(num_experts) if rules is None else rules
        points = [_point(model, loss_of, rule, layers) for rule in chosen]
    finally:
        for name, router in routers.items():
            router.use(configs[name])
        model.train(training)
    return Curve(dense_loss=dense_loss, parameters=_size(model), points=tuple(points))


def _point(model: Model, loss_of: Callable[[Model], float], rule: Rule, layers: str) -> Point:
    sparse(model, inference=rule.inference, eps=rule.eps, top_k=rule.top_k, layers=layers)
    with record(model) as tape:
        loss = loss_of(model)
    shares = active_shares(tape)
    of_layers = {m: shares[name] for name, m in model.named_modules() if name in shares and isinstance(m, MoELayer)}
    # Where there are MoELayers, other routed modules (attention) compute everything anyway.
    counted = tuple((of_layers or shares).values())
    idle = sum((1 - share) * _size(layer.experts) for layer, share in of_layers.items())
    return Point(
        rule=rule,
        loss=loss,
        expert_share=sum(counted) / len(counted),
        layer_shares=counted,
        active_parameters=_size(model) - round(idle) if of_layers else None,
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
