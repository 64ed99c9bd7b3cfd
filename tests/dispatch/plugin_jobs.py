"""What the ranks of test_plugin_dispatchers.py do: a module that they can import."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from moerouters import registry, shard_experts
from moerouters.errors import ConfigError
from moerouters.registry import Registry, default
from support.fake_plugins import entry

from .parity import Case, group_of, layer_of, step


@dataclass(frozen=True)
class Plugin:
    """A distribution that is not installed: where its modules lie, and what its entry points would say."""

    folder: str
    module: str
    routers: Sequence[str]


@contextmanager
def installed(plugin: Plugin) -> Iterator[None]:
    """The plugin as this process's registry would find it; gone without a trace afterwards."""
    claims = [entry(name, plugin.module) for name in plugin.routers]
    before, default._registry = default._registry, Registry(discover=lambda: claims, environ={})
    sys.path.insert(0, plugin.folder)
    try:
        yield
    finally:
        default._registry = before
        sys.path.remove(plugin.folder)
        package = plugin.module.partition(".")[0]
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]


def without_naming_it(rank: int, plugin: Plugin, case: Case) -> str:
    """What a run is told that asks for the dispatcher and for no router of its plugin."""
    with installed(plugin):
        try:
            step(rank, case)
        except ConfigError as error:
            return str(error)
    return "nothing"


def after_naming_it(rank: int, plugin: Plugin, case: Case) -> tuple[list[str], dict[str, Tensor]]:
    """The dispatchers on offer once a router has been named, and a step through one of them."""
    with installed(plugin):
        registry.info(plugin.routers[0])
        return sorted(registry.dispatchers()), step(rank, case)


def made_per_layer(rank: int, plugin: Plugin, case: Case) -> tuple[str, str, int]:
    """Class and site of the dispatcher that a layer got, and its own count of flights."""
    from .parity import hidden

    with installed(plugin):
        registry.info(plugin.routers[0])
        group = group_of(case.group_size)
        layer = shard_experts(layer_of(case), group, dispatcher=case.dispatcher)
        layer(hidden(case, group.rank()))
        made = layer.dispatcher
        return type(made).__name__, str(getattr(made, "site", "")), int(getattr(made, "flights", -1))
