"""Measure what docs/benchmarks.md shows: `python -m moerouters.bench.record docs [--device cuda] [--trial]`.

Writes docs/benchmarks/bench-NAME.jsonl, anew after each part, and renders the page. --trial: tiny shapes and few
rounds, a few minutes, to see that everything runs; the figures of a full run need an idle machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moerouters.bench import page
from moerouters.bench.case import Request
from moerouters.bench.job import allocators_of, cores, make_request, run
from moerouters.bench.rows import lines
from moerouters.lab.files import write_text

_GROWING = "moerouters,hf-grouped_mm"


def requests(*, device: str, threads: int, trial: bool) -> Iterator[Request]:
    """The parts, one after the other."""

    def part(subject: str, **options: Any) -> Request:
        return make_request(subject, device=device, threads=threads, **({"rounds": 15} | options))

    if trial:
        tiny: dict[str, Any] = {"shapes": "tiny", "rounds": 3}
        yield from (part(subject, **tiny) for subject in ("layer", "router", "dispatch", "balance"))
        yield from (
            part("layer", grow=letter, most=most, impl=_GROWING, rounds=3, memory=False)
            for letter, most in (("T", 8192), ("E", 64), ("K", 4))
        )
        return
    yield part("layer")
    if device == "cpu":
        yield part("layer", shapes="cpu-bf16", dtype="bfloat16", impl="moerouters,hf-grouped_mm")
    yield from (part(subject) for subject in ("router", "dispatch", "balance"))
    yield from (part("layer", grow=letter, impl=_GROWING, rounds=7, memory=False) for letter in "TEK")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m moerouters.bench.record")
    parser.add_argument("docs", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--name", help="of the file; default: the device")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--note", default="")
    options = parser.parse_args(arguments)
    note = options.note or ("A trial on a busy machine: its figures mean nothing yet." if options.trial else "")
    target = options.docs / "benchmarks" / f"bench-{options.name or options.device}.jsonl"
    text = ""
    for request in requests(device=options.device, threads=options.threads, trial=options.trial):
        result = run(request, allocators=allocators_of("both", device=options.device), note=note)
        text += lines(result)
        write_text(target, text)
    page.main(options.docs)


if __name__ == "__main__":
    main()
