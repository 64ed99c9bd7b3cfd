"""The command line. One command a file; a command's file is imported when the command runs, and not before."""

from __future__ import annotations

from typing import Annotated

import typer

from moerouters.cli.group import LazyGroup

app = typer.Typer(
    cls=LazyGroup,
    name="moerouters",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a plain traceback is what logs and issues need
    rich_markup_mode=None,
)


@app.callback()
def options(
    no_plugins: Annotated[
        bool, typer.Option("--no-plugins", help="Use built-in routers only, whatever else is installed or configured.")
    ] = False,
) -> None:
    """One router interface for mixture-of-experts models: any balancer, any model, any parallelism."""
    if no_plugins:
        from moerouters import registry

        registry.configure(plugins=(), disable=())


def main() -> None:
    """Entry point of the console script. Exit status: 0 fine, 2 wrong usage, 3 a router that cannot be loaded."""
    app(prog_name="moerouters")
