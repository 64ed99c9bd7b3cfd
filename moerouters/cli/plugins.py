"""`moerouters plugins`: what is installed, in which state, and where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict

from moerouters import registry
from moerouters.capabilities import Capabilities
from moerouters.cli.output import plugin_output_to_stderr, print_table
from moerouters.registry.discovery import host_version


class PluginRow(BaseModel):
    """One claim to a router name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    state: registry.PluginState
    summary: str
    cause: str
    fix: str
    api: str | None  # this and the next are known only after an import
    capabilities: Capabilities | None
    provenance: registry.Provenance


class SwitchesInForce(BaseModel):
    """The lists that decided about `blocked`; None is a list that nobody set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plugins: tuple[str, ...] | None
    disable: tuple[str, ...] | None
    strict: bool


class PluginsReport(BaseModel):
    """What `moerouters plugins --json` prints. A field changes its meaning only with a new `schema_version`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    moerouters: str
    api: str
    switches: SwitchesInForce
    plugins: tuple[PluginRow, ...]


def plugins(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document with a versioned schema.")] = False,
    load: Annotated[bool, typer.Option("--import", help="Try to import each one; a failure becomes a line.")] = False,
    requirements: Annotated[
        bool, typer.Option("--requirements", help="Print lines for a requirements file that install the same.")
    ] = False,
) -> None:
    """List the installed routers without importing them."""
    with plugin_output_to_stderr():
        statuses = registry.plugins(load=load)
    if requirements:
        typer.echo("\n".join(_requirements(statuses)))
    elif json:
        typer.echo(_report(statuses).model_dump_json(indent=2))
    else:
        columns = ("name", "state", "distribution; summary or cause")
        print_table(columns, [_cells(status) for status in statuses])


def _requirements(statuses: Sequence[registry.PluginStatus]) -> list[str]:
    """One line for each distribution that this run may use."""
    usable = (status for status in statuses if status.state is not registry.PluginState.BLOCKED)
    return sorted({status.entry.provenance.requirement for status in usable})


def _report(statuses: Sequence[registry.PluginStatus]) -> PluginsReport:
    switches = registry.current_switches()
    return PluginsReport(
        moerouters=host_version(),
        api=registry.API_VERSION,
        switches=SwitchesInForce(
            plugins=switches.allow.items if switches.allow else None,
            disable=switches.deny.items if switches.deny else None,
            strict=switches.strict,
        ),
        plugins=tuple(_row(status) for status in statuses),
    )


def _row(status: registry.PluginStatus) -> PluginRow:
    return PluginRow(
        name=status.name,
        state=status.state,
        summary=status.summary,
        cause=status.cause,
        fix=status.fix,
        api=status.spec.api if status.spec else None,
        capabilities=status.spec.capabilities if status.spec else None,
        provenance=status.entry.provenance,
    )


def _cells(status: registry.PluginStatus) -> tuple[str, ...]:
    provenance = status.entry.provenance
    return (
        status.name,
        status.state,
        # One cell of two lines: as columns of their own they leave a word's width for the text on 80 columns.
        f"{provenance.distribution} {provenance.version}{' (editable)' if provenance.editable else ''}\n"
        f"{status.cause or status.summary}",
    )
