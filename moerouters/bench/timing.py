"""Interleaved timing: every candidate takes its turn in every round, so a slow spell of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
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


class Ratio(BaseModel):
    """A median over rounds, and how far it is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float
    """The 95% interval of the median, by bootstrap over rounds."""


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    peer: str,
    device: torch.device,
    rounds: int = 31,
    sample_s: float = 0.02,
) -> dict[str, Timing]:
    """The times of `take_rounds` as ratios to one of the candidates."""
    samples = take_rounds(candidates, wait=waiting(device), rounds=rounds, sample_s=sample_s)
    return {name: _timing(taken, samples[peer]) for name, taken in samples.items()}


def take_rounds(
    candidates: Mapping[str, Callable[[], object]],
    *,
    wait: Callable[[], object],
    rounds: int,
    sample_s: float = 0.02,
    agree: Callable[[float], float] = lambda seconds: seconds,
) -> dict[str, list[float]]:
    """Seconds per call of each candidate in each round, starting with another candidate each time.

    A sample has as many calls as last about sample_s. `wait` returns when work is done; it is called before and after a
    sample, not between its calls. agree: for ranks that talk, the same number on all of them, so that they call as
    often as each other.
    """
    clocks = {name: _Sampler(run, wait) for name, run in candidates.items()}
    # The same number of calls for all, so that what a sample costs besides them is the same.
    calls = max(1, round(sample_s / max(clock.warm_up(agree) for clock in clocks.values())))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(clocks[name].sample(calls))
    return samples


def waiting(device: torch.device) -> Callable[[], object]:
    """What to call before the clock is read."""
    return partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def median_of(values: Sequence[float], *, draws: int = 2000) -> Ratio:
    """The median and its 95% bootstrap interval (Efron 1979, percentile method); the same numbers give the same."""
    taken = np.asarray(values, dtype=float)
    redrawn = np.random.default_rng(0).choice(taken, (draws, taken.size))
    low, high = np.percentile(np.median(redrawn, axis=1), [2.5, 97.5])
    return Ratio(value=float(np.median(taken)), low=float(low), high=float(high))


def ratio_of(taken: Sequence[float], peer: Sequence[float]) -> Ratio:
    """Of times in the same rounds: the median of the quotients within each."""
    return median_of([mine / theirs for mine, theirs in zip(taken, peer, strict=True)])


class _Sampler:
    def __init__(self, run: Callable[[], object], wait: Callable[[], object]) -> None:
        self._run = run
        self._wait = wait

    def warm_up(self, agree: Callable[[float], float]) -> float:
        """Seconds of one call, after some that nobody counts: three, of slow ones one."""
        if agree(self.sample(1)) < 0.2:
            self.sample(2)
            return agree(self.sample(3))
        return agree(self.sample(1))

    def sample(self, calls: int) -> float:
        """Seconds per call."""
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            self._run()
        self._wait()
        return (time.perf_counter() - start) / calls


def _timing(taken: list[float], peer: list[float]) -> Timing:
    ratios = [mine / theirs for mine, theirs in zip(taken, peer, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Timing(median_ms=1e3 * statistics.median(taken), ratio=middle, low=low, high=high)
