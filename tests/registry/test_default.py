from typing import Any

import pytest

from moerouters import registry
from moerouters.registry import RouterConfig, RouterSpec
from support.fake_plugins import PluginModules, entry, registry_of

GATING: Any = object()


@pytest.fixture(autouse=True)
def own_registry(modules: PluginModules, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions work on the registry of the process; here it is one of the test's own."""
    monkeypatch.setattr("moerouters.registry.default._registry", registry_of(modules.router("bip"), entry("broken")))


def test_lookup() -> None:
    assert registry.available() == ("bip", "broken", "topk")
    assert registry.info("bip").spec.summary == "Is bip."
    assert [status.state for status in registry.plugins()] == ["ready", "discovered", "discovered"]
    assert [status.state for status in registry.plugins(load=True)] == ["ready", "failed", "ready"]


def test_lists() -> None:
    registry.configure(plugins=["bip"], disable=[])
    assert registry.available() == ("bip", "topk")
    allow = registry.current_switches().allow
    assert allow is not None and allow.items == ("bip",)
    registry.freeze()
    with pytest.raises(Exception, match="the registry is frozen"):
        registry.configure()


def test_build_and_temporary() -> None:
    spec = RouterSpec(name="own", summary="Made here.", factory=lambda gating, config: (gating, config), api="0.1")
    with registry.temporary(spec):
        assert registry.build("own", GATING) == (GATING, RouterConfig())
    assert "own" not in registry.available()


def test_extras_of_plugins_without_any() -> None:
    registry.info("bip")
    assert registry.dispatchers() == {}
    assert registry.step_metrics_hook() is None


def test_two_registries_share_nothing(modules: PluginModules) -> None:
    first, second = registry_of(modules.router("other")), registry_of(entry("other"))
    first.configure(disable=["other"])
    assert (first.available(), second.available()) == (("topk",), ("other", "topk"))
