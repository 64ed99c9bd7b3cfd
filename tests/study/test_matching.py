"""The search on step times that are known: ratio = fixed + size * slope, with or without noise."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerouters.bench.timing import Ratio
from moerouters.study.matching import Search
from support.study import around

SEARCH = Search(knob="expert_size", start=64, multiple=4, lowest=4, rounds=10, tries=8, band=(0.95, 1.05))


def line(fixed: float, slope: float, half: float = 0.005) -> Callable[[int, int], Ratio]:
    return lambda value, rounds: around(fixed + slope * value, half)


def test_a_first_try_that_matches_is_the_last() -> None:
    match = SEARCH.run(line(0.36, 0.01))
    assert (match.matched, match.value, len(match.tries), match.why) == (True, 64, 1, None)


@pytest.mark.parametrize("slope", [0.001, 0.004, 0.02])
@pytest.mark.parametrize("fixed", [0.3, 0.6, 0.85])
def test_finds_the_size_where_the_line_reaches_one(fixed: float, slope: float) -> None:
    match = SEARCH.run(line(fixed, slope))
    best = (1 - fixed) / slope
    assert match.value % 4 == 0
    near = slope * abs(match.value - best)
    assert match.matched == (near <= 0.045)
    if not match.matched:  # the nearest multiples of 4 on both sides are too far off
        assert near <= 4 * slope and "lies between" in str(match.why)


@given(fixed=st.floats(0.05, 1.5), slope=st.floats(1e-4, 0.05), start=st.integers(1, 64))
def test_never_looks_at_a_size_twice_and_says_why_not(fixed: float, slope: float, start: int) -> None:
    search = Search(knob="expert_size", start=4 * start, multiple=4, lowest=4, rounds=10, tries=8, band=(0.95, 1.05))
    match = search.run(line(fixed, slope))
    values = [each.value for each in match.tries]
    assert len(set(values)) == len(values) <= 8
    assert match.value in values and values[0] == 4 * start
    assert match.matched is (match.why is None)
    assert match.matched is (match.ratio.low >= 0.95 and match.ratio.high <= 1.05)
    assert all(abs(match.ratio.value - 1) <= abs(each.ratio.value - 1) or match.matched for each in match.tries)


def test_a_step_that_is_too_long_at_any_size_is_no_match() -> None:
    match = SEARCH.run(line(1.2, 0.01))
    assert (match.matched, match.value) == (False, 4)
    assert match.why == "with the smallest expert_size, 4, a step still takes 1.24 as long"


def test_a_wide_interval_gets_more_rounds_before_it_is_given_up() -> None:
    asked: list[int] = []

    def noisy(value: int, rounds: int) -> Ratio:
        asked.append(rounds)
        return around(1.0, 0.6 / rounds)

    match = SEARCH.run(noisy)
    assert (asked, match.matched, match.tries[0].rounds) == ([10, 20, 20], True, 20)
    hopeless = SEARCH.run(lambda value, rounds: around(1.0, 0.2))
    assert not hopeless.matched and "stays wider than" in str(hopeless.why)


def test_a_match_must_hold_twice() -> None:
    found = iter([1.0, 1.2, 1.0, 1.0])
    match = SEARCH.run(lambda value, rounds: around(next(found)))
    assert match.matched and [each.ratio.value for each in match.tries] == [1.2, 1.0]


def test_one_that_does_not_hold_gets_more_rounds() -> None:
    asked: list[int] = []
    found = iter([around(1.0), around(1.0, 0.2), around(1.0), around(1.0, 0.1), around(1.0, 0.1)])

    def wandering(value: int, rounds: int) -> Ratio:
        asked.append(rounds)
        return next(found)

    search = Search(knob="expert_size", start=64, multiple=4, lowest=4, rounds=10, tries=1, band=(0.95, 1.05))
    match = search.run(wandering)
    assert (asked, match.matched) == ([10, 10, 20, 20, 40], False)


def test_layers_are_searched_one_by_one() -> None:
    search = Search(knob="num_layers", start=4, rounds=5, tries=8, band=(0.9, 1.1))
    match = search.run(line(0.1, 0.15))
    assert (match.value, match.matched) == (6, True)


def test_it_stops_after_so_many_tries() -> None:
    search = Search(knob="expert_size", start=4, multiple=4, lowest=4, rounds=5, tries=2, band=(0.95, 1.05))
    match = search.run(line(0.01, 0.0001))
    assert len(match.tries) == 2 and str(match.why).startswith("2 sizes were tried")
