"""The texts a user reads when a named router cannot be had. The tests pin them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

from moerouters.errors import RouterNotFound, RouterUnavailable
from moerouters.registry.api import ApiFit
from moerouters.registry.discovery import PluginEntry, host_version
from moerouters.registry.spec import RouterSpec
from moerouters.registry.states import PluginState, PluginStatus
from moerouters.registry.switches import DENY_VARIABLE

_WHAT = {
    PluginState.FAILED: "is installed, but its plugin cannot be loaded.",
    PluginState.INCOMPATIBLE: "does not fit this moerouters.",
    PluginState.BLOCKED: "is installed, but blocked.",
    PluginState.CONFLICT: "is claimed more than once, and nobody wins.",
}


def not_found(name: str, statuses: Sequence[PluginStatus]) -> RouterNotFound:
    """No claim to `name` is installed."""
    known = sorted({status.name for status in statuses})
    close = get_close_matches(name, known, n=1)
    return RouterNotFound(
        f"no router named {name!r}.",
        why=(f"did you mean {close[0]!r}? " if close else "") + f"installed: {', '.join(known)}",
        fix="routers come from distributions with a 'moerouters' entry point; `moerouters plugins` lists them",
    )


def unavailable(statuses: Sequence[PluginStatus]) -> RouterUnavailable:
    """`statuses` are the claims to one name, in one state. Chain the original exception where there is one."""
    first = statuses[0]
    return RouterUnavailable(
        f"router {first.name!r} {_WHAT[first.state]}",
        where="\n".join(str(status.entry.provenance) for status in statuses),
        why=first.cause,
        fix=first.fix,
    )


def too_late(entry: PluginEntry) -> RouterUnavailable:
    """The registry was frozen before this plugin was imported."""
    return RouterUnavailable(
        f"router {entry.name!r} is named too late.",
        where=str(entry.provenance),
        why="the registry is frozen: a plugin imported now could change the run",
        fix="name the router in the run's config, or build it before the registry is frozen",
    )


def failed(status: PluginStatus, cause: str) -> PluginStatus:
    """The plugin was imported, and something went wrong."""
    return replace(status, state=PluginState.FAILED, cause=cause, fix=_mend(status.entry))


def incompatible(status: PluginStatus, spec: RouterSpec, fit: ApiFit, host_api: str) -> PluginStatus:
    """The plugin was imported, but was written for another version of the plugin API."""
    return replace(
        status,
        state=PluginState.INCOMPATIBLE,
        spec=spec,
        cause=f"it was written for plugin API {spec.api}; this is moerouters {host_version()} with API {host_api}",
        fix=_mend(status.entry) if fit is ApiFit.TOO_OLD else f"`pip install -U moerouters`{_or_without(status.entry)}",
    )


def _mend(entry: PluginEntry) -> str:
    project = entry.provenance.distribution
    if entry.builtin:
        return f"`pip install --force-reinstall {project}`"
    first = f"`pip install -U {project}`"
    if entry.provenance.editable:  # an index knows nothing of a working copy
        first = f"correct the source in {entry.provenance.location}"
    return f"{first}, or `pip uninstall {project}`{_or_without(entry)}"


def _or_without(entry: PluginEntry) -> str:
    return f"\nor run without it: {DENY_VARIABLE}={entry.name}"
