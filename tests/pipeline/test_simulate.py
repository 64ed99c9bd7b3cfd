"""Times, bubbles and memory against the longest path, and what costs, links and overlap change."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters.errors import ConfigError, ScheduleError
from moerouters.pipeline import BUILDERS, Link, Network, Simulation, StageCost, build, from_table, simulate
from support.pipeline import Rows, Step, peak_live, rows_of, texts_of, times, valid_rows

costs = st.builds(
    StageCost,
    forward=st.integers(0, 4),
    input_backward=st.integers(0, 4),
    weight_backward=st.integers(0, 4) | st.fractions(0, 2, max_denominator=3),
    backward=st.none() | st.integers(0, 6),
)
latencies = st.integers(0, 3)


def cost_function(stages: list[StageCost]) -> Any:
    def cost(step: Step) -> Any:
        stage = stages[step[0]]
        whole = stage.backward if stage.backward is not None else stage.input_backward + stage.weight_backward  # type: ignore[operator]
        return {"F": stage.forward, "B": whole, "I": stage.input_backward, "W": stage.weight_backward}[step[1]]

    return cost


def times_of(simulation: Simulation) -> dict[Step, tuple[Any, Any]]:
    return {(e.task.stage, e.task.kind.letter, e.task.microbatch): (e.start, e.end) for e in simulation.tasks}


@settings(max_examples=60)
@given(valid_rows(), st.data())
def test_times_are_the_longest_paths(made: tuple[Rows, tuple[int, ...], int], data: st.DataObject) -> None:
    rows, placement, _ = made
    P, stages = len(rows), data.draw(st.lists(costs, min_size=len(placement), max_size=len(placement)))
    latency = {(a, b): data.draw(latencies) for a in range(P) for b in range(P) if a != b}
    links = {pair: Link(latency=value) for pair, value in latency.items()}
    simulation = simulate(from_table(texts_of(rows)), stages, Network(links=links))

    expected = times(rows, len(placement), cost_function(stages), lambda a, b: latency.get((a, b), 0))
    assert times_of(simulation) == expected
    assert [e.rank for e in simulation.tasks] == [placement[e.task.stage] for e in simulation.tasks]
    makespan = max(end for _, end in expected.values())
    busy = sum(end - start for start, end in expected.values())
    assert simulation.makespan == makespan
    assert simulation.bubble == (1 - Fraction(busy) / (P * makespan) if makespan else 0)
    assert list(simulation.peak_live) == [peak_live(row) for row in rows]


@settings(max_examples=60)
@given(valid_rows(), st.data())
def test_overlapped_items_start_as_one_and_end_with_the_longer_half(
    made: tuple[Rows, tuple[int, ...], int], data: st.DataObject
) -> None:
    rows, placement, _ = made
    stages = data.draw(st.lists(costs, min_size=len(placement), max_size=len(placement)))
    schedule = from_table(texts_of(rows))
    simulation = simulate(schedule, stages, overlap=True)
    time = times_of(simulation)
    free = dict.fromkeys(range(len(rows)), 0)
    busy: Any = 0
    for place in sorted(schedule.places.values(), key=lambda place: (place.rank, place.position)):
        if place.index:
            continue
        item = rows[place.rank][place.position]
        start, end = min(time[step][0] for step in item), max(time[step][1] for step in item)
        assert start >= free[place.rank]
        for lane in ("F", "BIW") if len(item) > 1 else ("FBIW",):
            mine = [time[step] for step in item if step[1] in lane]
            assert all(one[1] <= two[0] for one, two in pairwise(mine))
        free[place.rank] = end
        busy += end - start
    assert simulation.makespan == max(free.values())
    if simulation.makespan:
        assert simulation.bubble == 1 - Fraction(busy) / (len(rows) * simulation.makespan)


def test_overlap_hides_the_shorter_half() -> None:
    schedule = from_table([["0F0", "0F1", "(0F2;0B0)", "(0F3;0B1)", "0B2", "0B3"]])
    apart, together = simulate(schedule), simulate(schedule, overlap=True)
    assert (apart.makespan, together.makespan) == (12, 10)
    assert (apart.bubble, together.bubble) == (0, 0)
    fused = [(e.start, e.end) for e in together.tasks if str(e.task) in ("0F2", "0B0")]
    assert fused == [(2, 3), (2, 4)]
    assert (apart.peak_live, together.peak_live) == ((3,), (3,))
    assert simulate(from_table([["0F0", "(0B0;0F1)", "0B1"]]), overlap=True).peak_live == (2,)


def test_dualpipev_gains_by_overlap() -> None:
    schedule = build("dualpipev", 4, 8)
    assert simulate(schedule, overlap=True).makespan < simulate(schedule).makespan


def test_links_cost_latency_and_size_over_bandwidth() -> None:
    schedule = from_table([["0F0", "0B0"], ["1F0", "1B0"]])
    free = simulate(schedule)
    assert free.makespan == 6
    network = Network(link=Link(latency=1, bandwidth=3), links={(1, 0): Link(latency=2)}, size=1)
    slow = simulate(schedule, network=network)
    assert slow.makespan == 6 + 1 + Fraction(1, 3) + 2
    assert simulate(schedule, network=Network(link=Link(latency=0.5))).makespan == 7.0
    assert Link(latency=1, bandwidth=0.5).time(3) == 7.0


def test_stages_of_one_rank_hand_over_for_nothing() -> None:
    table = [["0F0", "1F0", "1B0", "0B0"]]
    assert simulate(from_table(table), network=Network(link=Link(latency=100))).makespan == 6


@pytest.mark.parametrize("name", BUILDERS)
def test_integers_stay_integers_and_floats_floats(name: str) -> None:
    schedule = build(name, 2, 4)
    exact = simulate(schedule)
    assert isinstance(exact.makespan, int) and isinstance(exact.bubble, Fraction)
    rounded = simulate(schedule, StageCost(forward=1.0))
    assert isinstance(rounded.makespan, float) and isinstance(rounded.bubble, float)
    assert rounded.makespan == exact.makespan and rounded.bubble == pytest.approx(float(exact.bubble))
    unit = times(rows_of(schedule), schedule.num_stages, lambda step: 2 if step[1] == "B" else 1)
    assert times_of(exact) == unit


def test_no_costs_no_bubble() -> None:
    nothing = StageCost(forward=0, input_backward=0, weight_backward=0)
    simulation = simulate(build("1f1b", 2, 2), nothing)
    assert (simulation.makespan, simulation.bubble) == (0, 0)


def test_costs_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="costs of 3 stages"):
        simulate(build("1f1b", 2, 2), [StageCost()] * 3)
    whole = StageCost(backward=2, input_backward=None, weight_backward=None)
    assert simulate(build("1f1b", 2, 2), whole).makespan == 9
    with pytest.raises(ConfigError, match="the costs of a stage have no input-backward"):
        simulate(build("zero-bubble-h1", 2, 2), whole)
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"a forward takes {wrong}"):
            StageCost(forward=wrong)
        with pytest.raises(ConfigError, match=f"a transfer takes {wrong}"):
            Link(latency=wrong)
        with pytest.raises(ConfigError, match=f"a transfer has size {wrong}"):
            Network(size=wrong)
    with pytest.raises(ConfigError, match="a link from rank 5 to rank 0"):
        simulate(build("1f1b", 2, 2), network=Network(links={(5, 0): Link(latency=1)}))
    with pytest.raises(ConfigError, match="a bandwidth is 0"):
        Link(bandwidth=0)


def test_only_what_can_run_is_simulated() -> None:
    with pytest.raises(ScheduleError, match="task 0B0 is missing"):
        simulate(from_table([["0F0"]]))
