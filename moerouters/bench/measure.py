"""Measuring a Request: in this process, or in processes with the allocator settings that are asked for."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

from moerouters.bench.case import Case, Request, Run, Unavailable
from moerouters.bench.cases import cases_of
from moerouters.bench.memory import peak_apart
from moerouters.bench.rows import Row, Skipped, rounded
from moerouters.bench.timing import median_of, take_rounds, waiting
from moerouters.errors import MoeroutersError

ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    # glibc gives freed memory back and asks for it anew, page by page: 0.5 ms per MiB for tensors of 32 MiB and more.
    "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
}
_QWEN = "transformers.models.qwen3_moe.modeling_qwen3_moe"
Rows = tuple[list[Row], list[Skipped]]
Tell = Callable[[str], None]
"""Where progress goes."""


def measure(request: Request, *, allocator: str, peaks: Mapping[str, float] | None = None, tell: Tell = print) -> Rows:
    """Time every case in this process. peaks: what `measure_memory` found."""
    torch.set_num_threads(request.threads)
    rows: list[Row] = []
    skipped: list[Skipped] = []
    # A case is let go before the next one is made: weights of large shapes do not fit beside each other.
    for index, case in enumerate(cases_of(request)):
        timed, missing = _measure_case(case, allocator, tell)
        rows += [row.model_copy(update={"peak_mib": (peaks or {}).get(f"{index} {row.impl}")}) for row in timed]
        skipped += missing
    return list(rounded(rows)), list(dict.fromkeys(skipped))


def _measure_case(case: Case, allocator: str, tell: Tell) -> Rows:
    request = case.request
    runs: dict[str, Run] = {}
    skipped = []
    for name, build in case.wanted().items():
        try:
            runs[name] = build()
        except Unavailable as error:
            skipped.append(Skipped(shape=case.shape.name, impl=name, why=str(error)))
    tell(f"{case.label}, {case.dtype}, {allocator} allocator: {', '.join(runs)}")
    gc.collect()
    if not runs:
        return [], skipped
    samples = take_rounds(runs, wait=_waiting(request, case), rounds=request.rounds, agree=_agreeing(request))
    return [_row(case, name, samples, allocator) for name in samples], skipped


def measure_memory(request: Request, *, tell: Tell = print) -> dict[str, float]:
    """The peak in MiB of every implementation, by index of its case and name. This process must not have computed."""
    if request.subject == "layer":
        with suppress(ImportError):
            import_module(_QWEN)  # 4 s, once here and not in every process that is forked
    found = {}
    for index, case in enumerate(cases_of(request)):
        tell(f"{case.label}: peak memory")
        for name in case.wanted():
            peak = peak_apart(request, index, name)
            if peak is not None:
                found[f"{index} {name}"] = peak
    return found


def measure_apart(request: Request, allocators: Sequence[str]) -> Rows:
    """The same in processes of their own: one for memory, then one (or a rank each) for every allocator."""
    peaks: dict[str, float] = {}
    if request.memory and request.ranks == 1:
        peaks = json.loads(_in_children(request, "memory", {}, allocator=allocators[0]))
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for allocator in allocators:
        answer = json.loads(_in_children(request, "time", peaks, allocator=allocator))
        rows += map(Row.model_validate, answer["rows"])
        skipped += map(Skipped.model_validate, answer["skipped"])
    return rows, list(dict.fromkeys(skipped))


def serve(task: Path, rank: int) -> None:
    """What such a process does: read its task, write the answer beside it. Progress goes to standard error."""
    told = json.loads(task.read_text(encoding="utf-8"))
    request = Request.model_validate(told["request"])

    def tell(text: str) -> None:
        if rank == 0:
            print(text, file=sys.stderr, flush=True)

    if told["work"] == "memory":
        answer: object = measure_memory(request, tell=tell)
    else:
        with ExitStack() as stack:
            if request.ranks > 1:
                backend = "nccl" if request.device == "cuda" else "gloo"
                path = str(task.with_suffix(".store"))
                store = dist.FileStore(path, request.ranks)  # type: ignore[attr-defined]
                dist.init_process_group(backend, store=store, rank=rank, world_size=request.ranks)
            stack.callback(_leave_group)
            rows, skipped = measure(request, allocator=told["allocator"], peaks=told["peaks"], tell=tell)
        answer = {
            "rows": [row.model_dump(by_alias=True) for row in rows],
            "skipped": [entry.model_dump() for entry in skipped],
        }
    if rank == 0:
        task.with_suffix(".answer").write_text(json.dumps(answer), encoding="utf-8")


def _row(case: Case, name: str, samples: Mapping[str, Sequence[float]], allocator: str) -> Row:
    seconds = median_of(samples[name])
    return Row.model_validate(
        {
            "subject": case.request.subject,
            "shape": case.shape.name,
            "sizes": case.shape.sizes(),
            "grows": case.shape.grows,
            "impl": name,
            "pass": case.passes,
            "dtype": case.dtype,
            "allocator": allocator,
            "ranks": case.request.ranks,
            "rounds": case.request.rounds,
            "median_ms": 1e3 * seconds.value,
            "low_ms": 1e3 * seconds.low,
            "high_ms": 1e3 * seconds.high,
            "over": case.over(name, samples),
            "values": case.values(name, seconds.value),
        }
    )


def _in_children(request: Request, work: str, peaks: Mapping[str, float], *, allocator: str) -> str:
    """The answer of the first rank."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environ |= ALLOCATORS[allocator] | {"OMP_NUM_THREADS": str(request.threads)}
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        told = {"request": request.model_dump(), "work": work, "peaks": peaks, "allocator": allocator}
        task.write_text(json.dumps(told), encoding="utf-8")
        ranks = request.ranks if work == "time" else 1
        commands = [[sys.executable, "-m", "moerouters.bench", str(task), str(rank)] for rank in range(ranks)]
        children = [subprocess.Popen(command, env=environ) for command in commands]
        try:
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                child.kill()
        if any(codes):
            raise MoeroutersError(
                f"a process that measured '{request.subject}' ended with status {max(codes, key=abs)}.",
                where=f"allocator {allocator}, {ranks} rank{'s' if ranks > 1 else ''}",
                why="its own message stands above; -9 means that it was killed, mostly for want of memory",
                fix="choose smaller shapes with --shapes, or fewer implementations with --impl",
            )
        return task.with_suffix(".answer").read_text(encoding="utf-8")


def _waiting(request: Request, case: Case) -> Callable[[], object]:
    if request.ranks == 1:
        return waiting(case.device)
    return dist.barrier


def _agreeing(request: Request) -> Callable[[float], float]:
    if request.ranks == 1:
        return lambda seconds: seconds

    def slowest(seconds: float) -> float:
        told = torch.tensor(seconds, dtype=torch.float64, device=request.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return float(told)

    return slowest


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
