"""The plugin system: which routers are installed, and how a name becomes a router.

Reading order: spec, hookspecs, discovery (metadata), switches, states, loader (the guarded import), lookup (Registry),
default (the registry of this process). Listing never imports a plugin; naming a router imports that plugin alone.
"""

from moerouters.registry.default import (
    available,
    build,
    configure,
    current_switches,
    dispatchers,
    freeze,
    info,
    plugins,
    step_metrics_hook,
    temporary,
)
from moerouters.registry.discovery import PluginEntry
from moerouters.registry.dispatcher_spec import DispatcherSpec
from moerouters.registry.hookspecs import hookimpl
from moerouters.registry.lookup import Registry, RouterInfo
from moerouters.registry.provenance import Provenance
from moerouters.registry.spec import API_VERSION, RouterConfig, RouterSpec
from moerouters.registry.states import PluginState, PluginStatus
from moerouters.registry.switches import Switches

__all__ = [
    "API_VERSION",
    "DispatcherSpec",
    "PluginEntry",
    "PluginState",
    "PluginStatus",
    "Provenance",
    "Registry",
    "RouterConfig",
    "RouterInfo",
    "RouterSpec",
    "Switches",
    "available",
    "build",
    "configure",
    "current_switches",
    "dispatchers",
    "freeze",
    "hookimpl",
    "info",
    "plugins",
    "step_metrics_hook",
    "temporary",
]
