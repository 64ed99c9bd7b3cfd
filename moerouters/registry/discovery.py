"""Which plugins are installed. Reads entry-point metadata only; a broken or slow plugin costs nothing here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path

from moerouters.registry.hookspecs import PROJECT
from moerouters.registry.provenance import UNKNOWN, Provenance, metadata_field, read_provenance

BUILTINS = {"topk": "moerouters.builtin"}
"""Routers of the core itself, by the module that declares them. They take the same way as every plugin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginEntry:
    """One installed claim: this distribution offers a router of this name in that module."""

    name: str
    module: str
    summary: str  # the distribution's own line; the router's is known only after an import
    provenance: Provenance

    @property
    def builtin(self) -> bool:
        """True for a router of the core, which nobody can shadow or switch off."""
        return canonical(self.provenance.distribution) == PROJECT


def discover() -> tuple[PluginEntry, ...]:
    """Return every installed claim, sorted by name and distribution; imports nothing."""
    return from_entry_points(entry_points(group=PROJECT))


def from_entry_points(points: Iterable[EntryPoint]) -> tuple[PluginEntry, ...]:
    """Read entry points and add those built-in routers that no metadata announces (a source tree on the path)."""
    entries = [_read(point) for point in points if point.dist is not None]
    announced = {entry.name for entry in entries if entry.builtin}
    entries += [_builtin(name, module) for name, module in BUILTINS.items() if name not in announced]
    return tuple(sorted(entries, key=lambda entry: (entry.name, entry.provenance.distribution)))


def canonical(distribution: str) -> str:
    """Return a distribution name as indexes compare it: `Moerouters_BIP` and `moerouters-bip` are the same."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def host_version() -> str:
    """Return the version of the installed core, `unknown` for a bare source tree."""
    try:
        return version(PROJECT)
    except PackageNotFoundError:
        return UNKNOWN


def _read(point: EntryPoint) -> PluginEntry:
    assert point.dist is not None
    return PluginEntry(
        name=point.name,
        module=point.value,
        summary=metadata_field(point.dist.metadata, "Summary"),
        provenance=read_provenance(point.dist, name=point.name, module=point.value),
    )


def _builtin(name: str, module: str) -> PluginEntry:
    package = Path(__file__).resolve().parents[1]
    return PluginEntry(
        name=name,
        module=module,
        summary="",
        provenance=Provenance(
            distribution=PROJECT,
            version=host_version(),
            entry_point=f"{name} = {module}",
            location=str(package),
            requirement=f"{PROJECT} @ {package.parent.as_uri()}",
        ),
    )
