"""What benchmarks write: rows, each with the run that measured it - device, versions and commit."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, computed_field

from moerouters.bench.timing import Ratio

_VERSIONS = ("moerouters", "torch", "triton", "transformers", "tutel", "scattermoe", "sonicmoe", "megablocks")


class Row(BaseModel):
    """One implementation at one shape."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    subject: str
    shape: str
    sizes: dict[str, int]
    grows: str = ""
    impl: str
    passes: str = Field(alias="pass")
    dtype: str
    allocator: str
    ranks: int = 1
    rounds: int
    median_ms: float
    """Of one call."""
    low_ms: float
    high_ms: float
    """The 95% bootstrap interval of the median."""
    over: dict[str, Ratio]
    """Ratios of time, by what they are to."""
    peak_mib: float | None = None
    """Highest sum of what the allocator handed out, kept workspaces included; weights and inputs are not in it."""
    values: dict[str, float] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def over_gemm(self) -> float | None:
        """To dense GEMMs of the same FLOPs."""
        return self._over("gemm")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def over_dense_mlp(self) -> float | None:
        """To a dense SwiGLU MLP of the same FLOPs: on T * K rows or K times as wide, whichever is faster."""
        return self._over("dense_mlp")

    def _over(self, peer: str) -> float | None:
        return self.over[peer].value if peer in self.over else None


class Stamp(BaseModel):
    """Where, with what and of what a run was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str
    kind: Literal["cpu", "cuda"]
    threads: int
    versions: dict[str, str]
    commit: str
    """Of the checkout that holds the package, `-dirty` with changes; empty outside of one."""
    date: str
    note: str = ""


class Skipped(BaseModel):
    """An implementation that was not timed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: str
    impl: str
    why: str


class Result(BaseModel):
    """What `--json` writes."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    schema_: Literal["moerouters.bench/1"] = Field(default="moerouters.bench/1", alias="schema")
    run: Stamp
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...] = ()


class Line(Row):
    """A row as it is kept in a file of JSON lines."""

    run: Stamp


def as_lines(result: Result) -> list[Line]:
    """The rows of a result, each complete in itself."""
    return [Line(run=result.run, **row.model_dump(by_alias=True)) for row in result.rows]


def written(lines: Iterable[Line]) -> str:
    """As JSON lines."""
    return "".join(line.model_dump_json(by_alias=True, exclude_none=True) + "\n" for line in lines)


def lines(result: Result) -> str:
    """The rows of a result as JSON lines."""
    return written(as_lines(result))


def read_lines(path: Path) -> list[Line]:
    """What was `written`, of one run or several."""
    return [Line.model_validate_json(text) for text in path.read_text(encoding="utf-8").splitlines()]


def rounded(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Four digits of everything measured: more say nothing, and files stay small."""
    return tuple(
        row.model_copy(
            update={
                "median_ms": _digits(row.median_ms),
                "low_ms": _digits(row.low_ms),
                "high_ms": _digits(row.high_ms),
                "over": {
                    name: Ratio(value=_digits(r.value), low=_digits(r.low), high=_digits(r.high))
                    for name, r in row.over.items()
                },
                "peak_mib": None if row.peak_mib is None else _digits(row.peak_mib),
                "values": {name: _digits(value) for name, value in row.values.items()},
            }
        )
        for row in rows
    )


def stamp(*, kind: Literal["cpu", "cuda"], threads: int, plugins: Sequence[str] = (), note: str = "") -> Stamp:
    """Of this process. plugins: distributions whose versions count too."""
    return Stamp(
        device=torch.cuda.get_device_name() if kind == "cuda" else _processor(),
        kind=kind,
        threads=threads,
        versions={"python": platform.python_version()} | _versions(sorted({*_VERSIONS, *plugins})),
        commit=_commit(),
        date=datetime.now(UTC).date().isoformat(),
        note=note,
    )


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def _commit() -> str:
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may lie within another checkout
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
