"""The hooks a plugin module may implement. There are three; a fourth needs a plugin that cannot live without it.

A plugin declares and never registers: hooks return frozen records, so a failed import leaves nothing to undo and every
process of a job can load the same plugin again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pluggy

from moerouters.registry.dispatcher_spec import DispatcherSpec
from moerouters.registry.spec import RouterSpec

PROJECT = "moerouters"
"""Name of the pluggy project and of the entry-point group: they are the same on purpose."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Decorator of a plugin's hook functions. An implementation may take fewer arguments than the hook offers."""


class PluginHooks(Protocol):
    """What the host calls. Loading a plugin runs its code; listing plugins does not."""

    @hookspec
    def moerouters_routers(self) -> Sequence[RouterSpec]:
        """Return the routers of this module; called once, when the first of them is named.

        Every returned name has an entry point of the same name, and the other way round.
        """

    @hookspec
    def moerouters_dispatchers(self) -> Sequence[DispatcherSpec]:
        """Return the dispatchers of this module; called together with `moerouters_routers`.

        A dispatcher has no entry point of its own: it is offered once a router of the same module has been named.
        """

    @hookspec
    def moerouters_step_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Look at the routing metrics of one optimizer step. Never called inside forward; the mapping is read-only."""


def new_manager() -> pluggy.PluginManager:
    """Return a plugin manager that knows the three hooks and no plugin."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(PluginHooks)
    return manager
