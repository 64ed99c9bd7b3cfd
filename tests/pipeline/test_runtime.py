"""A model on several ranks has the losses and gradients that it has on one, under every schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters.errors import ConfigError
from moerouters.pipeline import BUILDERS, StageGraph, build, cut, from_table
from moerouters_conformance.pool import rank_pool
from support.pipeline import texts_of, valid_rows
from support.pipeline_graphs import graphs
from support.pipeline_jobs import Case, alone, changing, evaluated, expect_same, peaks, piped, said

pytestmark = pytest.mark.dist

SIZES = [(name, P, 8 if "dualpipev" in name else 4) for name in BUILDERS for P in (2, 4)]


@pytest.mark.parametrize(("name", "P", "M"), SIZES)
def test_every_known_schedule(name: str, P: int, M: int) -> None:
    case = Case(build(name, P, M))
    expect_same(case, rank_pool().run(piped, case))


def test_several_steps_accumulate_and_a_batch_may_change_its_form() -> None:
    case = Case(build("zero-bubble-h1", 4, 4), steps=3)
    expect_same(case, rank_pool().run(piped, case))


@pytest.mark.parametrize("name", ["1f1b", "interleaved-1f1b", "dualpipev"])
def test_a_weight_of_two_stages(name: str) -> None:
    """1F1B: on two ranks. DualPipeV: the first and the last stage lie on one."""
    case = Case(build(name, 4, 8), tied=True, steps=2)
    expect_same(case, rank_pool().run(piped, case))


@pytest.mark.parametrize("name", ["1f1b", "zero-bubble-h1"])
def test_values_that_skip_stages_and_go_to_several(name: str) -> None:
    graph = StageGraph.of(
        ("input", ("residual", "a")),
        ("a", "b"),
        (("residual", "b", "extra"), "c"),
        (("c", "residual", "b"), ("y", "z")),
    )
    case = Case(build(name, 4, 4), graph=graph, steps=2)
    expect_same(case, rank_pool().run(piped, case))


@settings(max_examples=8)
@given(data=st.data())
def test_any_valid_table_and_graph(data: st.DataObject) -> None:
    rows, placement, microbatches = data.draw(valid_rows())
    schedule = from_table(texts_of(rows), placement=placement, num_microbatches=microbatches)
    case = Case(schedule, graph=data.draw(graphs(len(placement))))
    expect_same(case, rank_pool().run(piped, case))


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "zero-bubble-h1", "kimi-k2", "dualpipev"])
def test_what_a_program_holds_is_what_the_runtime_holds(name: str) -> None:
    schedule = build(name, 4, 8)
    for predicted, held, graphs_alive, left in rank_pool().run(peaks, schedule):
        assert held == predicted
        assert graphs_alive == predicted.activations  # of autograd, counted by the stages themselves
        assert left == 0


@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
def test_evaluation_is_the_forward_half_of_the_same_table(name: str) -> None:
    """Of any number of microbatches up to that of the schedule, between steps."""
    case = Case(build(name, 4, 8))
    (losses_M,), _ = alone(case)
    ((found, stepped),) = [each for each in rank_pool().run(evaluated, case) if each[1] is not None]
    for count, losses in zip((2, 1, 8), found, strict=True):
        torch.testing.assert_close(losses, losses_M[:count], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stepped, losses_M, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("schedules", "ScheduleError: ranks do not run the same schedule.\n"),
        ("ranks", "ConfigError: the schedule '1f1b' is for 2 ranks.\n  cause  the group has 4\n"),
        ("stages", "ConfigError: there are 3 stages.\n"),
        ("shared", "ConfigError: stage {rank} has no parameter 'no'.\n"),
        ("name", "ConfigError: the batch has no 'target'.\n"),
        ("rows", "ConfigError: 'target' has 3 rows.\n"),
        ("count", "ConfigError: 3 microbatches cannot be evaluated at once.\n"),
    ],
)
def test_what_cannot_run_is_refused(what: str, expected: str) -> None:
    for rank, found in enumerate(rank_pool().run(said, what)):
        assert found.startswith(expected.format(rank=rank)), found


def test_a_stage_that_gives_something_else_than_the_graph_says() -> None:
    for found in rank_pool().run(said, "outputs"):
        assert found.startswith("ShapeError: stage 0 gave Tensor.\n  from   task 0F0\n")


def test_a_form_that_changes_with_the_data_ends_the_pipeline() -> None:
    for first, second in rank_pool().run(changing):
        assert first.startswith(
            "task 0F0 of stage 0 gave hidden0[0] as float32 [4, 4]; in earlier steps it was float32 [2, 4]"
        )
        assert "stopped in an earlier step" in second


def test_layers_are_cut_into_runs() -> None:
    layers = torch.nn.Sequential(*[torch.nn.Linear(1, 1) for _ in range(7)])
    parts = cut(layers, 3)
    assert [len(part) for part in parts] == [3, 2, 2]
    assert [layer for part in parts for layer in part] == list(layers)
    for number in (0, 8):
        with pytest.raises(ConfigError, match="7 layers cannot be cut"):
            cut(layers, number)
