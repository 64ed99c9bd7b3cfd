"""From what a user asks for to a result: requests that are checked before minutes are spent on them."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from moerouters.bench.case import Request
from moerouters.bench.cases import cases_of
from moerouters.bench.measure import ALLOCATORS, measure_apart
from moerouters.bench.rows import Result, Skipped, stamp
from moerouters.bench.shapes import growing, named_shapes
from moerouters.errors import ConfigError


def make_request(
    subject: Any,
    *,
    shapes: str | None = None,
    impl: str | None = None,
    grow: str | None = None,
    most: int | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    rounds: int = 15,
    threads: int | None = None,
    ranks: int = 1,
    memory: bool = True,
) -> Request:
    """The Request of these options. Raises ConfigError for what cannot be."""
    if grow is not None and shapes is not None:
        raise ConfigError("--grow has shapes of its own.", where=f"--shapes {shapes}", fix="leave one of the two out")
    if ranks > 1 and subject != "dispatch":
        raise ConfigError(
            f"'{subject}' runs in one process.", where=f"--ranks {ranks}", fix="moerouters bench dispatch --ranks 2"
        )
    chosen = (
        named_shapes(shapes, subject=subject, device=device)
        if grow is None
        else growing(grow, device=device, most=most)
    )
    impls = None if impl is None else tuple(name for name in impl.split(",") if name)
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    try:
        request = Request(
            subject=subject, shapes=chosen, impls=impls, device=device, dtype=dtype, rounds=rounds,
            threads=threads or cores(), ranks=ranks, memory=memory,
        )  # fmt: skip
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(
            f"--{wrong['loc'][0]} cannot be {wrong['input']!r}.", why=wrong["msg"], fix="see moerouters bench --help"
        ) from None
    _expect_known(request)
    return request


def cores() -> int:
    """What this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allocators_of(asked: str, *, device: str) -> tuple[str, ...]:
    """Names of settings of the CPU's allocator. Raises ConfigError for another name."""
    if asked != "both" and asked not in ALLOCATORS:
        raise ConfigError(
            f"there is no allocator '{asked}'.", why=f"there is: {', '.join(ALLOCATORS)}, both", fix="--allocator both"
        )
    if device == "cuda" or not sys.platform.startswith("linux"):
        return ("default",)  # the settings are glibc's
    return tuple(ALLOCATORS) if asked == "both" else (asked,)


def run(request: Request, *, allocators: tuple[str, ...], note: str = "") -> Result:
    """Measure it."""
    rows, skipped = measure_apart(request, allocators)
    plugins = {entry.dist.name for entry in entry_points(group="moerouters") if entry.dist is not None}
    measured = stamp(kind=request.device, threads=request.threads, plugins=sorted(plugins), note=note)
    return Result(run=measured, rows=tuple(rows), skipped=tuple(_once(skipped)))


def _once(skipped: list[Skipped]) -> list[Skipped]:
    """Without those that are not installed, but for one line each."""
    seen: dict[tuple[str, str], Skipped] = {}
    for entry in skipped:
        seen.setdefault((entry.impl, entry.why), entry)
    return list(seen.values())


def _expect_known(request: Request) -> None:
    known = {name: None for case in cases_of(request) for name in case.builds()}
    unknown = [name for name in request.impls or () if name not in known]
    if unknown:
        raise ConfigError(
            f"'{request.subject}' has no implementation '{unknown[0]}'.",
            why=f"there is: {', '.join(known)}",
            fix="--impl takes names of that list, with commas between them",
        )
