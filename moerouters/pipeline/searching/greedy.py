"""List scheduling: a free rank takes the most urgent task at hand, by a rule of a few numbers that are then varied."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

from moerouters.pipeline.searching.problem import FORWARD, WEIGHT, Order, Problem


@dataclass(frozen=True, slots=True)
class Rule:
    """Two numbers a rank. It runs a weight half if it has put off more than `put_off` of them, else a backward, else a
    forward if it holds fewer than `live` activations, else any weight half that is left."""

    live: tuple[int, ...]
    put_off: tuple[int, ...]


def greedy(problem: Problem, *, trials: int, seed: int, stop: Callable[[], bool]) -> list[Order] | None:
    """The best orders of rules near those behind the known schedules; None if no rule leads to an end.

    It ends after so many rules beside the first ones, or when it has orders and `stop()`.
    """
    generator = random.Random(seed)
    rules = _first_rules(problem)
    best: tuple[int, Rule, list[Order]] | None = None
    for trial in range(len(rules) + trials):
        if best is not None and stop():
            break
        if trial < len(rules):
            rule = rules[trial]
        elif best is None:
            return None
        else:
            rule = _varied(best[1], problem, generator)
        orders = list_schedule(problem, rule)
        if orders is None:
            continue
        ends = problem.ends(orders)
        if ends is not None and (best is None or max(ends) <= best[0]):
            best = max(ends), rule, orders
    return None if best is None else best[2]


def list_schedule(problem: Problem, rule: Rule) -> list[Order] | None:
    """The orders that follow from a rule; None if the ranks come to wait for each other for ever."""
    return _Run(problem, rule).orders()


def _first_rules(problem: Problem) -> list[Rule]:
    """As much as fits, 1F1B's and eager 1F1B's warm-up; weight halves at once, after r (as H1), or when all is done."""
    P, most, never = problem.num_ranks, problem.max_live, problem.num_microbatches * len(problem.placement)
    warmups = ([most] * P, [P - rank for rank in range(P)], [2 * (P - rank) - 1 for rank in range(P)])
    put_offs = ((0,) * P, tuple(range(P)), (never,) * P)
    return [Rule(tuple(min(most, n) for n in live), put_off) for live in warmups for put_off in put_offs]


def _varied(rule: Rule, problem: Problem, generator: random.Random) -> Rule:
    """One or two numbers changed a little."""
    live, put_off = list(rule.live), list(rule.put_off)
    for _ in range(generator.choice((1, 1, 2))):
        rank, step = generator.randrange(problem.num_ranks), generator.choice((-2, -1, 1, 2))
        if generator.random() < 0.5:
            live[rank] = min(max(live[rank] + step, 1), problem.max_live)
        else:
            put_off[rank] = max(0, min(put_off[rank], problem.num_microbatches) + step)
    return Rule(tuple(live), tuple(put_off))


class _Run:
    """One list scheduling, event by event."""

    def __init__(self, problem: Problem, rule: Rule) -> None:
        self.problem, self.rule = problem, rule
        ranks, stages = range(problem.num_ranks), problem.placement
        self.done = [[0, 0, 0, 0] for _ in stages]
        self.inputs: list[list[int]] = [[] for _ in stages]  # when the forward of each microbatch can start
        self.gradients: list[list[int]] = [[] for _ in stages]  # and its backward
        self.inputs[0] = [0] * problem.num_microbatches
        self.free = [0 for _ in ranks]
        self.live = [0 for _ in ranks]
        self.weights = [0 for _ in ranks]  # weight halves put off
        self.taken: list[Order] = [[] for _ in ranks]
        self.events = [(0, rank) for rank in ranks]  # a heap of (time, rank that may have something to do then)

    def orders(self) -> list[Order] | None:
        while self.events:
            now, rank = heapq.heappop(self.events)
            if self.free[rank] <= now:
                task = self._pick(rank, now)
                if task is not None:
                    self._take(rank, *task, now)
        total = len(self.problem.kinds) * self.problem.num_microbatches
        ended = all(
            len(order) == total * len(stages) for order, stages in zip(self.taken, self.problem.stages, strict=True)
        )
        return self.taken if ended else None

    def _pick(self, rank: int, now: int) -> tuple[int, int] | None:
        stages, done, back = self.problem.stages[rank], self.done, self.problem.gradient
        put_off = next(((stage, WEIGHT) for stage in stages if done[stage][WEIGHT] < done[stage][back]), None)
        if self.weights[rank] > self.rule.put_off[rank]:
            return put_off
        for stage in stages:
            if _at_hand(self.gradients[stage], done[stage][back], now):
                return stage, back
        for after, stage in enumerate(reversed(stages)):  # each later chunk keeps room for one activation
            if (
                _at_hand(self.inputs[stage], done[stage][FORWARD], now)
                and self.live[rank] + after < self.rule.live[rank]
            ):
                return stage, FORWARD
        return put_off if self.weights[rank] else None

    def _take(self, rank: int, stage: int, kind: int, now: int) -> None:
        problem = self.problem
        end = self.free[rank] = now + problem.costs[stage][kind]
        self.done[stage][kind] += 1
        self.taken[rank].append((stage, kind))
        heapq.heappush(self.events, (end, rank))
        self.live[rank] += (kind == FORWARD) - (kind == problem.kinds[-1])
        if WEIGHT in problem.kinds:
            self.weights[rank] += (kind == problem.gradient) - (kind == WEIGHT)
        if kind == FORWARD:
            self._arrive(self.inputs, stage, stage + 1, end) if stage + 1 < len(problem.placement) else (
                self.gradients[stage].append(end)
            )
        elif kind == problem.gradient and stage > 0:
            self._arrive(self.gradients, stage, stage - 1, end)

    def _arrive(self, what: list[list[int]], source: int, target: int, end: int) -> None:
        sender, receiver = self.problem.placement[source], self.problem.placement[target]
        time = end + self.problem.transfers[sender][receiver]
        what[target].append(time)
        heapq.heappush(self.events, (time, receiver))


def _at_hand(arrivals: list[int], number: int, now: int) -> bool:
    return number < len(arrivals) and arrivals[number] <= now
