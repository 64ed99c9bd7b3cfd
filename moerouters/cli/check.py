"""`moerouters check`: prove a router right, or show the smallest input that proves it wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moerouters.errors import ConfigError


def check(
    router: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The router: a name, or name:key=value;key=value.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="smoke, default, thorough, or hunt: search for the worst balance until stopped.")
    ] = "default",
    only: Annotated[
        list[str] | None, typer.Option(metavar="A,B,...", help="Rules to run: ids, names or groups.")
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=REASON", help="A rule that cannot hold for this router; a failure if it does."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown.")] = None,
    explain: Annotated[str | None, typer.Option(metavar="ID", help="Explain one rule and exit.")] = None,
    list_rules: Annotated[bool, typer.Option("--list", help="List the rules and exit.")] = False,
    hidden_size: Annotated[
        int, typer.Option(min=1, help="Width of hidden states for routers that look past the logits.")
    ] = 8,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Run groups also when one that they stand on failed.")
    ] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds that one rule may take.")] = None,
    seconds: Annotated[float | None, typer.Option(help="End a hunt after this long.")] = None,
) -> None:
    """Prove a router right, or show the smallest input that breaks it."""
    try:
        from moerouters_conformance import command
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != "moerouters_conformance":
            raise
        raise ConfigError(
            "the conformance suite is not installed.",
            why="it is a distribution of its own, which brings hypothesis and pytest",
            fix="pip install moerouters-conformance",
        ) from None
    code = command.check(
        router,
        profile=profile,
        only=None if only is None else [item for items in only for item in items.split(",")],
        expected=dict(_expectation(item) for item in expect or ()),
        hidden_size=hidden_size,
        keep_going=keep_going,
        json=json,
        markdown=markdown,
        explain=explain,
        list_rules=list_rules,
        timeout=timeout,
        seconds=seconds,
    )
    raise typer.Exit(code)


def _expectation(written: str) -> tuple[str, str]:
    rule, sign, reason = written.partition("=")
    if not sign:
        raise ConfigError(
            f"--expect {written!r} has no reason.",
            why="a failure that nobody explains is a failure",
            fix=f'--expect "{rule}=why it cannot hold"',
        )
    return rule.strip(), reason.strip()
