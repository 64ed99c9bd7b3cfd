"""`moerouters simulate`: what a layer would take on many ranks, by formula and by drawing loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# torch is imported when the command runs.


def simulate(
    cluster: Annotated[
        str, typer.Option(help="h100-nvl8-ib400, v100-nvl8-ib100, or a .json or .toml file.")
    ] = "h100-nvl8-ib400",
    shape: Annotated[
        str, typer.Option(help="Of a layer: a name of `moerouters bench`, or T4096-D2048-E64-K8-F1024; T of one rank.")
    ] = "deepseek-v3",
    ranks: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of ranks.")] = "8,64,512,4096,65536",
    load: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="How even: uniform, zipf:max_vio=V, lognormal:max_vio=V, or results.json[:ROUTER] of a comparison.",
        ),
    ] = "uniform,lognormal:max_vio=0.5",
    backends: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...", help="all_to_all, hierarchical, padded, all_gather, tensor_sliced. Default: all."
        ),
    ] = None,
    bits: Annotated[int, typer.Option(min=8, max=64, help="Of a number in tokens and weights.")] = 16,
    expert_parallel: Annotated[
        int | None, typer.Option(min=1, help="Ranks that share the experts. Default: all, at most one an expert.")
    ] = None,
    grow: Annotated[bool, typer.Option("--grow", help="At least one expert a rank, over all ranks.")] = False,
    layers: Annotated[int, typer.Option(min=1, help="Layers between two steps of the optimizer.")] = 32,
    capacity_factor: Annotated[float, typer.Option(min=0.01, help="Of `padded`.")] = 1.25,
    most_nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes that a token reaches at most, by a group-limited gate.")
    ] = None,
    placed: Annotated[bool, typer.Option("--placed", help="Experts placed by their expected loads.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the loads that are drawn.")] = 0,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine and write its cluster to --output, instead.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="With --calibrate: real layers beside simulated ones.")
    ] = False,
    device: Annotated[str, typer.Option(help="To calibrate: auto, cpu or cuda.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="Of --calibrate: the cluster as JSON.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write every number as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it, as PNG or SVG.")] = None,
) -> None:
    """Project what a layer takes on up to 65,536 ranks."""
    from moerouters.errors import ConfigError
    from moerouters.planning.simulate_command import SimulateOptions, run_calibrate, run_simulate

    if calibrate:
        if output is None:
            raise ConfigError(
                "--calibrate needs --output.", why="what it measures is used later", fix="--output cluster.json"
            )
        run_calibrate(output=output, device=device, compare=compare)
        return
    if output is not None or compare:
        raise ConfigError("--output and --compare belong to --calibrate.", fix="--json FILE writes a simulation")
    run_simulate(
        SimulateOptions(
            cluster=cluster,
            shape=shape,
            ranks=ranks,
            loads=load,
            backends=backends,
            bits=bits,
            group=expert_parallel,
            grow=grow,
            layers=layers,
            capacity_factor=capacity_factor,
            most_nodes=most_nodes,
            placed=placed,
            seed=seed,
            json=json,
            picture=picture,
        )
    )
