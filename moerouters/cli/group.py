"""The group of commands: imports a command when it runs, and turns our own errors into messages."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from moerouters.errors import ConfigError, MoeroutersError, RouterNotFound, RouterUnavailable

COMMANDS = {
    "check": "Prove a router right, or show the smallest input that breaks it.",
    "compare": "Train one small model under each router and compare.",
    "study": "Compare MoE with dense models at equal step time, on this machine.",
    "inspect": "Show the routers of a model, and whether they can be swapped.",
    "trace": "Record the router logits of a model on a text.",
    "replay": "Compare routers on recorded logits, without the model.",
    "place": "Place experts on ranks by their recorded loads.",
    "pipeline": "Draw, check, simulate and search pipeline schedules.",
    "leak": "Estimate what a router's choice tells about later tokens, in bits.",
    "simulate": "Project what a layer takes on up to 65,536 ranks.",
    "bench": "Time layers, routers, dispatchers and balancers.",
    "plugins": "List the installed routers without importing them.",
    "info": "Show what one router promises, and its settings.",
    "new": "Write a router plugin that installs and passes the suite.",
}
"""Name of a command, which is also its module and function (or its Typer, with commands of its own), and its line in
`moerouters --help`."""

EXIT_USAGE, EXIT_UNAVAILABLE, EXIT_ERROR = 2, 3, 1


class LazyGroup(TyperGroup):
    """Lists commands without importing them, so that help and listings stay fast with a heavy command beside them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, summary in COMMANDS.items():
            self.add_command(TyperCommand(name=name, help=summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Put the real command in the place of its line before it is looked up."""
        if args[0] in COMMANDS:
            self.add_command(_load(args[0]))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error of ours ends it with its message and an exit status instead of a traceback."""
        try:
            return super().invoke(ctx)
        except MoeroutersError as error:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(_status(error)) from error


def _load(name: str) -> Any:
    function = getattr(importlib.import_module(f"moerouters.cli.{name}"), name)
    if isinstance(function, typer.Typer):
        return typer.main.get_command(function)
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(function)
    return typer.main.get_command(single)


def _status(error: MoeroutersError) -> int:
    match error:
        case RouterNotFound() | ConfigError():
            return EXIT_USAGE
        case RouterUnavailable():
            return EXIT_UNAVAILABLE
    return EXIT_ERROR
