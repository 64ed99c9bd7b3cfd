"""`moerouters inspect`: the routers of a model, whether they can be swapped, and where they send a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# torch and transformers are imported when the command runs.


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder that save_pretrained wrote, a config.json, or a hub name.")
    ],
    text: Annotated[
        Path | None, typer.Option(help="Run the model over this file and show the load of every expert.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the text to look at. Default: 8192.")] = None,
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Leave weights alone: fast and small, whatever the model's size.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where to run over the text: auto, cpu or cuda.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write everything as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page, with the map of loads beside it as PNG.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the map of loads as PNG. Needs --text.")] = None,
) -> None:
    """Show the routers of a model, and whether they can be swapped."""
    from moerouters.inspecting.inspect_command import InspectOptions, run_inspect

    run_inspect(
        InspectOptions(
            model=model,
            text=text,
            tokens=tokens,
            config_only=config_only,
            device=device,
            json=json,
            html=html,
            picture=picture,
        )
    )
