"""Every Triton kernel compiles for every target, spills nothing, and fits; see `compiled`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import compiled
from .compiled import RESULTS, SHARED_KB, Row, listed

MODULE = "tests.kernels.compiled"
ROOT = Path(__file__).parents[2]
MATRIX_UNIT = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
GEMMS = {"up_kernel", "rows_kernel", "hidden_kernel", "weight_kernel"}


def compile_in_a_process(speed: str) -> list[Row]:
    """Without TRITON_INTERPRET, which this process was started with."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", MODULE, "--speed", speed, "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Row(**json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("speed", ["fast", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_compile_spill_nothing_and_fit(speed: str) -> None:
    rows = compile_in_a_process(speed)
    cases = [case for case in listed() if case.slow == (speed == "slow")]
    assert len(rows) == sum(len(case.targets) for case in cases) > 0
    assert [row for row in rows if row.spills] == []
    assert [row for row in rows if row.shared_bytes > SHARED_KB[row.target] * 1024] == []
    # A multiprocessor has 65536 registers for all threads of a program, a SIMD of CDNA 512 for each lane.
    assert [row for row in rows if row.registers * row.threads > 65536 and not row.target.startswith("gfx")] == []
    if speed == "fast":
        assert {row.target for row in rows} == set(SHARED_KB)
        slower = [row for row in rows if row.kernel in GEMMS and row.matrix_unit != MATRIX_UNIT[row.target]]
        assert slower == []
    import triton

    kept = json.loads(RESULTS.read_text(encoding="utf-8"))
    if kept["triton"] == triton.__version__:
        measured = [compiled.kept(row) for row in rows]
        names = {compiled.key(row) for row in measured}
        committed = [row for row in kept["rows"] if compiled.key(row) in names]
        assert committed == measured, f"stale: python -m {MODULE} --speed {speed} --write"


def test_every_kernel_is_listed() -> None:
    kernels = ROOT / "moerouters" / "kernels"
    sources = [path.read_text(encoding="utf-8") for path in sorted(kernels.rglob("*.py"))]
    defined = {
        line.removeprefix("def ").partition("(")[0]
        for source in sources
        for line in source.splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert defined > GEMMS
    assert {case.kernel.__name__ for case in listed()} == defined


def test_a_spilling_kernel_would_be_seen() -> None:
    log = "ptxas info : 24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads\nUsed 255 registers, used 1"
    assert compiled.nvidia_report(log) == (255, 24)
    assembly = "  .private_segment_fixed_size: 12\n  .vgpr_count:     256\n  .vgpr_spill_count: 3\n"
    assert compiled.amd_report(assembly) == (256, 12)
