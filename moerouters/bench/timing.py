"""Interleaved timing: every candidate takes its turn in every round, so a slow spell of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from pydantic import BaseModel, ConfigDict


class Timing(BaseModel):
    """Of one candidate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median_ms: float
    """Of one call."""
    ratio: float
    """To the peer: median over rounds of the quotient within the round."""
    low: float
    high: float
    """The middle half of those quotients."""


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    peer: str,
    device: torch.device,
    rounds: int = 31,
    sample_s: float = 0.02,
) -> dict[str, Timing]:
    """Time each candidate in each round, a sample of calls lasting about sample_s, starting with another one each time.

    On a GPU a sample is synchronised before and after, not between its calls.
    """
    clocks = {name: _Sampler(run, device) for name, run in candidates.items()}
    # The same number of calls for all, so that what a sample costs besides them is the same.
    calls = max(1, round(sample_s / max(clock.warm_up() for clock in clocks.values())))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(clocks[name].sample(calls))
    return {name: _timing(taken, samples[peer]) for name, taken in samples.items()}


class _Sampler:
    def __init__(self, run: Callable[[], object], device: torch.device) -> None:
        self._run = run
        self._device = device

    def warm_up(self) -> float:
        """Seconds of one call, after some that nobody counts."""
        self.sample(3)
        return self.sample(3)

    def sample(self, calls: int) -> float:
        """Seconds per call."""
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            self._run()
        self._wait()
        return (time.perf_counter() - start) / calls

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _timing(taken: list[float], peer: list[float]) -> Timing:
    ratios = [mine / theirs for mine, theirs in zip(taken, peer, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Timing(median_ms=1e3 * statistics.median(taken), ratio=middle, low=low, high=high)
