"""Measure what docs/benchmarks.md shows, and render the page.

    python -m moerouters.bench.record docs [--device cuda]        # everything; on two cores that is an hour or more
    python -m moerouters.bench.record docs --only 'layer-cpu-*'   # these parts anew, the others stay as they are

Rows are in docs/benchmarks/bench-NAME.jsonl as soon as their part is measured. The figures need an idle machine.
--trial: tiny shapes and few rounds, a few minutes, to see that everything runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from moerouters.bench import page
from moerouters.bench.case import Request
from moerouters.bench.job import allocators_of, cores, make_request, run
from moerouters.bench.rows import Line, as_lines, read_lines, written
from moerouters.bench.shapes import named_shapes
from moerouters.errors import ConfigError
from moerouters.lab.files import write_text

_GROWING = "moerouters,hf-grouped_mm"


def parts(*, device: str, threads: int, trial: bool) -> dict[str, Request]:
    """What is measured one after the other, by name: a subject at one shape, or over a letter that grows."""
    subjects = ("layer", "router", "dispatch", "balance")

    def part(subject: str, **options: Any) -> Request:
        return make_request(subject, device=device, threads=threads, **({"rounds": 15} | options))

    if trial:
        found = {f"{subject}-tiny": part(subject, shapes="tiny", rounds=3) for subject in subjects}
        for letter, most in (("T", 8192), ("E", 64), ("K", 4)):
            found[f"layer-{letter}"] = part("layer", grow=letter, most=most, impl=_GROWING, rounds=3, memory=False)
        return found
    found = {
        f"{subject}-{shape.name}": part(subject, shapes=shape.name)
        for subject in subjects
        for shape in named_shapes(None, subject=subject, device=device)
    }
    if device == "cpu":
        found["layer-cpu-bf16"] = part("layer", shapes="cpu-bf16", dtype="bfloat16", impl="moerouters,hf-grouped_mm")
    for letter in "TEK":
        found[f"layer-{letter}"] = part("layer", grow=letter, impl=_GROWING, rounds=7, memory=False)
    return found


def selected(requests: Mapping[str, Request], only: Sequence[str]) -> dict[str, Request]:
    """Those whose name is like one of the patterns; all without any. Raises ConfigError for a pattern like none."""
    strangers = [pattern for pattern in only if not any(fnmatch(name, pattern) for name in requests)]
    if strangers:
        raise ConfigError(
            f"there is no part like '{strangers[0]}'.",
            where="--only",
            why=f"there is: {', '.join(requests)}",
            fix="name some of these; * stands for anything",
        )
    return {name: each for name, each in requests.items() if not only or any(fnmatch(name, p) for p in only)}


def is_of(line: Line, request: Request) -> bool:
    """Whether a kept row is what the request would measure again."""
    measured = {(shape.name, shape.grows) for shape in request.shapes}
    return (line.subject, line.dtype) == (request.subject, request.dtype) and (line.shape, line.grows) in measured


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m moerouters.bench.record")
    parser.add_argument("docs", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--name", help="of the file; default: the device")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="measure these, keep the others")
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--note", default="")
    options = parser.parse_args(arguments)
    note = options.note or ("A trial on a busy machine: its figures mean nothing yet." if options.trial else "")
    target = options.docs / "benchmarks" / f"bench-{options.name or options.device}.jsonl"
    kept = read_lines(target) if options.only and target.exists() else []
    requests = selected(parts(device=options.device, threads=options.threads, trial=options.trial), options.only)
    for name, request in requests.items():
        start = time.monotonic()
        result = run(request, allocators=allocators_of("both", device=options.device), note=note)
        kept = [line for line in kept if not is_of(line, request)] + as_lines(result)
        write_text(target, written(kept))
        print(f"{name}: {len(result.rows)} rows, {(time.monotonic() - start) / 60:.1f} min", flush=True)
    page.main(options.docs)


if __name__ == "__main__":
    main()
