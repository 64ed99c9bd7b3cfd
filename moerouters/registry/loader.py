"""Importing one plugin under guard.

Every plugin gets a plugin manager of its own. Nothing outside is touched before the plugin has passed every check, so
a failure needs no roll-back, and a misspelt hook is attributed to the plugin that has it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

import pluggy
from pydantic import BaseModel, ValidationError

from moerouters.registry.configs import field_errors
from moerouters.registry.dispatcher_spec import DispatcherSpec
from moerouters.registry.hookspecs import new_manager
from moerouters.registry.spec import RouterSpec

Record = TypeVar("Record", RouterSpec, DispatcherSpec)


class LoadFailure(Exception):
    """A plugin cannot be used; the text is the cause, the original exception is chained where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedPlugin:
    """What one plugin module offers."""

    routers: Mapping[str, RouterSpec]
    dispatchers: Mapping[str, DispatcherSpec]
    step_metrics: Callable[[Mapping[str, Any]], None] | None  # None: the plugin does not listen


def load_plugin(module: str, *, declared: frozenset[str]) -> LoadedPlugin:
    """Import `module` and ask its hooks once. Raises LoadFailure; KeyboardInterrupt passes through.

    `declared` holds the names of all entry points that lead to the module: it has to return exactly these routers.
    """
    manager = new_manager()
    plugin = _guarded(lambda: importlib.import_module(module))
    _register(manager, plugin)
    routers = _ask(manager, "moerouters_routers", RouterSpec)
    if not routers:
        raise LoadFailure(_no_routers(plugin))
    _compare_names(routers, declared)
    dispatchers = _ask(manager, "moerouters_dispatchers", DispatcherSpec)
    return LoadedPlugin(
        routers=MappingProxyType(routers),
        dispatchers=MappingProxyType(dispatchers),
        step_metrics=_listener(manager.hook.moerouters_step_metrics),
    )


def _guarded(call: Callable[[], Any]) -> Any:
    """Run code of the plugin. SystemExit is caught too: a plugin must not end a training run by being imported."""
    try:
        return call()
    except LoadFailure:
        raise
    except ValidationError as error:
        raise LoadFailure(f"bad {error.title}: {'; '.join(field_errors(error))}") from error
    except (Exception, SystemExit) as error:
        raise LoadFailure(f"{type(error).__name__}: {error}") from error


def _register(manager: pluggy.PluginManager, plugin: ModuleType) -> None:
    known = set(vars(manager.hook))
    try:
        manager.register(plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        unknown = sorted(vars(manager.hook).keys() - known)
        if not unknown:  # a known hook with an argument it does not have: pluggy's text shows both signatures
            raise LoadFailure(str(error)) from error
        close = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the hooks are {', '.join(sorted(known))}"
        raise LoadFailure(f"unknown hook {unknown[0]!r}; {hint}") from error


def _ask(manager: pluggy.PluginManager, hook: str, record: type[Record]) -> dict[str, Record]:
    """Call one hook of the one plugin; returns its records by name, none if it does not implement the hook."""
    answers = _guarded(lambda: [_items(answer, hook, record) for answer in getattr(manager.hook, hook)()])
    records: dict[str, Record] = {}
    for item in (item for answer in answers for item in answer):
        if not isinstance(item, record):
            raise LoadFailure(f"{hook} returned a {type(item).__name__} where a {record.__name__} belongs")
        if item.name in records:
            raise LoadFailure(f"{hook} returned {item.name!r} twice")
        records[item.name] = item
    return records


def _items(answer: Iterable[Any], hook: str, record: type[BaseModel]) -> Sequence[Any]:
    if isinstance(answer, record):  # a pydantic model is iterable, over its fields
        raise LoadFailure(f"{hook} returned one {record.__name__}; it returns a tuple of them")
    return tuple(answer)


def _no_routers(plugin: ModuleType) -> str:
    if not hasattr(plugin, "moerouters_routers"):
        return "the module has no function moerouters_routers"
    marked = hasattr(plugin.moerouters_routers, "moerouters_impl")
    return "moerouters_routers returned no router" if marked else "moerouters_routers is not marked with @hookimpl"


def _compare_names(routers: Mapping[str, RouterSpec], declared: frozenset[str]) -> None:
    missing, undeclared = sorted(declared - routers.keys()), sorted(routers.keys() - declared)
    returned = ", ".join(sorted(routers))
    if missing:
        raise LoadFailure(f"entry point {missing[0]!r} names no router of the module, which returns {returned}")
    if undeclared:
        raise LoadFailure(f"router {undeclared[0]!r} has no entry point of its name")


def _listener(hook: pluggy.HookCaller) -> Callable[[Mapping[str, Any]], None] | None:
    if not hook.get_hookimpls():
        return None

    def notify(metrics: Mapping[str, Any]) -> None:
        hook(metrics=MappingProxyType(dict(metrics)))

    return notify
