"""`moerouters bench`: what the library costs, as ratios to what it replaces and to what the machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moerouters.errors import ConfigError

if TYPE_CHECKING:
    from moerouters.bench.case import Request

SUBJECTS = ("layer", "router", "dispatch", "balance", "swap")


def bench(
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help=f"What to time: {', '.join(SUBJECTS)}.")],
    shapes: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Shapes by name, or spelt out: T1024-D256-E8-K2-F512-layers1."),
    ] = None,
    impl: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Implementations beside the baselines. Default: all.")
    ] = None,
    grow: Annotated[
        str | None, typer.Option(metavar="T|E|K", help="A series of shapes with more and more of it, not --shapes.")
    ] = None,
    most: Annotated[int | None, typer.Option(help="Where --grow ends.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default on a CPU) or bfloat16 (default on a GPU).")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=3, help="Rounds in which every candidate takes its turn. Default: 15, swap 31.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads on a CPU. Default: all cores, for swap 1.")
    ] = None,
    allocator: Annotated[
        str, typer.Option(help="Of memory on a CPU: default, tuned (freed memory is kept), or both.")
    ] = "both",
    ranks: Annotated[int, typer.Option(min=1, help="Processes that exchange tokens; dispatch only.")] = 1,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, in processes of its own.")] = True,
    routers: Annotated[
        str, typer.Option(metavar="A,B,...", help="Routers to time beside the stock one; swap only.")
    ] = "topk,loss-free",
    json: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Append the rows to a file of JSON lines.")] = None,
    note: Annotated[str, typer.Option(help="A remark that is kept with the result.")] = "",
) -> None:
    """Time a layer, routers, dispatchers, balancers, or swapped routers beside their peers, in one run."""
    if subject not in SUBJECTS:
        raise ConfigError(
            f"there is no benchmark '{subject}'.", why=f"there is: {', '.join(SUBJECTS)}", fix="moerouters bench layer"
        )
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"there is no device '{device}'.", why="there is: cpu, cuda", fix="--device cpu")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is at hand.", why="--device cuda", fix="leave the option out to time the CPU")
    for path in (json, keep):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"there is no folder '{path.parent}'.", where=str(path), fix="make it first")
    if subject == "swap":
        _swap(routers, device=device, rounds=rounds or 31, threads=threads or 1, json=json)
        return
    from moerouters.bench.job import make_request

    request = make_request(
        subject, shapes=shapes, impl=impl, grow=grow, most=most, device=device, dtype=dtype, rounds=rounds or 15,
        threads=threads, ranks=ranks, memory=memory,
    )  # fmt: skip
    _report(request, allocator=allocator, json=json, keep=keep, note=note)


def _report(request: Request, *, allocator: str, json: Path | None, keep: Path | None, note: str) -> None:
    from moerouters.bench.job import allocators_of, run
    from moerouters.bench.rows import lines
    from moerouters.bench.tables import VERDICT_COLUMNS, aligned, cells, columns, groups, verdict_cells
    from moerouters.bench.targets import verdicts

    result = run(request, allocators=allocators_of(allocator, device=request.device), note=note)
    for group, rows in groups(result.rows).items():
        typer.echo(f"{group.title}\n{aligned(columns(rows), [cells(row, rows) for row in rows])}\n")
    if result.skipped:
        skipped = [[entry.impl, entry.shape, entry.why] for entry in result.skipped]
        typer.echo(aligned(["not timed", "shape", "why"], skipped) + "\n")
    judged = verdicts(result.rows, kind=request.device)
    if judged:
        typer.echo(f"Goals, misses first\n{aligned(VERDICT_COLUMNS, [verdict_cells(v) for v in judged])}\n")
    versions = ", ".join(f"{name} {version}" for name, version in result.run.versions.items())
    typer.echo(
        f"{result.run.device}, threads: {result.run.threads}; {versions}; commit {result.run.commit or 'unknown'}. "
        f"Medians of {request.rounds} interleaved rounds; ratios within a round, with the 95% bootstrap interval of "
        "their median."
    )
    if json is not None:
        json.write_text(result.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")
    if keep is not None:
        with keep.open("a", encoding="utf-8") as file:
            file.write(lines(result))


def _swap(routers: str, *, device: str, rounds: int, threads: int, json: Path | None) -> None:
    import torch

    from moerouters.bench.swap import STOCK, bench_swap
    from moerouters.bench.tables import aligned

    names = [name for name in routers.split(",") if name]
    result = bench_swap(names, device=torch.device(device), rounds=rounds, threads=threads)
    rows = []
    for setting, timings in result.rows:
        told = [f"{timings[name].ratio:.2f} ({timings[name].low:.2f}-{timings[name].high:.2f})" for name in names]
        limit = "" if setting.limit is None else f"{setting.limit:g}"
        rows.append([setting.part, setting.mode, str(setting.tokens), f"{timings[STOCK].median_ms:.3f}", *told, limit])
    sizes = ", ".join(f"{name} {size}" for name, size in result.sizes.items())
    title = f"Ratio to the stock router of Qwen3-MoE (middle half of {rounds} rounds); {sizes}"
    typer.echo(f"{title}\n{result.machine}, torch {result.torch}, transformers {result.transformers}\n")
    typer.echo(aligned(["part", "mode", "tokens", "stock ms", *names, "limit"], rows))
    if json is not None:
        json.write_text(result.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")
