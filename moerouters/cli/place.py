"""`moerouters place`: which experts should share a rank, by the loads that were recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# torch is imported when the command runs.


def place(
    loads: Annotated[
        Path,
        typer.Argument(
            metavar="LOADS",
            help="What `moerouters trace` or `moerouters compare` recorded (.safetensors), or loads as .json or .csv.",
        ),
    ],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share the experts of a layer.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines they are on.")] = 1,
    replicas: Annotated[int, typer.Option(min=0, help="Places of a layer beyond one for each expert.")] = 0,
    groups: Annotated[
        int, typer.Option(min=1, help="Expert groups of a group-limited gate; each stays on one node.")
    ] = 1,
    algorithm: Annotated[
        str,
        typer.Option(help="contiguous, eplb, greedy, refined, stepwise; auto: the best on later steps of the history."),
    ] = "auto",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Batches to split the tokens of a trace in. Default: 32.")
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Part of the steps, the last, that placements are judged on.")
    ] = 0.5,
    output: Annotated[Path | None, typer.Option(help="Write the map for shard_experts as JSON.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the judgement of every algorithm as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw it, as PNG or SVG.")] = None,
) -> None:
    """Place experts on ranks by their recorded loads."""
    from moerouters.planning.place_command import PlaceOptions, run_place

    run_place(
        PlaceOptions(
            loads=loads,
            ranks=ranks,
            nodes=nodes,
            replicas=replicas,
            groups=groups,
            algorithm=algorithm,
            steps=steps,
            held_out=held_out,
            output=output,
            json=json,
            picture=picture,
        )
    )
