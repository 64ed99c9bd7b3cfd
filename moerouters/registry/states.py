"""What is known about an installed plugin, and what the metadata alone decides.

discovered --named, imported--> ready | failed | incompatible
blocked      by the allowlist or the denylist
conflict     two distributions claim one name, or a plugin claims a built-in one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from moerouters.registry.discovery import PluginEntry
from moerouters.registry.spec import RouterSpec
from moerouters.registry.switches import ALLOW_VARIABLE, DENY_VARIABLE, Switches


class PluginState(StrEnum):
    """How far a plugin got."""

    DISCOVERED = "discovered"
    READY = "ready"
    FAILED = "failed"
    BLOCKED = "blocked"
    CONFLICT = "conflict"
    INCOMPATIBLE = "incompatible"


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginStatus:
    """One claim to a name, and its state. `cause` and `fix` are empty while nothing is wrong."""

    entry: PluginEntry
    state: PluginState = PluginState.DISCOVERED
    cause: str = ""
    fix: str = ""
    spec: RouterSpec | None = None  # known once imported: in the states ready and incompatible

    @property
    def name(self) -> str:
        """Public name of the router."""
        return self.entry.name

    @property
    def summary(self) -> str:
        """The router's own line where it has been imported, else its distribution's."""
        return self.spec.summary if self.spec else self.entry.summary


def resolve(entries: Sequence[PluginEntry], switches: Switches) -> tuple[PluginStatus, ...]:
    """Decide for every claim whether it may be imported. Raises ConfigError for a list with an unknown name."""
    switches.check(entries)
    permitted = [_permitted(entry, switches) for entry in entries]
    return tuple(_contested(status, permitted) for status in permitted)


def _permitted(entry: PluginEntry, switches: Switches) -> PluginStatus:
    allow, deny = switches.allow, switches.deny
    if entry.builtin:
        return PluginStatus(entry=entry)
    if allow is not None and not allow.selects(entry):
        return _blocked(entry, f"not on the allowlist, {allow.source}", f"add {entry.name!r} to the list")
    if deny is not None and deny.selects(entry):
        return _blocked(entry, f"on the denylist, {deny.source}", f"take {entry.name!r} off the list")
    return PluginStatus(entry=entry)


def _blocked(entry: PluginEntry, cause: str, fix: str) -> PluginStatus:
    return PluginStatus(entry=entry, state=PluginState.BLOCKED, cause=cause, fix=fix)


def _contested(status: PluginStatus, permitted: Sequence[PluginStatus]) -> PluginStatus:
    if status.state is PluginState.BLOCKED or status.entry.builtin:
        return status
    rivals = [other for other in permitted if other.name == status.name and other.state is PluginState.DISCOVERED]
    if len(rivals) == 1:
        return status
    ours = status.entry.provenance.distribution
    if any(rival.entry.builtin for rival in rivals):
        cause = "a built-in router has this name and cannot be shadowed"
        fix = f"`pip uninstall {ours}`, or tell its authors"
    else:
        claimants = [rival.entry.provenance.distribution for rival in rivals]
        cause = f"one name stands for one router, and {' and '.join(claimants)} claim it"
        fix = (
            f"pick one: {DENY_VARIABLE}={status.name}@{claimants[-1]} leaves {claimants[0]}\n"
            f"(with an allowlist, write {status.name}@{claimants[0]} in {ALLOW_VARIABLE});\n"
            f"or `pip uninstall` the one you do not want"
        )
    return replace(status, state=PluginState.CONFLICT, cause=cause, fix=fix)
