"""`moerouters bench`: what the library costs, as ratios to what it replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moerouters.cli.output import print_table
from moerouters.errors import ConfigError


def bench(
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="What to time: swap.")],
    routers: Annotated[str, typer.Option(metavar="A,B,...", help="Routers to time beside the stock one.")] = (
        "topk,loss-free"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which every candidate takes its turn.")] = 31,
    threads: Annotated[int, typer.Option(min=1, help="Threads on a CPU.")] = 1,
    json: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
) -> None:
    """Time swapped routers against the stock one."""
    if subject != "swap":
        raise ConfigError(f"there is no benchmark '{subject}'.", why="there is: swap", fix="moerouters bench swap")
    import torch

    from moerouters.bench.swap import STOCK, bench_swap

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is at hand.", why="--device cuda", fix="leave the option out to time the CPU")
    names = [name for name in routers.split(",") if name]
    result = bench_swap(names, device=torch.device(device), rounds=rounds, threads=threads)
    rows = []
    for setting, timings in result.rows:
        told = [f"{timings[name].ratio:.2f} ({timings[name].low:.2f}-{timings[name].high:.2f})" for name in names]
        limit = "" if setting.limit is None else f"{setting.limit:g}"
        rows.append([setting.part, setting.mode, str(setting.tokens), f"{timings[STOCK].median_ms:.3f}", *told, limit])
    sizes = ", ".join(f"{name} {size}" for name, size in result.sizes.items())
    print_table(
        ["part", "mode", "tokens", "stock ms", *names, "limit"],
        rows,
        title=f"Ratio to the stock router of Qwen3-MoE (middle half of {rounds} rounds); {sizes}; {result.machine}, "
        f"torch {result.torch}, transformers {result.transformers}",
    )
    if json is not None:
        json.write_text(result.model_dump_json(indent=1, by_alias=True) + "\n", encoding="utf-8")
