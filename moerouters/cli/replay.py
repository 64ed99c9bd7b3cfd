"""`moerouters replay`: what routers would have done with recorded logits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# torch is imported when the command runs.


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="What `moerouters trace` wrote.")],
    routers: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Routers to compare; an item is a name, or name:key=value;key=value. Default: all that are installed.",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Batches to split the tokens in, with an update after each. Default: 32.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the numbers of every layer as JSON.")] = None,
) -> None:
    """Compare routers on recorded logits, without the model."""
    from moerouters.inspecting.trace_command import run_replay

    run_replay(trace, routers=routers, steps=steps, device=device, json=json)
