"""`moerouters new`: start a plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new(
    name: Annotated[str, typer.Argument(help="Public name of the router, for instance my-router.")],
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where to write it. Default: moerouters-NAME, here.")
    ] = None,
) -> None:
    """Write a router plugin that installs and passes the suite."""
    from moerouters.scaffold import write_plugin

    target = folder or Path(f"moerouters-{name.replace('_', '-')}")
    for path in write_plugin(name, target):
        typer.echo(target / path)
    typer.echo(f"\nNext:\n  pip install -e '{target}[test]'\n  moerouters check {name}\n  pytest {target}")
