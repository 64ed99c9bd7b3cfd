"""`moerouters trace`: record what the routers of a model compute on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# torch and transformers are imported when the command runs.


def trace(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder that save_pretrained wrote, or a hub name.")],
    text: Annotated[Path, typer.Option(help="File to run the model over.")],
    output: Annotated[Path, typer.Option(help="The trace: a safetensors file.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to record.")] = 8192,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Record the router logits of a model on a text."""
    from moerouters.inspecting.trace_command import run_trace

    run_trace(model, text=text, output=output, tokens=tokens, device=device)
