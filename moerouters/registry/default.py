"""The registry of this process, as functions. It is the only mutable object at module level in moerouters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from moerouters.registry.dispatcher_spec import DispatcherSpec
from moerouters.registry.extras import StepMetrics
from moerouters.registry.lookup import Registry, RouterInfo
from moerouters.registry.spec import RouterConfig, RouterSpec
from moerouters.registry.states import PluginStatus
from moerouters.registry.switches import Switches

if TYPE_CHECKING:
    from moerouters.gating import Gating
    from moerouters.router import Router

_registry = Registry()


def build(name: str, gating: Gating, *, config: Mapping[str, Any] | RouterConfig | None = None) -> Router:
    """Make the router `name` for a gating.

    Args:
        name: a public name, see `available`.
        gating: the model's own half of routing.
        config: the router's settings, as a mapping or as its config class; None for the defaults.

    Raises:
        RouterNotFound: no installed distribution offers the name.
        RouterUnavailable: it is blocked, in conflict, incompatible, or its plugin failed (the original is chained).
        ConfigError: a setting is wrong or unknown.
    """
    return _registry.build(name, gating, config=config)


def available() -> tuple[str, ...]:
    """Return the sorted names of routers that may be used. Reads metadata only: an import may still fail."""
    return _registry.available()


def info(name: str) -> RouterInfo:
    """Return the spec, state and provenance of a router. Imports its plugin and raises as `build` does."""
    return _registry.info(name)


def plugins(*, load: bool = False) -> tuple[PluginStatus, ...]:
    """Return every installed claim with its state; with `load`, after trying to import each that may be used."""
    return _registry.plugins(load=load)


def configure(*, plugins: Sequence[str] | None = None, disable: Sequence[str] | None = None) -> None:
    """Set the allowlist and the denylist of this run, over the environment; None leaves a list to the environment."""
    _registry.configure(plugins=plugins, disable=disable)


def current_switches() -> Switches:
    """Return the lists in force, for a run's manifest."""
    return _registry.switches


def dispatchers() -> Mapping[str, DispatcherSpec]:
    """Return the dispatchers of those plugins that this run has named."""
    return _registry.dispatchers()


def step_metrics_hook() -> StepMetrics | None:
    """Return a function that hands the metrics of a step to every listening plugin, None if nobody listens."""
    return _registry.step_metrics_hook()


def freeze() -> None:
    """Refuse from now on to import a plugin or to change the lists; what is loaded stays usable."""
    _registry.freeze()


def temporary(spec: RouterSpec) -> AbstractContextManager[None]:
    """Offer a router inside a `with` block that no distribution announces: for tests and notebooks."""
    return _registry.temporary(spec)
