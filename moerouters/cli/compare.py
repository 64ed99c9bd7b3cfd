"""`moerouters compare`: train one small model under each router and compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

# torch and the lab are imported when the command runs, after the environment they read at import has been set.


def compare(
    routers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Routers to compare; an item is a name, or name:key=value;key=value. "
            "Default: all that are installed, with their baselines.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Model and training: tiny, tiny-64, tiny-deepseek, minimind-16 or minimind-64.", show_default="tiny"
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="A paper's routers, preset and seeds, where you do not say otherwise: bip-16, bip-64, loss-free, "
            "and at the paper's own scale bip-16-paper, bip-64-paper."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="File or folder to train on. Default: Python's standard library.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Repeat everything with this many seeds.", show_default="1")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps per run.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    num_experts: Annotated[int | None, typer.Option("--experts", help="Experts per layer, E.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token, K.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any other number of the preset.")
    ] = None,
    expert_parallel: Annotated[
        int, typer.Option(min=1, metavar="N", help="Spread the experts over groups of N ranks, under torchrun.")
    ] = 1,
    model_parallel: Annotated[
        int, typer.Option(min=1, metavar="M", help="Cut each expert over M of them; needs --dispatcher mesh3d.")
    ] = 1,
    dispatcher: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How tokens reach them: auto, all_to_all, all_gather, deepep, hierarchical, mesh3d, padded or "
            "tensor_sliced.",
        ),
    ] = None,
    pipeline: Annotated[
        int, typer.Option(min=1, metavar="P", help="Cut the model into stages on P ranks, under torchrun.")
    ] = 1,
    tensor: Annotated[
        int,
        typer.Option(min=1, metavar="T", help="Spread experts over T ranks that share their tokens (PPMoE)."),
    ] = 1,
    schedule: Annotated[
        str | None,
        typer.Option(metavar="NAME|CSV", help="Of the pipeline: as in `pipeline show`, or a file. Default: 1f1b."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path, typer.Option(help="Folder for results, pictures and report.")] = Path("moerouters-compare"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what is in the output folder; finished runs are kept.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again over a comparison that was interrupted.")
    ] = False,
) -> None:
    """Train one small model under each router and compare."""
    # cuBLAS reads it when the first CUDA context is made; without it its matrix products are not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from moerouters.lab.job import CompareOptions, run_compare
    from moerouters.lab.protocols import Protocol
    from moerouters.lab.protocols import protocol as find_protocol

    chosen = Protocol(routers=(), preset="tiny", seeds=1) if protocol is None else find_protocol(protocol)
    count = chosen.seeds if seeds is None else seeds

    options: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "num_experts": num_experts,
        "top_k": top_k,
        "checkpoint_every": checkpoint_every,
    }
    code = run_compare(
        CompareOptions(
            routers=routers or ",".join(chosen.routers) or None,
            preset=preset or chosen.preset,
            text=text,
            seeds=tuple(range(seed, seed + count)),
            settings={name: value for name, value in options.items() if value is not None},
            changes=tuple(changes or ()),
            expert_parallel=expert_parallel,
            model_parallel=model_parallel,
            dispatcher=dispatcher,
            pipeline=pipeline,
            tensor=tensor,
            schedule=schedule,
            device=device,
            output=output,
            resume=resume,
            overwrite=overwrite,
        )
    )
    raise typer.Exit(code)
