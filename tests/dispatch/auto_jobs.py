"""What the ranks of test_auto.py do: a module that they can import."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from moerouters import RouteContext, shard_experts
from moerouters.dispatch.auto import AutoDispatcher
from moerouters.dispatch.cost import Line, Speeds, measure

from .parity import Case, forced_ids, found, group_of, hidden, layer_of, pull

FREE, DEAR = Line(0.0, 1e12), Line(1.0, 1e12)


def speeds_for(name: str) -> Speeds:
    """What makes one back-end the cheapest. Of a padded and an all_to_all batch the latter waits for the host."""
    return Speeds(
        all_to_all=DEAR if name == "all_gather" else FREE,
        all_gather=FREE if name != "all_to_all" else DEAR,
        reduce_scatter=FREE if name == "all_gather" else DEAR,
        host_wait_s=1e-3,
        flops_per_s=1e12,
    )


def steps(rank: int, cases: list[tuple[Case, Speeds | None]]) -> list[tuple[str | None, dict[str, Tensor]]]:
    """For each case what was chosen, and the step."""
    return [_step(case, speeds) for case, speeds in cases]


def _step(case: Case, speeds: Speeds | None) -> tuple[str | None, dict[str, Tensor]]:
    group = group_of(case.group_size)
    layer = shard_experts(layer_of(case), group, dispatcher="auto", chunks=case.chunks)
    auto = layer.dispatcher
    assert isinstance(auto, AutoDispatcher) and auto.chosen is None
    auto.speeds = speeds
    x_TD = hidden(case, group.rank())
    y_TD = layer(x_TD, RouteContext(forced_ids_TK=forced_ids(case, group.rank()))).hidden
    (y_TD * pull(case, group.rank())).sum().backward()
    return auto.chosen, found(layer, x_TD, y_TD, group)


def logged(rank: int, case: Case) -> list[str]:
    """What the logger of the package says during two forwards of one layer."""
    texts: list[str] = []
    logger = logging.getLogger("moerouters")
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        group = group_of(case.group_size)
        model = torch.nn.ModuleDict({"moe": layer_of(case)})
        shard_experts(model, group, dispatcher="auto")
        for _ in range(2):
            model["moe"](hidden(case, group.rank()))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return texts


def measured(rank: int) -> list[Speeds]:
    """Of groups of 2 and 4 ranks."""
    return [measure(group_of(size), repeats=1) for size in (2, 4)]
