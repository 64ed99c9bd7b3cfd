"""The search against brute force, the known schedules, and its own promises."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters.errors import ConfigError, ScheduleError
from moerouters.pipeline import Link, Network, StageCost, build, check, search, simulate
from moerouters.pipeline.schedule import interleaved_placement, plain_placement
from moerouters.pipeline.searching.greedy import Rule, greedy, list_schedule
from moerouters.pipeline.searching.problem import BACKWARD, FORWARD, INPUT, WEIGHT, Order, Problem, make_problem

WHOLE = StageCost(forward=1, backward=2, input_backward=None, weight_backward=None)
split_costs = st.builds(
    StageCost, forward=st.integers(1, 5), input_backward=st.integers(1, 5), weight_backward=st.integers(0, 5)
)
whole_costs = st.builds(
    StageCost,
    forward=st.integers(1, 5),
    backward=st.integers(1, 5),
    input_backward=st.none(),
    weight_backward=st.none(),
)


def problem_of(costs: list[StageCost], M: int, *, max_live: int, latency: int = 0) -> Problem:
    """One stage a rank."""
    P = len(costs)
    return make_problem(
        plain_placement(P),
        P,
        M,
        max_live=max_live,
        costs=costs,
        network=Network(link=Link(latency=latency)),
        split=costs[0].input_backward is not None,
    )


def all_orders(stage: int, M: int, kinds: tuple[int, ...], max_live: int) -> list[Order]:
    """Every order of one stage's tasks: no kind gets ahead of the one before it, within memory."""
    found: list[Order] = []

    def extend(order: Order, counts: list[int]) -> None:
        if counts == [M] * len(kinds):
            found.append(order)
        for at, kind in enumerate(kinds):
            ahead = counts[at - 1] if at else min(M, counts[-1] + max_live)
            if counts[at] < ahead:
                extend([*order, (stage, kind)], [count + (at == i) for i, count in enumerate(counts)])

    extend([], [0] * len(kinds))
    return found


def brute_force(costs: list[StageCost], M: int, *, max_live: int, latency: int) -> Fraction:
    """The shortest makespan of all tables."""
    problem = problem_of(costs, M, max_live=max_live, latency=latency)
    orders = [all_orders(stage, M, problem.kinds, max_live) for stage in range(len(costs))]
    ends = (problem.ends(combination) for combination in itertools.product(*orders))
    return Fraction(min(max(end) for end in ends if end is not None), problem.unit)


def test_brute_force_goes_through_all_orders() -> None:
    """Words in which no letter gets ahead of the one before: 5 and 42 with three letters (standard Young tableaux)."""
    counts = {M: len(all_orders(0, M, (FORWARD, INPUT, WEIGHT), M)) for M in (1, 2, 3)}
    assert counts == {1: 1, 2: 5, 3: 42}
    assert len(all_orders(0, 3, (FORWARD, BACKWARD), 1)) == 1


@settings(max_examples=40)
@given(
    st.lists(split_costs, min_size=2, max_size=2) | st.lists(whole_costs, min_size=2, max_size=2),
    st.integers(2, 3),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_nothing_beats_it_on_two_ranks(costs: list[StageCost], M: int, max_live: int, latency: int) -> None:
    network = Network(link=Link(latency=latency))
    found = search(2, M, max_live=max_live, costs=costs, network=network, iterations=1500)
    assert found.best.simulation.makespan == brute_force(costs, M, max_live=max_live, latency=latency)
    assert found.lower_bound is not None and found.lower_bound <= found.best.simulation.makespan


@pytest.mark.parametrize("max_live", [1, 2])
def test_nothing_beats_it_on_three_ranks(max_live: int) -> None:
    for costs in ([StageCost()] * 3, [StageCost(forward=2, input_backward=3, weight_backward=1 + s) for s in range(3)]):
        found = search(3, 2, max_live=max_live, costs=costs, iterations=1500)
        assert found.best.simulation.makespan == brute_force(costs, 2, max_live=max_live, latency=0)


@pytest.mark.parametrize("M", [2, 3])
def test_it_finds_the_zero_bubble_optimum(M: int) -> None:
    """Rank 1 starts after one forward and has 3M to do: 3M + 1, which zero bubble reaches with 2 activations."""
    best = search(2, M, max_live=2).best
    assert best.simulation.makespan == brute_force([StageCost()] * 2, M, max_live=2, latency=0) == 3 * M + 1


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), split_costs | whole_costs)
def test_it_is_never_worse_than_a_known_schedule_that_fits(
    P: int, M: int, max_live: int, chunks: int, costs: StageCost
) -> None:
    found = search(P, M, max_live=max_live, costs=costs, max_chunks=chunks, iterations=60)
    best = found.best
    assert best.fits and best.peak <= max_live
    check(best.schedule, max_live=max_live * best.num_chunks)
    assert best.schedule.num_ranks == P and best.schedule.num_microbatches == M
    assert best.schedule.num_stages == P * best.num_chunks
    for entry in found.builders:
        assert entry.fits == (max(entry.simulation.peak_live) <= max_live * entry.num_chunks)
        assert not entry.fits or best.simulation.makespan <= entry.simulation.makespan
    assert found.lower_bound is not None and best.simulation.makespan >= found.lower_bound


def test_chunks_and_a_v_shape_do_away_with_the_bubble_in_1f1bs_memory() -> None:
    """As zero bubble V does (arXiv:2401.10241, section 6): the last rank waits for three half forwards, and no more."""
    found = search(4, 8, max_live=4, max_chunks=2)
    assert found.best.simulation.makespan == found.lower_bound == Fraction(51, 2)
    assert found.best.num_chunks == 2
    assert search(4, 8, max_live=4).best.simulation.makespan == 27


def test_memory_below_that_of_every_known_schedule() -> None:
    found = search(4, 8, max_live=3, iterations=3000)
    assert not any(entry.fits for entry in found.builders)
    assert found.best.schedule.name == "search" and found.best.simulation.makespan <= 32


def test_the_same_seed_finds_the_same_schedule() -> None:
    costs = StageCost(forward=10, input_backward=12, weight_backward=8)
    one, two = (search(3, 5, max_live=3, costs=costs, seed=7, iterations=500) for _ in range(2))
    assert one.best.schedule == two.best.schedule and one.ended and two.ended


def test_time_can_run_out() -> None:
    found = search(4, 8, max_live=4, costs=StageCost(forward=3, input_backward=4, weight_backward=2), seconds=0)
    assert not found.ended
    assert found.best.simulation.makespan == min(e.simulation.makespan for e in found.builders if e.fits)


def test_a_cheap_whole_backward_is_not_split() -> None:
    """Two kernels in one may cost less than apart; then tables of both kinds are searched."""
    cheap = search(2, 3, max_live=2, costs=StageCost(backward=1), iterations=300)
    assert cheap.best.simulation.makespan == 2 * (3 + 1) and cheap.lower_bound is None
    assert {task.kind.letter for _, task in cheap.best.schedule.tasks()} == {"F", "B"}
    whole = search(2, 3, max_live=1, costs=WHOLE, iterations=300)
    assert {task.kind.letter for _, task in whole.best.schedule.tasks()} == {"F", "B"}
    assert all("zero" not in entry.schedule.name for entry in whole.builders)


def test_floats_and_fractions_are_costs_too() -> None:
    thirds = search(2, 2, max_live=2, costs=StageCost(forward=Fraction(1, 3)), iterations=100)
    floats = search(2, 2, max_live=2, costs=StageCost(forward=1 / 3), iterations=100)
    expected = brute_force([StageCost(forward=Fraction(1, 3))] * 2, 2, max_live=2, latency=0)
    assert thirds.best.simulation.makespan == expected == Fraction(17, 3)
    assert floats.best.simulation.makespan == pytest.approx(float(thirds.best.simulation.makespan))


def test_what_cannot_be_searched() -> None:
    with pytest.raises(ScheduleError, match="no schedule fits in 0 live activations"):
        search(2, 2, max_live=0)
    with pytest.raises(ConfigError, match="cannot search with 0 ranks"):
        search(0, 2, max_live=1)
    with pytest.raises(ConfigError, match="a link from rank 0 to rank 2"):
        search(2, 2, max_live=1, network=Network(links={(0, 2): Link(latency=1)}))
    with pytest.raises(ConfigError, match="costs of 3 stages"):
        search(2, 2, max_live=1, costs=[StageCost()] * 3)


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.data())
def test_times_of_orders_are_those_of_their_tables(P: int, M: int, v: int, latency: int, data: st.DataObject) -> None:
    costs = data.draw(st.lists(split_costs, min_size=P * v, max_size=P * v))
    network = Network(link=Link(latency=latency))
    placement = interleaved_placement(P, v)
    problem = make_problem(placement, P, M, max_live=v * M, costs=costs, network=network, split=True)
    live, put_off = st.integers(v, v * M), st.integers(0, M)
    rule = Rule(tuple(data.draw(live) for _ in range(P)), tuple(data.draw(put_off) for _ in range(P)))
    orders = list_schedule(problem, rule)
    if orders is None:
        return
    assert all(problem.allows(order) for order in orders)
    schedule = problem.schedule(orders, "mine")
    assert problem.orders(schedule) == orders
    ends = problem.ends(orders)
    simulation = simulate(schedule, costs, network)
    assert ends is not None and Fraction(max(ends), problem.unit) == simulation.makespan
    assert simulation.makespan >= problem.lower_bound() / problem.unit
    assert all(peak <= most for peak, most in zip(simulation.peak_live, rule.live, strict=True))


def test_orders_that_no_rank_may_take() -> None:
    problem = problem_of([StageCost()] * 2, 2, max_live=1)
    F, I, W = ((0, kind) for kind in problem.kinds)  # noqa: E741
    assert problem.allows([F, I, W, F, I, W])
    assert not problem.allows([F, F, I, I, W, W])  # two activations
    assert not problem.allows([F, W, I, F, I, W])
    assert not problem.allows([I, F, W, F, I, W])
    fine, hanging = [F, I, W, F, I, W], [(1, kind) for _, kind in (F, I, W, F, I, W)]
    assert problem.ends([fine, hanging]) is not None
    assert problem.ends([[I, F, W, F, I, W], hanging]) is None


def test_list_scheduling_without_an_end_is_no_start() -> None:
    """A chunk for which no room is kept: the first chunk fills the rank, and its second never runs."""
    problem = make_problem(
        interleaved_placement(1, 2), 1, 2, max_live=1, costs=[StageCost()] * 2, network=Network(), split=True
    )
    assert greedy(problem, trials=3, seed=0, stop=lambda: False) is None


def test_tables_as_orders() -> None:
    whole, split = problem_of([WHOLE] * 2, 2, max_live=2), problem_of([StageCost()] * 2, 2, max_live=2)
    table = build("1f1b", 2, 2)
    assert whole.orders(table) == [
        [(0, kind) for kind in (FORWARD, FORWARD, BACKWARD, BACKWARD)],
        [(1, kind) for kind in (FORWARD, BACKWARD) * 2],
    ]
    assert (split.orders(table) or [])[1] == [(1, kind) for kind in (FORWARD, INPUT, WEIGHT) * 2]
    assert whole.orders(build("zero-bubble-h1", 2, 2)) is None
