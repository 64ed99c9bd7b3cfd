from collections.abc import Mapping
from typing import Any

import pytest

from moerouters.errors import RouterUnavailable
from moerouters.registry.dispatcher_spec import DispatcherSpec
from moerouters.registry.extras import StepMetrics, fan_out, merge_dispatchers
from moerouters.registry.loader import LoadedPlugin


def plugin(*dispatchers: str, listener: StepMetrics | None = None) -> LoadedPlugin:
    specs = {name: DispatcherSpec(name=name, summary=f"Is {name}.", factory=dict) for name in dispatchers}
    return LoadedPlugin(routers={}, dispatchers=specs, step_metrics=listener)


def test_dispatchers_of_all_plugins() -> None:
    found = merge_dispatchers({"a": plugin("pigeon"), "b": plugin("owl", "crow")})
    assert {name: spec.name for name, spec in found.items()} == {"pigeon": "pigeon", "owl": "owl", "crow": "crow"}


def test_dispatcher_claimed_twice() -> None:
    with pytest.raises(RouterUnavailable) as caught:
        merge_dispatchers({"a.plugin": plugin("owl"), "b.plugin": plugin("owl")})
    assert str(caught.value) == (
        "dispatcher 'owl' is claimed more than once, and nobody wins.\n"
        "  from   a.plugin\n"
        "         b.plugin\n"
        "  cause  one name stands for one dispatcher\n"
        "  fix    leave out the routers of one of the two"
    )


def test_nobody_listens() -> None:
    assert fan_out({"a": plugin(), "b": plugin()}) is None


def test_every_listener_hears_once() -> None:
    heard: list[tuple[str, Mapping[str, Any]]] = []
    notify = fan_out(
        {
            "a": plugin(listener=lambda metrics: heard.append(("a", metrics))),
            "b": plugin(),
            "c": plugin(listener=lambda metrics: heard.append(("c", metrics))),
        }
    )
    assert notify is not None
    notify({"step": 1})
    assert heard == [("a", {"step": 1}), ("c", {"step": 1})]
