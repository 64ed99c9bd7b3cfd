"""Peaks of memory, processes with their own allocator, rows that are kept, and requests that are refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moerouters.bench import measure, memory, rows
from moerouters.bench.case import Request
from moerouters.bench.job import allocators_of, make_request
from moerouters.bench.memory import peak_apart, peak_mib
from moerouters.bench.rows import Line, Result, Row, lines, read_lines, stamp
from moerouters.bench.shapes import SHAPES, Shape, named_shapes
from moerouters.bench.timing import Ratio, median_of, ratio_of
from moerouters.cli import app
from moerouters.errors import ConfigError, MoeroutersError

TINY = "T32-D8-E4-K2-F8-layers1"
_MIB = 2**18  # float32 numbers in one


def test_the_interval_of_a_median() -> None:
    known = median_of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (known.value, known.low, known.high) == (3.0, 1.0, 100.0)
    assert median_of([2.0] * 15) == Ratio(value=2.0, low=2.0, high=2.0)
    many = median_of([float(i) for i in range(1001)])
    assert 450 < many.low < many.value == 500 < many.high < 550
    assert many == median_of([float(i) for i in range(1001)])
    assert ratio_of([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]).value == 2.0


def test_a_peak_is_what_was_held_at_once() -> None:
    def run() -> torch.Tensor:
        a, b = torch.empty(3 * _MIB), torch.empty(2 * _MIB)
        del a
        c = torch.empty(4 * _MIB)
        del b
        return c

    held = torch.empty(_MIB)
    assert peak_mib(run, held.device) == pytest.approx(6, abs=0.01)


def test_kept_workspaces_count_and_what_was_there_does_not() -> None:
    kept: list[torch.Tensor] = []
    before = torch.ones(8 * _MIB)

    def run() -> None:
        kept[:] = kept or [torch.empty(2 * _MIB)]
        (before[: 3 * _MIB] + 1).sum()

    assert peak_mib(run, before.device) == pytest.approx(5, abs=0.01)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_process_of_its_own(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense MLP's peak follows from its sizes: six tensors [T, K F] with what backward makes of them, at least."""
    monkeypatch.setattr(memory.multiprocessing, "get_all_start_methods", lambda: [method])
    shape = Shape(name="s", T=256, D=64, E=4, K=2, F=128, layers=1)
    request = Request(subject="layer", shapes=(shape,), threads=1)
    peak = peak_apart(request, 1, "dense_wide")
    assert peak is not None
    wide = 4 * shape.T * shape.K * shape.F / 2**20
    assert 4 * wide < peak < 9 * wide
    assert peak_apart(request, 1, "tutel") is None


@pytest.mark.slow
def test_a_child_for_memory_and_one_for_time(capfd: pytest.CaptureFixture[str]) -> None:
    request = make_request("router", shapes=TINY, impl="topk", rounds=3, threads=1)
    found, skipped = measure.measure_apart(request, ("tuned",))
    assert not skipped
    assert {row.allocator for row in found} == {"tuned"}
    assert all(row.peak_mib is not None for row in found)
    assert "forward+backward: peak memory" in capfd.readouterr().err


def test_each_child_has_its_allocator_and_no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    class Child:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            seen.append({name: value for name, value in env.items() if name.startswith(("MALLOC_", "OMP_"))})
            Path(command[3]).with_suffix(".answer").write_text('{"rows": [], "skipped": []}')

        def wait(self) -> int:
            return 0

        def kill(self) -> None:
            pass

    monkeypatch.setattr(measure.subprocess, "Popen", Child)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    measure.measure_apart(make_request("router", shapes=TINY, threads=3, memory=False), ("default", "tuned"))
    assert seen == [{"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "3", **measure.ALLOCATORS["tuned"]}]
    assert measure.ALLOCATORS["tuned"]


@pytest.mark.dist
def test_ranks_time_in_step() -> None:
    request = make_request("dispatch", shapes=TINY, impl="all_gather", rounds=2, threads=1, ranks=2)
    found, _ = measure.measure_apart(request, ("default",))
    assert {(row.impl, row.ranks) for row in found if row.passes == "combine"} == {("copy", 2), ("all_gather", 2)}


def test_a_child_that_dies_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.sys, "executable", "/bin/false")
    request = make_request("router", shapes=TINY, rounds=3, threads=1)
    with pytest.raises(MoeroutersError, match="ended with status 1") as raised:
        measure.measure_apart(request, ("default",))
    assert "--shapes" in str(raised.value)


def row_of(**changes: object) -> Row:
    told = {
        "subject": "layer", "shape": "tiny", "sizes": SHAPES["tiny"].sizes(), "impl": "moerouters", "pass": "forward",
        "dtype": "float32", "allocator": "default", "rounds": 15, "median_ms": 2.0, "low_ms": 1.0, "high_ms": 4.0,
        "over": {"gemm": Ratio(value=1.5, low=1.25, high=1.75)},
    }  # fmt: skip
    return Row.model_validate(told | changes)


def test_rows_have_the_promised_keys_and_come_back_from_a_file(tmp_path: Path) -> None:
    result = Result(run=stamp(kind="cpu", threads=1, note="n"), rows=(row_of(), row_of(impl="gemm", over={})))
    document = json.loads(result.model_dump_json(by_alias=True))
    promised = {"shape", "impl", "pass", "median_ms", "over_gemm", "over_dense_mlp", "peak_mib"}
    assert promised <= document["rows"][0].keys()
    assert document["rows"][0]["over_gemm"] == 1.5
    assert document["rows"][0]["over_dense_mlp"] is None
    kept = tmp_path / "kept.jsonl"
    kept.write_text(lines(result))
    read = read_lines(kept)
    assert [line.run for line in read] == [result.run] * 2
    assert [Row.model_validate(line.model_dump(by_alias=True)) for line in read] == list(result.rows)
    assert isinstance(read[0], Line)


def test_a_stamp_names_versions_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    made = stamp(kind="cpu", threads=2)
    assert made.versions["torch"] == torch.__version__
    assert made.device

    def missing(*arguments: object, **options: object) -> None:
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(rows.subprocess, "run", missing)
    assert stamp(kind="cpu", threads=2).commit == ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"subject": "layer", "shapes": "huge"}, "no shape 'huge'"),
        ({"subject": "layer", "shapes": "T8-E4"}, "no shape 'T8-E4'"),
        ({"subject": "layer", "shapes": "T8-E2-K3"}, "K > E"),
        ({"subject": "layer", "grow": "F"}, "'F' does not grow"),
        ({"subject": "layer", "grow": "T", "shapes": "tiny"}, "shapes of its own"),
        ({"subject": "layer", "ranks": 2}, "runs in one process"),
        ({"subject": "layer", "impl": "moerouters,hf"}, "no implementation 'hf'"),
        ({"subject": "layer", "dtype": "float8"}, "--dtype cannot be 'float8'"),
    ],
)
def test_requests_that_cannot_be(options: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make_request(**options)  # type: ignore[arg-type]


def test_shapes_and_allocators() -> None:
    (spelt_out,) = named_shapes("T8-E4-K2-F16-layers3", subject="layer", device="cpu")
    assert spelt_out.sizes() == {"T": 8, "D": 512, "E": 4, "K": 2, "F": 16, "layers": 3}
    assert [shape.name for shape in named_shapes(None, subject="layer", device="cpu")] == ["cpu-16", "cpu-64"]
    assert allocators_of("both", device="cuda") == ("default",)
    assert allocators_of("tuned", device="cpu") == ("tuned",)
    with pytest.raises(ConfigError, match="no allocator 'jemalloc'"):
        allocators_of("jemalloc", device="cpu")


def test_the_command(tmp_path: Path) -> None:
    written, kept = tmp_path / "r.json", tmp_path / "r.jsonl"
    command = ["bench", "layer", "--shapes", TINY, "--impl", "hf-grouped_mm,tutel", "--rounds", "3", "--threads", "1",
               "--allocator", "default", "--no-memory", "--json", str(written), "--keep", str(kept)]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "not installed" in done.stdout
    document = json.loads(written.read_text())
    assert {row["impl"] for row in document["rows"]} == {
        "gemm", "dense_rows", "dense_wide", "moerouters", "hf-grouped_mm",
    }  # fmt: skip
    assert len(read_lines(kept)) == len(document["rows"]) == 10
    refused = CliRunner().invoke(app, ["bench", "layer", "--json", str(tmp_path / "none" / "r.json")])
    assert refused.exit_code == 2
    assert "there is no folder" in refused.stderr
