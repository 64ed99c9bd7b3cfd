"""Local search: one task of one rank moves a few places, and the change stays if it ends earlier, or not much later."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from moerouters.pipeline.searching.problem import Order, Problem

_HEAT = 0.002
"""Share of the makespan by which a step may be worse, at first. On seven problems of 4 and 8 ranks it ended best or
level beside 0.01 and 0.03, which undo what the known schedules have right."""
_EVENNESS = 0.3
"""Weight of the mean end of ranks beside the makespan: it shows the way where the makespan alone is flat."""
_STEPS = (1, 1, 1, 2, 2, 3, 4, 6, 8)


def anneal(
    problem: Problem,
    orders: Sequence[Order],
    *,
    iterations: int,
    seed: int,
    bound: int,
    stop: Callable[[], bool],
) -> list[Order]:
    """The best orders met on a walk from `orders`, which can be run; they are never worse.

    It ends after so many steps, at `bound`, or when `stop()`.
    """
    generator = random.Random(seed)
    current = [list(order) for order in orders]
    energy, makespan = _energy(problem, current)
    best, least = [list(order) for order in current], (makespan, energy)
    for iteration in range(iterations):
        if least[0] <= bound or (iteration % 128 == 0 and stop()):
            break
        rank = generator.randrange(problem.num_ranks)
        before = current[rank]
        if not before:
            continue
        source = generator.randrange(len(before))
        target = source + generator.choice(_STEPS) * generator.choice((-1, 1))
        target = min(max(target, 0), len(before) - 1)
        if before[source] == before[target]:
            continue
        after = list(before)
        after.insert(target, after.pop(source))
        if not problem.allows(after):
            continue
        current[rank] = after
        new_energy, makespan = _energy(problem, current)
        heat = _HEAT * least[0] * (1 - iteration / iterations)
        if new_energy <= energy or (heat > 0 and generator.random() < math.exp((energy - new_energy) / heat)):
            energy = new_energy
            if (makespan, energy) < least:
                best, least = [list(order) for order in current], (makespan, energy)
        else:
            current[rank] = before
    return best


def _energy(problem: Problem, orders: list[Order]) -> tuple[float, float]:
    ends = problem.ends(orders)
    if ends is None:
        return math.inf, math.inf
    return max(ends) + _EVENNESS * sum(ends) / len(ends), max(ends)
