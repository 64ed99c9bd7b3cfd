"""`moerouters study`: whether a MoE is worth it on this machine, at equal time per training step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

# torch and the lab are imported when the command runs, after the environment they read at import has been set.


def study(
    preset: Annotated[str, typer.Option(help="tiny (a demonstration, minutes), small (hours) or gpu.")] = "tiny",
    models: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Of the preset's models these, and their dense partners.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Training tokens per active parameter (20), or seconds of training steps (90s).")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Train each model with so many seeds.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="[MODEL.]NAME=VALUE", help="Any number of all models, or of one."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=5, help="Interleaved rounds of each timing.")] = None,
    tries: Annotated[int | None, typer.Option(min=1, help="Sizes that each search may time.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="File or folder to train on. Default: Python's standard library.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads on a CPU. Default: OMP_NUM_THREADS, else all cores.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Models that train at once, each with its own --threads.")] = 1,
    mesh: Annotated[
        bool, typer.Option("--mesh", help="Under torchrun: time one MoE model over its ranks, and project it further.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path, typer.Option(help="Folder for results, pictures and report.")] = Path("moerouters-study"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is in the output folder.")] = False,
    measure_again: Annotated[
        bool, typer.Option("--measure-again", help="With --resume: time the trained models anew.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again over an interrupted study.")] = False,
) -> None:
    """Compare MoE with dense models at equal step time, on this machine."""
    # cuBLAS reads it when the first CUDA context is made; without it its matrix products are not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from moerouters.study.command import StudyOptions, run_study
    from moerouters.study.mesh_command import run_mesh

    run = run_mesh if mesh else run_study
    code = run(
        StudyOptions(
            preset=preset,
            models=models,
            budget=budget,
            seeds=seeds,
            rounds=rounds,
            tries=tries,
            changes=tuple(changes or ()),
            text=text,
            threads=threads,
            jobs=jobs,
            device=device,
            output=output,
            resume=resume,
            overwrite=overwrite,
            measure_again=measure_again,
        )
    )
    raise typer.Exit(code)
