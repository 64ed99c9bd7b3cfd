"""From a trainer's history to the numbers of one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

from moerouters.lab.history import History
from moerouters.lab.results import LayerBalance, RunResult, WorstLayer
from moerouters.lab.roster import Entrant
from moerouters.lab.train import Validation
from moerouters.metrics import RunBalance
from moerouters.registry import info
from moerouters.registry.configs import make_config

_WARM_UP = 3
"""Steps whose time is not counted: allocators, thread pools and kernels start up in them."""


def measure(
    entrant: Entrant,
    history: History,
    *,
    seed: int,
    status: Literal["completed", "interrupted", "failed"],
    parameters: int,
    validation: Validation | None = None,
    error: str | None = None,
    history_file: str | None = None,
) -> RunResult:
    """The record of a run from what is known of it; metrics without data are None."""
    loss = None if validation is None else validation.loss
    return RunResult(
        router=entrant.name,
        label=entrant.label,
        config=make_config(info(entrant.name).spec, entrant.overrides).model_dump(mode="json"),
        seed=seed,
        status=status,
        error=error,
        steps=len(history),
        perplexity=None if loss is None else math.exp(loss),
        bits_per_byte=None if loss is None else loss / math.log(2),
        max_vio_global=None if validation is None else validation.max_vio,
        parameters=parameters,
        history=history_file,
        provenance=entrant.provenance,
        **_metrics(history),
    )


def _metrics(history: History) -> dict[str, Any]:
    if not len(history):
        names = ("avg_max_vio", "sup_max_vio", "min_vio", "dead_experts", "micro_avg_max_vio", "micro_sup_max_vio")
        return dict.fromkeys((*names, "worst_layer", "layers", "train_loss", "step_ms", "router_share"))
    tensors = history.tensors()
    layers = _layers(tensors["loads"], tensors["micro_max_vio"])
    step_ms, router_ms = tensors["step_ms"], tensors["router_ms"]
    timed = slice(_WARM_UP if len(history) > 2 * _WARM_UP else 0, None)
    last = max(1, len(history) // 10)
    return {
        "avg_max_vio": _mean(layers.avg_max_vio),
        "sup_max_vio": _mean(layers.sup_max_vio),
        "min_vio": _mean(layers.min_vio),
        "dead_experts": sum(layers.dead_experts),
        "micro_avg_max_vio": _mean(layers.micro_avg_max_vio),
        "micro_sup_max_vio": _mean(layers.micro_sup_max_vio),
        "worst_layer": _worst(layers),
        "layers": layers,
        "train_loss": float(tensors["train_loss"][-last:].mean()),
        "step_ms": float(step_ms[timed].median()),
        "router_share": float(router_ms[timed].sum() / step_ms[timed].sum()),
    }


def _layers(loads_SLE: torch.Tensor, micro_max_vio_SAL: torch.Tensor) -> LayerBalance:
    balance = RunBalance.of(loads_SLE)
    return LayerBalance(
        avg_max_vio=tuple(balance.avg_max_vio),
        sup_max_vio=tuple(balance.sup_max_vio),
        min_vio=tuple(balance.last_min_vio),
        dead_experts=tuple(balance.last_dead_experts),
        micro_avg_max_vio=tuple(micro_max_vio_SAL.mean(dim=(0, 1)).tolist()),
        micro_sup_max_vio=tuple(micro_max_vio_SAL.amax(dim=(0, 1)).tolist()),
    )


def _worst(layers: LayerBalance) -> WorstLayer:
    worse: dict[str, Callable[..., Any]] = {"min_vio": min}
    return WorstLayer(**{name: worse.get(name, max)(getattr(layers, name)) for name in LayerBalance.model_fields})


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)
