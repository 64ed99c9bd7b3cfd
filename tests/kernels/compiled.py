"""Every Triton kernel compiled ahead of time, for GPUs that are not here: registers, spills and shared memory.

A test file of kernels lists what is launched in `COMPILED`, as `Case`s or as plain tuples in a Case's order. They are
compiled in a process without TRITON_INTERPRET, which turns kernels into something that no compiler takes:

    python -m tests.kernels.compiled [PART OF A FILE'S NAME] [--speed fast] [--json] [--write]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "docs" / "benchmarks" / "kernels.json"

SHARED_KB = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
"""What one program may have at most. sm_80 has 163; its blocks also run on sm_86, sm_89 and sm_120, which have 99."""


class Case(NamedTuple):
    """A kernel as it is launched. Types of the signature are Triton's; ":16" says that an integer is a multiple of 16,
    which holds for every pointer. Arguments that stand nowhere are None."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: Mapping[str, int] = MappingProxyType({})
    targets: tuple[str, ...] = tuple(SHARED_KB)
    note: str = ""
    """Which of several ways to launch it this is."""
    slow: bool = False
    """Compiled by the slow tests alone."""


class Row(NamedTuple):
    """What one kernel needs on one target."""

    kernel: str
    note: str
    target: str
    threads: int
    registers: int
    """Per thread."""
    spills: int
    """Bytes per thread that go to memory as registers ran out: stores and loads (NVIDIA), or room for them (AMD)."""
    shared_bytes: int
    matrix_unit: str
    """The instruction that multiplies tiles, if any."""
    seconds: float


def listed(only: str = "") -> list[Case]:
    """What the test files of this folder list, or those with `only` in their name."""
    files = sorted(path.stem for path in HERE.glob("test_*.py") if path.stem != "test_compiled" and only in path.stem)
    modules = [importlib.import_module(f"{__package__}.{name}") for name in files]
    return [Case(*case) for module in modules for case in getattr(module, "COMPILED", [])]


def compile_all(cases: list[Case]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # what a cache holds has no assembler's report
        for case in cases:
            for target in case.targets:
                yield compile_one(case, target)


def compile_one(case: Case, target: str) -> Row:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = case.kernel
    number = target.removeprefix("sm_")
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(number), 32)
    types = {name: case.signature.get(name, "constexpr") for name in kernel.arg_names}
    constants = {name: case.constexprs.get(name) for name, kind in types.items() if kind == "constexpr"}
    multiples = [i for i, kind in enumerate(types.values()) if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        kernel,
        {name: kind.removesuffix(":16") for name, kind in types.items()},
        constants,
        {(i,): [["tt.divisibility", 16]] for i in multiples},
    )
    knobs.compilation.always_compile = True
    knobs.nvidia.dump_ptxas_log = True
    log, start = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=gpu, options=dict(case.options))
    seconds = time.perf_counter() - start
    registers, spills = amd_report(compiled.asm["amdgcn"]) if gpu.backend == "hip" else nvidia_report(log.getvalue())
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    units = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")
    unit = next((unit for unit in units if unit in text), "")
    threads = case.options.get("num_warps", 4) * gpu.warp_size
    shared = compiled.metadata.shared
    return Row(kernel.__name__, case.note, target, threads, registers, spills, shared, unit, round(seconds, 1))


def nvidia_report(log: str) -> tuple[int, int]:
    """From `ptxas -v`: registers, and bytes of spill stores and loads."""
    stored, loaded = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()  # type: ignore[union-attr]
    return int(re.search(r"Used (\d+) registers", log).group(1)), int(stored) + int(loaded)  # type: ignore[union-attr]


def amd_report(assembly: str) -> tuple[int, int]:
    """From the kernel's metadata: vector and accumulation registers together, and bytes of memory private to a lane.

    Spilled scalars are no cost of that kind: they go to lanes of a vector register.
    """
    counts = {name: int(count) for name, count in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    return counts["vgpr_count"], counts["private_segment_fixed_size"]


def main() -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "interpreted kernels cannot be compiled"
    sys.path.insert(0, str(HERE.parent))  # test files import what supports them from here, as under pytest
    parser = argparse.ArgumentParser(description="Compile kernels ahead of time.")
    parser.add_argument("only", nargs="?", default="", help="a part of the test file's name")
    parser.add_argument("--speed", choices=["fast", "slow"], help="the cases of the fast or of the slow tests alone")
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    wanted = parser.parse_args()
    cases = [case for case in listed(wanted.only) if wanted.speed in (None, "slow" if case.slow else "fast")]
    for row in compile_all(cases):
        print(json.dumps(row._asdict()) if wanted.json else line(row), flush=True)
        if wanted.write:
            write(row)


def write(row: Row) -> None:
    """Put a row into the committed results, which lose what is no longer listed or came from another triton."""
    import triton

    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"triton": ""}
    rows = [*(old["rows"] if old["triton"] == triton.__version__ else []), kept(row)]
    found = {key(known): known for known in rows}
    wanted = [(case.kernel.__name__, case.note, target) for case in listed() for target in case.targets]
    text = ",\n".join(json.dumps(found[name]) for name in wanted if name in found)
    RESULTS.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{text}\n]}}\n', encoding="utf-8")


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """What a row is found by."""
    return row["kernel"], row["note"], row["target"]


def kept(row: Row) -> dict[str, Any]:
    """What is the same on every machine."""
    return {key: value for key, value in row._asdict().items() if key != "seconds"}


def line(row: Row) -> str:
    return (
        f"{f'{row.kernel} {row.note}'.strip():48} {row.target:7} {row.registers:4} registers {row.spills:5} spilled "
        f"{row.shared_bytes / 1024:6.1f} KB {row.matrix_unit:16} {row.seconds:5.1f} s"
    )


if __name__ == "__main__":
    main()
