"""The search for a size whose step takes as long as another model's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moerouters.bench.timing import Ratio
from moerouters.study.plan import Knob, Record

Measure = Callable[[int, int], Ratio]
"""From a size and a number of rounds to the ratio of step times, with its 95% interval."""


class Try(Record):
    """One size that was timed."""

    value: int
    rounds: int
    ratio: Ratio
    """Step time over that of the dense partner, measured in turn."""


class Match(Record):
    """What a search found."""

    knob: Knob
    value: int
    ratio: Ratio
    matched: bool
    """Whether the interval lies in the band."""
    tries: tuple[Try, ...]
    """In order; the first has the active width of the dense partner's MLP."""
    why: str | None = None
    """Why there is no match."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Sizes that can be, and when to stop. A step is taken to last longer the larger the size."""

    knob: Knob
    start: int
    multiple: int = 1
    lowest: int = 1
    rounds: int
    tries: int
    band: tuple[float, float]

    def run(self, measure: Measure) -> Match:
        """Time sizes until the interval of the ratio lies in the band, or none is left to try.

        While the interval reaches to both sides of 1, or out of the band, there are twice the rounds, twice at most.
        A match must hold twice: on a busy machine once is chance. The next size is where the line through the two
        nearest ones reaches 1.
        """
        taken: dict[int, Try] = {}
        value: int | None = max(self.start, self.lowest)
        while value is not None and len(taken) < self.tries:
            taken[value] = self._timed(measure, value)
            if self._matches(taken[value].ratio):
                break
            value = self._next(taken)
        best = min(taken.values(), key=lambda each: (not self._matches(each.ratio), abs(each.ratio.value - 1)))
        matched = self._matches(best.ratio)
        return Match(
            knob=self.knob,
            value=best.value,
            ratio=best.ratio,
            matched=matched,
            tries=tuple(taken.values()),
            why=None if matched else self._reason(best, taken),
        )

    def _timed(self, measure: Measure, value: int) -> Try:
        rounds, held = self.rounds, 0
        ratio = measure(value, rounds)
        while held < 2:
            held = held + 1 if self._matches(ratio) else 0
            if held == 0:
                if not self._undecided(ratio) or rounds >= 4 * self.rounds:
                    break
                rounds *= 2
            if held < 2:
                ratio = measure(value, rounds)
        return Try(value=value, rounds=rounds, ratio=ratio)

    def _matches(self, ratio: Ratio) -> bool:
        return self.band[0] <= ratio.low and ratio.high <= self.band[1]

    def _undecided(self, ratio: Ratio) -> bool:
        near = self.band[0] <= ratio.value <= self.band[1] or ratio.low < 1 < ratio.high
        return near and not self._matches(ratio)

    def _next(self, taken: dict[int, Try]) -> int | None:
        """An untried size, between the nearest ones on both sides of 1 if there are; None where nothing is left."""
        below = [value for value, each in taken.items() if each.ratio.value < 1]
        above = [value for value, each in taken.items() if each.ratio.value >= 1]
        least = max(below) + self.multiple if below else self.lowest
        most = min(above) - self.multiple if above else None
        # No more than fourfold: a line through two sizes that are close together may point anywhere.
        guess = self._rounded(min(self._guess(taken), 4 * max(taken)))
        guess = max(guess, least) if most is None else min(max(guess, least), most)
        return None if guess in taken or (most is not None and least > most) else guess

    def _guess(self, taken: dict[int, Try]) -> float:
        nearest = sorted(taken.values(), key=lambda each: abs(each.ratio.value - 1))
        first = nearest[0]
        for other in nearest[1:]:
            slope = (other.ratio.value - first.ratio.value) / (other.value - first.value)
            if slope > 0:
                return first.value + (1 - first.ratio.value) / slope
        # One size says no slope: as if all of the time grew with it, which goes too far for no size.
        return first.value / first.ratio.value

    def _rounded(self, value: float) -> int:
        return max(round(value / self.multiple), 1) * self.multiple

    def _reason(self, best: Try, taken: dict[int, Try]) -> str:
        low, high = self.band
        if best.value == self.lowest and best.ratio.value > high:
            return f"with the smallest {self.knob}, {best.value}, a step still takes {best.ratio.value:.2f} as long"
        if self._undecided(best.ratio):
            return f"the interval {best.ratio.low:.3f} to {best.ratio.high:.3f} stays wider than {low} to {high}"
        if len(taken) >= self.tries:
            sizes = f"{self.tries} sizes were" if self.tries > 1 else "one size was"
            return f"{sizes} tried; the nearest has {best.ratio.value:.3f}"
        return f"no {self.knob} lies between those with less and those with more than 1"
