"""Schedules of one stage a rank: GPipe, 1F1B, eager 1F1B, zero bubble H1."""

from __future__ import annotations

from collections.abc import Callable

from moerouters.pipeline.builders.row import BACKWARD, FORWARD, INPUT, WEIGHT, Row
from moerouters.pipeline.schedule import Schedule, plain_placement


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019)."""
    return _forwards_first("gpipe", num_ranks, num_microbatches, lambda rank: num_microbatches)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """P - r forwards on rank r, then backward and forward in turn (PipeDream-Flush, Narayanan et al. 2021)."""
    return _forwards_first("1f1b", num_ranks, num_microbatches, lambda rank: num_ranks - rank)


def eager_one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """2(P - r) - 1 forwards first: transfers hide behind them, for about twice the live activations (JaxPP)."""
    return _forwards_first("eager-1f1b", num_ranks, num_microbatches, lambda rank: 2 * (num_ranks - rank) - 1)


def _forwards_first(name: str, num_ranks: int, num_microbatches: int, warmup: Callable[[int], int]) -> Schedule:
    """warmup(r) forwards on rank r, then backward and forward in turn, then the backwards that are left."""
    ranks = []
    for rank in range(num_ranks):
        row = Row(num_microbatches)
        row.run(rank, *[FORWARD] * warmup(rank))
        row.run(rank, *[BACKWARD, FORWARD] * num_microbatches)
        ranks.append(tuple(row.items))
    placement = plain_placement(num_ranks)
    return Schedule(name=name, num_microbatches=num_microbatches, placement=placement, ranks=tuple(ranks))


def zero_bubble_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B with split backwards, whose weight halves fill the bubble (Qi et al. 2023, arXiv:2401.10241)."""
    ranks = []
    for rank in range(num_ranks):
        row = Row(num_microbatches)
        row.run(rank, *[FORWARD] * (num_ranks - rank))
        row.run(rank, *[INPUT, FORWARD] * rank)  # r weight halves are put off: so many gradients leave rank r earlier
        row.run(rank, *[INPUT, WEIGHT, FORWARD] * num_microbatches)
        row.run(rank, *[WEIGHT] * rank)
        ranks.append(tuple(row.items))
    placement = plain_placement(num_ranks)
    return Schedule(name="zero-bubble-h1", num_microbatches=num_microbatches, placement=placement, ranks=tuple(ranks))
