"""Measuring this machine: what ranks find, how a cluster is fitted to it, and real layers beside simulated ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moerouters.bench.shapes import Shape
from moerouters.cli import app
from moerouters.errors import MoeroutersError
from moerouters.planning import calibrate as calibration
from moerouters.planning import validation
from moerouters.planning.calibrate import Measured, best_of, fitted
from moerouters.planning.cluster import Cluster, Link, find_cluster
from moerouters.planning.ranks import on_ranks
from moerouters.planning.validation import COMPARED, Compared, simulated
from moerouters_conformance.pool import WORLD_SIZE, rank_pool

from . import rank_jobs as jobs

SHAPE = Shape(name="tiny", T=32, D=16, E=8, K=2, F=16, layers=1)
COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")


def world(ranks: int, *, share: float = 1.0, latency: float = 1e-3) -> Measured:
    """What `ranks` of a machine with these rates find, each keeping a share of them."""
    several = ranks > 1
    return Measured.model_validate(
        {
            "ranks": ranks,
            "flops_per_s": share * 1e10,
            "memory_bytes_per_s": share * 1e9,
            "forward_s": 1e-3 / share,
            "backward_s": 2e-3 / share,
            "latency_s": dict.fromkeys(COLLECTIVES, latency) if several else {},
            "bytes_per_s": dict(zip(COLLECTIVES, (share * 4e8, share * 2e8, share * 1e8, share * 8e8), strict=True))
            if several
            else {},
        }
    )


def test_a_cluster_explains_the_worlds_it_was_fitted_to() -> None:
    found = fitted([world(1), world(2), world(4, share=0.5, latency=5e-3)], device="cpu", name="here")
    assert found.flops_per_s == pytest.approx(1e10) and found.memory_bytes_per_s == pytest.approx(1e9)
    assert (found.forward_s, found.backward_s) == (pytest.approx(1e-3), pytest.approx(2e-3))
    assert found.intra.bytes_per_s == pytest.approx(4e8)
    assert found.intra.latency_s == pytest.approx(1e-3) and found.intra.message_s == pytest.approx(2e-3)
    assert found.efficiency == pytest.approx(dict(zip(COLLECTIVES, (1, 0.5, 0.25, 2), strict=True)))
    assert found.processors == 2 and found.ranks_per_node == 4 and "1, 2, 4 ranks over gloo" in found.source


def test_one_rank_alone_has_no_link() -> None:
    found = fitted([world(1)], device="cuda", name="here")
    assert found.processors is None and found.flops_per_s == 1e10 and not found.efficiency


def test_ranks_measure_alike() -> None:
    found = rank_pool().run(jobs.measured)
    assert all(each == found[0] for each in found) and found[0].ranks == WORLD_SIZE
    for rate in (found[0].flops_per_s, found[0].memory_bytes_per_s, *found[0].bytes_per_s.values()):
        assert 1e5 < rate < 1e14
    for seconds in (found[0].forward_s, found[0].backward_s, *found[0].latency_s.values()):
        assert 0 <= seconds < 60
    assert set(found[0].latency_s) == set(COLLECTIVES)


def test_layers_of_all_back_ends_are_timed_and_their_rows_counted() -> None:
    runs = [(SHAPE, backend) for backend in COMPARED]
    found = rank_pool().run(jobs.layers, runs)
    assert all(each == found[0] for each in found)
    for forward_s, both_s, rows in found[0]:
        assert 0 < forward_s < 60 and 0 < both_s < 60
        assert SHAPE.N <= rows <= WORLD_SIZE * SHAPE.N
    assert len({rows for _, _, rows in found[0][:3]}) == 1  # the same tokens and router


def test_simulated_time_is_that_of_the_stages() -> None:
    cluster = Cluster(
        name="x", ranks_per_node=2, intra=Link(latency_s=1.0, bytes_per_s=1e30), flops_per_s=1e30,
        memory_bytes_per_s=1e30, forward_s=0.25, backward_s=0.5, processors=1,
    )  # fmt: skip
    assert simulated(cluster, SHAPE, "local", 1, 64.0, number_bytes=4) == (pytest.approx(0.25), pytest.approx(0.5))
    # Counts, rows there, rows back; their gradients. Two ranks share a processor.
    assert simulated(cluster, SHAPE, "all_to_all", 2, 64.0, number_bytes=4) == (pytest.approx(3.5), pytest.approx(3.0))


def test_errors_are_relative_to_what_was_measured() -> None:
    row = Compared(
        shape="a", sizes={}, ranks=2, backend="padded", imbalance=1.0, measured_ms=(1.0, 4.0), simulated_ms=(1.0, 3.0)
    )
    assert row.error == pytest.approx(-0.25)


def test_the_better_of_two_passes_is_kept() -> None:
    slow, fast = world(2, share=0.5, latency=2e-3), world(2)
    assert best_of(slow, fast) == best_of(fast, slow) == fast
    assert best_of(world(1), world(1)) == world(1)


@pytest.mark.dist
def test_ranks_answer_in_order() -> None:
    assert on_ranks(jobs.number, 2, 10) == [10, 11]


@pytest.mark.dist
@pytest.mark.slow
def test_failures_of_ranks_are_told() -> None:
    with pytest.raises(MoeroutersError, match="rank 1 of 2 raised ValueError: rank one will not"):
        on_ranks(jobs.raising, 2)
    with pytest.raises(MoeroutersError, match="rank 1 of 2 died"):
        on_ranks(jobs.dying, 2)


def test_the_command_writes_a_cluster_that_simulates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ranks that need not be started."""

    def found(job: object, ranks: int, *args: object, device: str) -> list[object]:
        if job is calibration.measure_here:
            return [world(ranks, share=min(1.0, 2 / ranks))]
        runs = args[0]
        assert isinstance(runs, list)
        return [[(1e-3, 2e-3, 64.0) for _ in runs]]

    monkeypatch.setattr(calibration, "on_ranks", found)
    monkeypatch.setattr(validation, "on_ranks", found)
    path = tmp_path / "here.json"
    run = CliRunner(env={"COLUMNS": "120"}).invoke(
        app, ["simulate", "--calibrate", "--compare", "--output", str(path), "--device", "cpu"]
    )
    assert run.exit_code == 0, run.output
    assert "10 GFLOP/s" in run.output and "tensor_sliced" in run.output and "few tokens" in run.output
    cluster = find_cluster(str(path))
    assert cluster.name == "here" and cluster.ranks_per_node == 4
    again = CliRunner().invoke(
        app, ["simulate", "--cluster", str(path), "--shape", "T64-D16-E8-K2-F16", "--ranks", "2,4", "--bits", "32"]
    )
    assert again.exit_code == 0, again.output
