"""The known schedules against published tables, closed formulas, PyTorch's own tables, and each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters.errors import ConfigError
from moerouters.pipeline import BUILDERS, Schedule, build, check, simulate
from support.pipeline import is_valid, rows_of, text

PLAIN = ("gpipe", "1f1b", "eager-1f1b")
sizes = st.tuples(st.integers(1, 6), st.integers(1, 12))

# JaxPP's tables under unit costs (a whole backward takes 2): (makespan, bubble to 4 digits, peaks) by (P, M).
ORACLE: dict[str, dict[tuple[int, int], tuple[int, float, list[int]]]] = {
    "gpipe": {(4, 8): (33, 0.2727, [8] * 4), (4, 16): (57, 0.1579, [16] * 4), (8, 32): (117, 0.1795, [32] * 8)},
    "1f1b": {
        (4, 8): (33, 0.2727, [4, 3, 2, 1]),
        (4, 16): (57, 0.1579, [4, 3, 2, 1]),
        (8, 32): (117, 0.1795, [8, 7, 6, 5, 4, 3, 2, 1]),
    },
    "eager-1f1b": {
        (4, 8): (33, 0.2727, [7, 5, 3, 1]),
        (4, 16): (57, 0.1579, [7, 5, 3, 1]),
        (8, 32): (117, 0.1795, [15, 13, 11, 9, 7, 5, 3, 1]),
    },
    "zero-bubble-h1": {(4, 8): (27, 0.1111, [4] * 4), (4, 16): (51, 0.0588, [4] * 4), (8, 32): (103, 0.068, [8] * 8)},
    "interleaved-1f1b": {
        (4, 8): (57, 0.1579, [11, 9, 7, 5]),
        (4, 16): (105, 0.0857, [11, 9, 7, 5]),
        (8, 32): (213, 0.0986, [23, 21, 19, 17, 15, 13, 11, 9]),
    },
    "kimi-k2": {
        (4, 8): (57, 0.1579, [12, 10, 8, 6]),
        (4, 16): (105, 0.0857, [12, 10, 8, 6]),
        (8, 32): (213, 0.0986, [24, 22, 20, 18, 16, 14, 12, 10]),
    },
    "dualpipev": {(4, 8): (53, 0.0943, [9] * 4), (4, 16): (101, 0.0495, [9] * 4), (8, 32): (207, 0.0725, [17] * 8)},
}


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, row in ORACLE.items() for size in row], ids=str)
def test_published_table(name: str, size: tuple[int, int]) -> None:
    P, M = size
    makespan, bubble, peaks = ORACLE[name][size]
    schedule = build(name, P, M)
    simulation = simulate(schedule)
    assert (simulation.makespan, round(float(simulation.bubble), 4)) == (makespan, bubble)
    assert list(simulation.peak_live) == peaks
    tasks_a_microbatch = 3 if BUILDERS[name].splits_backward else 2
    assert len(simulation.tasks) == tasks_a_microbatch * M * schedule.num_stages


@settings(max_examples=25)
@given(sizes)
def test_closed_formulas_of_plain_schedules(size: tuple[int, int]) -> None:
    P, M = size
    peaks = {"gpipe": [M] * P, "1f1b": [P - r for r in range(P)], "eager-1f1b": [2 * (P - r) - 1 for r in range(P)]}
    for name in PLAIN:
        simulation = simulate(build(name, P, M))
        assert simulation.makespan == 3 * (M + P - 1)
        assert simulation.bubble * (M + P - 1) == P - 1
        assert list(simulation.peak_live) == [min(M, peak) for peak in peaks[name]]


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(0, 8))
def test_closed_formulas_of_zero_bubble_h1(P: int, more: int) -> None:
    simulation = simulate(build("zero-bubble-h1", P, P + more))
    assert simulation.makespan == 3 * (P + more) + P - 1
    assert list(simulation.peak_live) == [P] * P


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_closed_formulas_of_interleaved_schedules(P: int, rounds: int, v: int) -> None:
    M = P * rounds
    for name in ("interleaved-1f1b", "kimi-k2", "interleaved-gpipe"):
        simulation = simulate(build(name, P, M, v))
        assert simulation.makespan == 3 * v * M + 3 * (P - 1)
        assert simulation.bubble * (v * M + P - 1) == P - 1
        first = {"interleaved-1f1b": 0, "kimi-k2": 1, "interleaved-gpipe": M * v}[name]
        peaks = [min(M * v, (v - 1) * P + 2 * (P - 1 - r) + 1 + first) for r in range(P)]
        assert list(simulation.peak_live) == peaks


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(0, 5))
def test_dualpipev_holds_what_it_promises(P: int, more: int) -> None:
    for name in ("dualpipev", "dualpipev-filled"):
        simulation = simulate(build(name, P, 2 * P + more))
        assert set(simulation.peak_live) == {2 * P + 1}
    assert simulate(build("dualpipev-filled", 4, 8 + more)).makespan == 6 * (8 + more) + 3


@pytest.mark.parametrize("name", BUILDERS)
def test_every_size_that_is_built_can_run(name: str) -> None:
    built = 0
    for P in range(1, 5):
        for M in range(1, 10):
            for v in (1, 2, 3) if BUILDERS[name].chunks is None else (None,):
                try:
                    schedule = build(name, P, M, v)
                except ConfigError:
                    continue
                built += 1
                check(schedule)
                assert is_valid(rows_of(schedule), schedule.placement, M)
                assert schedule.num_stages == P * (v or BUILDERS[name].chunks or 0)
    assert built >= 18


def test_sizes_that_are_not_built() -> None:
    with pytest.raises(ConfigError, match="there is no schedule 'f1b1'"):
        build("f1b1", 4, 8)
    with pytest.raises(ConfigError, match="1f1b cannot have 2 chunks a rank"):
        build("1f1b", 4, 8, 2)
    with pytest.raises(ConfigError, match="each is at least 1"):
        build("interleaved-1f1b", 4, 8, 0)
    with pytest.raises(ConfigError, match=r"(?s)cannot run 9 microbatches on 4 ranks.*take a multiple of 4"):
        build("interleaved-1f1b", 4, 9)
    with pytest.raises(ConfigError, match="take at least 8 microbatches"):
        build("dualpipev", 4, 7)


def torch_rows(class_name: str, P: int, M: int, v: int) -> list[list[str]]:
    """The table of a schedule class of torch's, its idle steps and reductions left out."""
    from torch.distributed.pipelining import schedules

    stages = [
        SimpleNamespace(stage_index=i, num_stages=P * v, group_size=P, group_rank=0, submod=None, has_backward=True)
        for i in range(v)
    ]
    made: Any = getattr(schedules, class_name)(stages[0] if v == 1 else stages, M, loss_fn=lambda out, target: out)
    order = made._get_pipeline_order() if v == 1 else made.pipeline_order
    return [[str(act) for act in order[r] if act is not None and "REDUCE" not in str(act)] for r in range(P)]


TORCH = {"gpipe": ("ScheduleGPipe", 1), "1f1b": ("Schedule1F1B", 1), "interleaved-1f1b": ("ScheduleInterleaved1F1B", 2)}


@pytest.mark.parametrize("name", TORCH)
def test_tables_equal_those_of_torch(name: str) -> None:
    class_name, v = TORCH[name]
    for P, M in ((2, 4), (4, 8), (4, 12), (3, 6)):
        ours = [[str(item) for item in items] for items in build(name, P, M, v).ranks]
        theirs = torch_rows(class_name, P, M, v)
        if name == "1f1b":  # torch 2.13 numbers the forwards of the last rank from 1
            assert theirs.pop()[0] == f"{P - 1}F1" and ours.pop()[0] == f"{P - 1}F0"
        assert ours == theirs


def test_dualpipev_in_deepseeks_order_is_that_of_torch() -> None:
    """torch writes both halves of a backward that follow each other as one, we as two: the order is the same."""
    for P, M in ((2, 4), (4, 8), (3, 8)):
        ours = [[step for item in row for step in item] for row in rows_of(build("dualpipev-filled", P, M))]
        theirs = []
        for row in torch_rows("ScheduleDualPipeV", P, M, 2):
            cells = [part for cell in row for part in cell.removesuffix("OVERLAP_F_B").strip("()").split(";")]
            theirs.append([cell.replace("B", half) for cell in cells for half in ("IW" if "B" in cell else "F")])
        assert [[text(step) for step in row] for row in ours] == theirs


def test_equal_arguments_give_equal_schedules() -> None:
    one: Schedule = build("dualpipev", 4, 8)
    assert one == build("dualpipev", 4, 8) and hash(one) == hash(build("dualpipev", 4, 8))
