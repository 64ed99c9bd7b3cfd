"""The registry: from a name to a router, importing only what is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import TYPE_CHECKING, Any, cast

from moerouters.errors import ConfigError, MoeroutersError
from moerouters.registry import messages
from moerouters.registry.api import ApiFit, api_fit
from moerouters.registry.configs import make_config
from moerouters.registry.discovery import PluginEntry, discover
from moerouters.registry.dispatcher_spec import DispatcherSpec
from moerouters.registry.extras import StepMetrics, fan_out, merge_dispatchers
from moerouters.registry.loader import LoadedPlugin, LoadFailure, load_plugin
from moerouters.registry.provenance import Provenance
from moerouters.registry.spec import API_VERSION, RouterConfig, RouterSpec
from moerouters.registry.states import PluginState, PluginStatus, resolve
from moerouters.registry.switches import Switches

if TYPE_CHECKING:
    from moerouters.gating import Gating
    from moerouters.router import Router

_SHUT = frozenset({PluginState.BLOCKED, PluginState.CONFLICT})


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterInfo:
    """What is known about a router that is ready."""

    spec: RouterSpec
    state: PluginState
    provenance: Provenance


class Registry:
    """Finds plugins, imports those that are named, and remembers what came of it. Safe to use from several threads.

    A run uses the default one through the functions of `moerouters.registry`; tests make their own with other entries.
    """

    def __init__(
        self,
        *,
        discover: Callable[[], Sequence[PluginEntry]] = discover,
        environ: Mapping[str, str] = os.environ,
        host_api: str = API_VERSION,
    ) -> None:
        self._discover = discover
        self._environ = environ
        self._host_api = host_api
        self._lock = RLock()
        self._config = Switches()
        self._entries: tuple[PluginEntry, ...] | None = None
        self._outcomes: dict[str, LoadedPlugin | LoadFailure] = {}
        self._temporary: dict[str, PluginStatus] = {}
        self._frozen: Switches | None = None  # what the switches said when the registry was frozen

    @property
    def switches(self) -> Switches:
        """The lists in force: those of `configure` over those of the environment."""
        with self._lock:
            if self._frozen is not None:
                return self._frozen
            return Switches.from_environment(self._environ).under(self._config)

    def configure(self, *, plugins: Sequence[str] | None = None, disable: Sequence[str] | None = None) -> None:
        """Set the allowlist and the denylist of this run; None leaves a list to the environment.

        Raises ConfigError for an item that names nothing installed; the lists then stay as they were.
        """
        with self._lock:
            self._refuse_if_frozen("configure")
            config = Switches.from_config(plugins=plugins, disable=disable)
            resolve(self._installed(), Switches.from_environment(self._environ).under(config))
            self._config = config

    def available(self) -> tuple[str, ...]:
        """Return the sorted names that may be used. Reads metadata only: an import may still fail."""
        return tuple(sorted(status.name for status in self.plugins() if status.state not in _SHUT))

    def plugins(self, *, load: bool = False) -> tuple[PluginStatus, ...]:
        """Return every installed claim with its state; with `load`, after trying to import each that may be used.

        Raises RouterUnavailable for a conflict or a failed import only if MOEROUTERS_STRICT_PLUGINS is 1.
        """
        with self._lock:
            statuses = self._statuses()
            if load and self._frozen is None:
                statuses = tuple(self._loaded(status) for status in statuses)
            if self.switches.strict:
                for status in statuses:
                    self._raise_if_unusable(status, statuses)
            return statuses

    def spec(self, name: str) -> RouterSpec:
        """Return the spec of a router, importing its plugin on the first call.

        Raises:
            RouterNotFound: no installed distribution offers the name.
            RouterUnavailable: it is blocked, in conflict, incompatible, or its import failed (then chained).
        """
        return self.info(name).spec

    def info(self, name: str) -> RouterInfo:
        """Return the spec, state and provenance of a router. Imports its plugin and raises as `spec` does."""
        with self._lock:
            statuses = self.plugins()
            claims = [status for status in statuses if status.name == name]
            if not claims:
                raise messages.not_found(name, statuses)
            usable = [status for status in claims if status.state not in _SHUT]
            if not usable:
                # With three claims, one may be blocked and two in conflict: then the conflict is what to solve.
                conflict = [status for status in claims if status.state is PluginState.CONFLICT]
                raise messages.unavailable(conflict or claims)
            if usable[0].state is PluginState.DISCOVERED and self._frozen is not None:
                raise messages.too_late(usable[0].entry)
            status = self._loaded(usable[0])
            self._raise_if_unusable(status, [status])
            assert status.spec is not None
            return RouterInfo(spec=status.spec, state=status.state, provenance=status.entry.provenance)

    def build(self, name: str, gating: Gating, *, config: Mapping[str, Any] | RouterConfig | None = None) -> Router:
        """Make the router `name` for a gating.

        Args:
            name: a public name, see `available`.
            gating: the model's own half of routing.
            config: the router's settings, as a mapping or as its config class; None for the defaults.

        Raises RouterNotFound and RouterUnavailable as `spec` does, and ConfigError for bad settings.
        """
        spec = self.spec(name)
        return cast("Router", spec.factory(gating, make_config(spec, config)))

    def dispatchers(self) -> Mapping[str, DispatcherSpec]:
        """Return the dispatchers of those plugins that a run has named; RouterUnavailable if two share a name."""
        return merge_dispatchers(self._in_use())

    def step_metrics_hook(self) -> StepMetrics | None:
        """Return a function that hands the metrics of a step to every listening plugin, None if nobody listens.

        Ask once, after the routers of a run have been built: computing metrics for nobody can then be left out.
        """
        return fan_out(self._in_use())

    def freeze(self) -> None:
        """Refuse from now on to import a plugin or to change the lists; what is loaded stays usable. Idempotent."""
        with self._lock:
            self._frozen = self.switches

    @contextmanager
    def temporary(self, spec: RouterSpec) -> Iterator[None]:
        """Offer a router inside a `with` block that no distribution announces: for tests and notebooks.

        Raises ConfigError if the name is taken, RouterUnavailable if the spec does not fit this plugin API.
        """
        with self._lock:
            self._refuse_if_frozen("temporary")
            if any(status.name == spec.name for status in self._statuses()):
                raise ConfigError(
                    f"temporary router {spec.name!r} has the name of another router.",
                    why="names are never shadowed",
                    fix="give it a name of its own",
                )
            status = self._gated(PluginStatus(entry=_temporary_entry(spec)), spec)
            self._raise_if_unusable(status, [status])
            self._temporary[spec.name] = status
        try:
            yield
        finally:
            with self._lock:
                del self._temporary[spec.name]

    def _installed(self) -> tuple[PluginEntry, ...]:
        if self._entries is None:
            self._entries = tuple(self._discover())
        return self._entries

    def _statuses(self) -> tuple[PluginStatus, ...]:
        installed = resolve(self._installed(), self.switches)
        return (*(self._known(status) for status in installed), *self._temporary.values())

    def _loaded(self, status: PluginStatus) -> PluginStatus:
        """The status after an attempt to import the plugin, if there has been none yet."""
        module = status.entry.module
        if status.state is PluginState.DISCOVERED and module not in self._outcomes:
            declared = frozenset(entry.name for entry in self._installed() if entry.module == module)
            try:
                self._outcomes[module] = load_plugin(module, declared=declared)
            except LoadFailure as failure:
                self._outcomes[module] = failure
        return self._known(status)

    def _known(self, status: PluginStatus) -> PluginStatus:
        """The status refined by what came of the import, if there has been one."""
        outcome = self._outcomes.get(status.entry.module)
        if status.state is not PluginState.DISCOVERED or outcome is None:
            return status
        if isinstance(outcome, LoadFailure):
            return messages.failed(status, str(outcome))
        return self._gated(status, outcome.routers[status.name])

    def _gated(self, status: PluginStatus, spec: RouterSpec) -> PluginStatus:
        fit = api_fit(spec.api, self._host_api)
        if fit is not ApiFit.FITS:
            return messages.incompatible(status, spec, fit, self._host_api)
        return replace(status, state=PluginState.READY, spec=spec)

    def _raise_if_unusable(self, status: PluginStatus, statuses: Sequence[PluginStatus]) -> None:
        if status.state in (PluginState.DISCOVERED, PluginState.READY, PluginState.BLOCKED):
            return
        outcome = self._outcomes.get(status.entry.module)
        rivals = [other for other in statuses if other.name == status.name and other.state is status.state]
        failure = outcome if isinstance(outcome, LoadFailure) else None
        raise messages.unavailable(rivals) from (failure and (failure.__cause__ or failure))

    def _in_use(self) -> dict[str, LoadedPlugin]:
        """Loaded plugins by module, those with a router that is ready."""
        with self._lock:
            modules = {status.entry.module for status in self._statuses() if status.state is PluginState.READY}
            return {
                module: outcome
                for module, outcome in self._outcomes.items()
                if module in modules and isinstance(outcome, LoadedPlugin)
            }

    def _refuse_if_frozen(self, what: str) -> None:
        if self._frozen is not None:
            raise MoeroutersError(
                f"the registry is frozen: {what} comes too late.",
                why="a run must not change its plugins once it has started",
                fix="do it before freeze()",
            )


def _temporary_entry(spec: RouterSpec) -> PluginEntry:
    factory = f"{spec.factory.__module__}:{getattr(spec.factory, '__qualname__', repr(spec.factory))}"
    provenance = Provenance(
        distribution="(temporary)",
        version="0",
        entry_point=f"{spec.name} = {factory}",
        location="this process",
        requirement=f"# {spec.name} is temporary",
    )
    return PluginEntry(name=spec.name, module=factory, summary=spec.summary, provenance=provenance)
