"""What loaded plugins offer beside routers: dispatchers, and listeners to the metrics of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from moerouters.errors import RouterUnavailable
from moerouters.registry.dispatcher_spec import DispatcherSpec
from moerouters.registry.loader import LoadedPlugin

StepMetrics = Callable[[Mapping[str, Any]], None]


def merge_dispatchers(plugins: Mapping[str, LoadedPlugin]) -> Mapping[str, DispatcherSpec]:
    """Return the dispatchers of plugins, given by module. Raises RouterUnavailable if two share a name."""
    owners: dict[str, str] = {}
    found: dict[str, DispatcherSpec] = {}
    for module, plugin in plugins.items():
        for name, dispatcher in plugin.dispatchers.items():
            if name in found:
                raise RouterUnavailable(
                    f"dispatcher {name!r} is claimed more than once, and nobody wins.",
                    where=f"{owners[name]}\n{module}",
                    why="one name stands for one dispatcher",
                    fix="leave out the routers of one of the two",
                )
            found[name], owners[name] = dispatcher, module
    return MappingProxyType(found)


def fan_out(plugins: Mapping[str, LoadedPlugin]) -> StepMetrics | None:
    """Return one function that notifies every listening plugin, None if nobody listens."""
    listeners = [plugin.step_metrics for plugin in plugins.values() if plugin.step_metrics is not None]
    if not listeners:
        return None

    def notify(metrics: Mapping[str, Any]) -> None:
        for listener in listeners:
            listener(metrics)

    return notify
