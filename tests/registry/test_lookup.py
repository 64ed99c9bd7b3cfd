import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent
from typing import Any

import pytest

from moerouters.errors import ConfigError, MoeroutersError, RouterNotFound, RouterUnavailable
from moerouters.registry import PluginState, Registry, RouterConfig, RouterSpec
from support.fake_plugins import PluginModules, entry, registry_of

GATING: Any = object()  # the registry hands it on and looks at nothing
OWN = RouterSpec(name="own", summary="Made here.", factory=lambda gating, config: (gating, config), api="0.1")


def states(registry: Registry, *, load: bool = False) -> dict[str, str]:
    return {status.entry.module: status.state for status in registry.plugins(load=load)}


def text(error: type[MoeroutersError], registry: Registry, name: str) -> str:
    with pytest.raises(error) as caught:
        registry.info(name)
    return str(caught.value)


class TestListing:
    def test_imports_nothing(self, modules: PluginModules) -> None:
        registry = registry_of(modules.router("bip"), entry("broken"))
        assert registry.available() == ("bip", "broken", "topk")
        assert set(states(registry).values()) == {"discovered"}
        assert not {"fake_bip", "fake_broken", "fake_builtin"} & sys.modules.keys()

    def test_leaves_out_what_cannot_be_used(self) -> None:
        registry = registry_of(
            entry("bip"), entry("twin", "a"), entry("twin", "b"), entry("off"), MOEROUTERS_DISABLE="off"
        )
        assert registry.available() == ("bip", "topk")

    def test_metadata_is_read_once(self) -> None:
        calls = []

        def discover() -> tuple[()]:
            calls.append(1)
            return ()

        registry = Registry(discover=discover, environ={})
        assert registry.available() == registry.available() == ()
        assert calls == [1]

    def test_of_this_process_by_default(self) -> None:
        assert "topk" in Registry().available()

    def test_with_imports(self, modules: PluginModules) -> None:
        old = modules.router("old", api="0.0")
        registry = registry_of(modules.router("bip"), entry("broken"), old, entry("off"), MOEROUTERS_DISABLE="off")
        assert states(registry, load=True) == {
            "fake_bip": "ready",
            "fake_broken": "failed",
            "fake_old": "incompatible",
            "fake_off": "blocked",
            "fake_builtin": "ready",
        }
        assert states(registry) == states(registry, load=True)
        assert [status.summary for status in registry.plugins() if status.name in ("bip", "broken")] == [
            "Is bip.",
            "About broken.",
        ]


class TestNaming:
    def test_imports_that_plugin_alone(self, modules: PluginModules) -> None:
        registry = registry_of(modules.router("bip"), modules.router("other"))
        assert registry.spec("bip").summary == "Is bip."
        assert states(registry) == {"fake_bip": "ready", "fake_other": "discovered", "fake_builtin": "discovered"}
        assert "fake_bip" in sys.modules
        assert "fake_other" not in sys.modules

    def test_info(self, modules: PluginModules) -> None:
        claim = modules.router("bip")
        found = registry_of(claim).info("bip")
        assert (found.spec.name, found.state, found.provenance) == ("bip", PluginState.READY, claim.provenance)

    def test_module_of_several_routers_is_imported_once(self, modules: PluginModules) -> None:
        first = modules.router("bip", also=["bip-2"])
        path = modules.folder / "fake_bip.py"
        path.write_text(path.read_text() + "import builtins\nbuiltins.times_imported.append(1)\n")
        registry = registry_of(first, entry("bip-2", "fake_bip"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("builtins.times_imported", times := [], raising=False)
            assert registry.spec("bip").name == "bip"
            sys.modules.pop("fake_bip")  # the registry remembers by itself
            assert registry.spec("bip-2").name == "bip-2"
        assert times == [1]

    def test_blocked_router_of_a_module_in_use_stays_blocked(self, modules: PluginModules) -> None:
        first = modules.router("bip", also=["bip-2"])
        registry = registry_of(first, entry("bip-2", "fake_bip"), MOEROUTERS_PLUGINS="bip")
        assert registry.spec("bip").name == "bip"
        with pytest.raises(RouterUnavailable, match="blocked"):
            registry.spec("bip-2")

    def test_from_many_threads(self, modules: PluginModules) -> None:
        claim = modules.router("bip")
        path = modules.folder / "fake_bip.py"
        path.write_text("import time\n" + path.read_text().replace("    return", "    time.sleep(0.05)\n    return"))
        registry = registry_of(claim)
        with ThreadPoolExecutor(8) as pool:
            specs = list(pool.map(registry.spec, ["bip"] * 32))
        assert len({id(spec) for spec in specs}) == 1  # the hook was asked once

    def test_unknown(self) -> None:
        assert text(RouterNotFound, registry_of(entry("bip"), entry("loss-free")), "bipp") == (
            "no router named 'bipp'.\n"
            "  cause  did you mean 'bip'? installed: bip, loss-free, topk\n"
            "  fix    routers come from distributions with a 'moerouters' entry point; `moerouters plugins` lists them"
        )

    def test_unknown_with_nothing_near(self) -> None:
        assert "  cause  installed: topk\n" in text(RouterNotFound, registry_of(), "sinkhorn")

    def test_failed(self) -> None:
        registry = registry_of(entry("bip", version="0.3.1"))
        expected = (
            "router 'bip' is installed, but its plugin cannot be loaded.\n"
            "  from   moerouters-bip 0.3.1, entry point bip = fake_bip (site-packages/fake_bip)\n"
            "  cause  ModuleNotFoundError: No module named 'fake_bip'\n"
            "  fix    `pip install -U moerouters-bip`, or `pip uninstall moerouters-bip`\n"
            "         or run without it: MOEROUTERS_DISABLE=bip"
        )
        assert text(RouterUnavailable, registry, "bip") == expected
        assert text(RouterUnavailable, registry, "bip") == expected  # it is not tried again

    def test_failure_is_chained_to_the_original(self, modules: PluginModules) -> None:
        modules.write("fake_bip", "import sys; sys.exit('bye')")
        with pytest.raises(RouterUnavailable) as caught:
            registry_of(entry("bip")).spec("bip")
        assert isinstance(caught.value.__cause__, SystemExit)

    def test_failure_without_an_exception_of_the_plugin_is_chained_too(self, modules: PluginModules) -> None:
        modules.write("fake_bip", "")
        with pytest.raises(RouterUnavailable) as caught:
            registry_of(entry("bip")).spec("bip")
        assert str(caught.value.__cause__) == "the module has no function moerouters_routers"

    def test_failed_editable_plugin_is_mended_at_its_source(self) -> None:
        assert text(RouterUnavailable, registry_of(entry("bip", editable=True)), "bip").endswith(
            "  fix    correct the source in site-packages/fake_bip, or `pip uninstall moerouters-bip`\n"
            "         or run without it: MOEROUTERS_DISABLE=bip"
        )

    def test_failed_built_in_router_is_mended_by_the_core(self) -> None:
        assert text(RouterUnavailable, registry_of(), "topk").endswith(
            "  fix    `pip install --force-reinstall moerouters`"
        )

    def test_failed_neighbour_changes_nothing(self, modules: PluginModules) -> None:
        registry = registry_of(entry("broken"), modules.router("bip"))
        text(RouterUnavailable, registry, "broken")
        assert registry.spec("bip").name == "bip"
        assert registry.available() == ("bip", "broken", "topk")  # by metadata, so the same before and after

    def test_blocked(self) -> None:
        assert text(RouterUnavailable, registry_of(entry("bip"), MOEROUTERS_PLUGINS=""), "bip") == (
            "router 'bip' is installed, but blocked.\n"
            "  from   moerouters-bip 0.1.0, entry point bip = fake_bip (site-packages/fake_bip)\n"
            "  cause  not on the allowlist, MOEROUTERS_PLUGINS\n"
            "  fix    add 'bip' to the list"
        )

    def test_conflict(self) -> None:
        twins = entry("twin", "a", distribution="twin-a"), entry("twin", "b", distribution="twin-b")
        assert text(RouterUnavailable, registry_of(*twins), "twin") == (
            "router 'twin' is claimed more than once, and nobody wins.\n"
            "  from   twin-a 0.1.0, entry point twin = a (site-packages/a)\n"
            "         twin-b 0.1.0, entry point twin = b (site-packages/b)\n"
            "  cause  one name stands for one router, and twin-a and twin-b claim it\n"
            "  fix    pick one: MOEROUTERS_DISABLE=twin@twin-b leaves twin-a\n"
            "         (with an allowlist, write twin@twin-a in MOEROUTERS_PLUGINS);\n"
            "         or `pip uninstall` the one you do not want"
        )

    def test_conflict_with_a_blocked_third(self) -> None:
        triplets = [entry("twin", name, distribution=f"twin-{name}") for name in "abc"]
        message = text(RouterUnavailable, registry_of(*triplets, MOEROUTERS_DISABLE="twin@twin-a"), "twin")
        assert message.startswith("router 'twin' is claimed more than once, and nobody wins.\n  from   twin-b 0.1.0")
        assert "twin-b and twin-c claim it" in message

    def test_picked_claimant_is_used(self, modules: PluginModules) -> None:
        modules.router("twin", "twin_b")
        twins = entry("twin", "twin_a", distribution="twin-a"), entry("twin", "twin_b", distribution="twin-b")
        found = registry_of(*twins, MOEROUTERS_DISABLE="twin@twin-a").info("twin")
        assert found.provenance.distribution == "twin-b"

    def test_built_in_router_is_not_shadowed(self, modules: PluginModules) -> None:
        shadow = entry("topk", "shadow", distribution="moerouters-shadow")
        assert registry_of(shadow).info("topk").provenance.distribution == "moerouters"

    def test_too_new(self, modules: PluginModules) -> None:
        assert text(RouterUnavailable, registry_of(modules.router("bip", api="9.0")), "bip") == (
            "router 'bip' does not fit this moerouters.\n"
            "  from   moerouters-bip 0.1.0, entry point bip = fake_bip (site-packages/fake_bip)\n"
            "  cause  it was written for plugin API 9.0; this is moerouters 0.1.0 with API 0.1\n"
            "  fix    `pip install -U moerouters`\n"
            "         or run without it: MOEROUTERS_DISABLE=bip"
        )

    def test_too_old(self, modules: PluginModules) -> None:
        registry = registry_of(modules.router("bip", api="0.1"), host_api="1.2")
        assert text(RouterUnavailable, registry, "bip").endswith(
            "  cause  it was written for plugin API 0.1; this is moerouters 0.1.0 with API 1.2\n"
            "  fix    `pip install -U moerouters-bip`, or `pip uninstall moerouters-bip`\n"
            "         or run without it: MOEROUTERS_DISABLE=bip"
        )


class TestBuild:
    def test_factory_gets_gating_and_config(self) -> None:
        registry = registry_of()
        with registry.temporary(OWN):
            assert registry.build("own", GATING) == (GATING, RouterConfig())

    def test_bad_config(self) -> None:
        registry = registry_of()
        with registry.temporary(OWN), pytest.raises(ConfigError, match="typo: unknown field"):
            registry.build("own", GATING, config={"typo": 1})


class TestConfigure:
    def test_wins_over_the_environment(self) -> None:
        registry = registry_of(entry("bip"), entry("loss-free"), MOEROUTERS_PLUGINS="bip", MOEROUTERS_DISABLE="bip")
        assert registry.available() == ("topk",)
        registry.configure(plugins=["bip", "loss-free"], disable=[])
        assert registry.available() == ("bip", "loss-free", "topk")

    def test_none_gives_a_list_back_to_the_environment(self) -> None:
        registry = registry_of(entry("bip"))
        registry.configure(plugins=())
        assert registry.available() == ("topk",)
        registry.configure()
        assert registry.available() == ("bip", "topk")

    def test_typing_error_leaves_the_lists_as_they_were(self) -> None:
        registry = registry_of(entry("bip"))
        registry.configure(disable=["bip"])
        with pytest.raises(ConfigError, match=r"configure\(plugins=...\) names 'bop'"):
            registry.configure(plugins=["bop"])
        assert registry.available() == ("topk",)

    def test_covers_a_typing_error_of_the_environment(self) -> None:
        registry = registry_of(MOEROUTERS_PLUGINS="bop")
        with pytest.raises(ConfigError, match="MOEROUTERS_PLUGINS names 'bop'"):
            registry.available()
        registry.configure(plugins=())
        assert registry.available() == ("topk",)


class TestStrict:
    def test_conflict_raises_at_once(self, modules: PluginModules) -> None:
        registry = registry_of(entry("twin", "a"), entry("twin", "b"), MOEROUTERS_STRICT_PLUGINS="1")
        with pytest.raises(RouterUnavailable, match="router 'twin' is claimed more than once"):
            registry.spec("topk")

    def test_failure_raises_when_all_are_imported(self, modules: PluginModules) -> None:
        registry = registry_of(modules.router("bip"), entry("broken"), MOEROUTERS_STRICT_PLUGINS="1")
        assert registry.spec("bip").name == "bip"  # nobody named the broken one
        with pytest.raises(RouterUnavailable, match="router 'broken' is installed") as caught:
            registry.plugins(load=True)
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)

    def test_blocked_is_no_failure(self, modules: PluginModules) -> None:
        registry = registry_of(entry("broken"), MOEROUTERS_STRICT_PLUGINS="1", MOEROUTERS_DISABLE="broken")
        assert states(registry, load=True) == {"fake_broken": "blocked", "fake_builtin": "ready"}


class TestFreeze:
    def test_loaded_routers_stay_usable(self, modules: PluginModules) -> None:
        registry = registry_of(modules.router("bip"))
        registry.spec("bip")
        registry.freeze()
        registry.freeze()
        assert registry.spec("bip").name == "bip"
        assert registry.available() == ("bip", "topk")

    def test_nothing_is_imported_any_more(self, modules: PluginModules) -> None:
        registry = registry_of(modules.router("bip"))
        registry.freeze()
        assert text(RouterUnavailable, registry, "bip") == (
            "router 'bip' is named too late.\n"
            "  from   moerouters-bip 0.1.0, entry point bip = fake_bip (site-packages/fake_bip)\n"
            "  cause  the registry is frozen: a plugin imported now could change the run\n"
            "  fix    name the router in the run's config, or build it before the registry is frozen"
        )
        assert set(states(registry, load=True).values()) == {"discovered"}
        assert "fake_bip" not in sys.modules

    def test_lists_are_those_of_that_moment(self) -> None:
        environ = {"MOEROUTERS_DISABLE": "bip"}
        registry = Registry(discover=lambda: (entry("bip"),), environ=environ)
        registry.freeze()
        environ.clear()
        assert registry.available() == ()
        with pytest.raises(MoeroutersError) as caught:
            registry.configure(disable=())
        assert str(caught.value) == (
            "the registry is frozen: configure comes too late.\n"
            "  cause  a run must not change its plugins once it has started\n"
            "  fix    do it before freeze()"
        )

    def test_no_temporary_router_either(self) -> None:
        registry = registry_of()
        registry.freeze()
        with pytest.raises(MoeroutersError, match="temporary comes too late"), registry.temporary(OWN):
            pass


class TestTemporary:
    def test_is_there_inside_the_block(self) -> None:
        registry = registry_of()
        with registry.temporary(OWN):
            assert registry.available() == ("own", "topk")
            found = registry.info("own")
            assert (found.spec, found.state) == (OWN, PluginState.READY)
            assert str(found.provenance) == (f"(temporary) 0, entry point own = {__name__}:<lambda> (this process)")
        assert registry.available() == ("topk",)

    def test_goes_also_after_an_error(self) -> None:
        registry = registry_of()
        with pytest.raises(ZeroDivisionError), registry.temporary(OWN):
            raise ZeroDivisionError
        assert registry.available() == ("topk",)

    def test_several(self) -> None:
        registry = registry_of()
        with registry.temporary(OWN), registry.temporary(OWN.model_copy(update={"name": "own-2"})):
            assert registry.available() == ("own", "own-2", "topk")

    def test_shadows_nobody(self) -> None:
        registry = registry_of()
        with pytest.raises(ConfigError) as caught, registry.temporary(OWN.model_copy(update={"name": "topk"})):
            pass
        assert str(caught.value) == (
            "temporary router 'topk' has the name of another router.\n"
            "  cause  names are never shadowed\n"
            "  fix    give it a name of its own"
        )

    def test_passes_the_version_gate(self) -> None:
        registry = registry_of()
        future = OWN.model_copy(update={"api": "9.0"})
        with pytest.raises(RouterUnavailable, match=r"plugin API 9\.0"), registry.temporary(future):
            pass


class TestExtras:
    BODY = """
        HEARD = []

        @hookimpl
        def moerouters_dispatchers():
            return [DispatcherSpec(name="pigeon", summary="Carries.", factory=dict)]

        @hookimpl
        def moerouters_step_metrics(metrics):
            HEARD.append(dict(metrics))
    """

    def chatty(self, modules: PluginModules, api: str = "0.1") -> Registry:
        claim = modules.router("bip", api=api)
        path = modules.folder / "fake_bip.py"
        path.write_text(path.read_text() + dedent(self.BODY))
        return registry_of(claim)

    def test_come_with_the_named_plugin(self, modules: PluginModules) -> None:
        registry = self.chatty(modules)
        assert registry.dispatchers() == {}
        assert registry.step_metrics_hook() is None
        registry.spec("bip")
        assert list(registry.dispatchers()) == ["pigeon"]
        notify = registry.step_metrics_hook()
        assert notify is not None
        metrics: Mapping[str, Any] = {"max_vio": 0.25}
        notify(metrics)
        assert sys.modules["fake_bip"].HEARD == [{"max_vio": 0.25}]

    def test_do_not_come_with_an_incompatible_one(self, modules: PluginModules) -> None:
        registry = self.chatty(modules, api="9.0")
        text(RouterUnavailable, registry, "bip")
        assert registry.dispatchers() == {}
        assert registry.step_metrics_hook() is None

    def test_go_when_the_plugin_is_blocked_later(self, modules: PluginModules) -> None:
        registry = self.chatty(modules)
        registry.spec("bip")
        registry.configure(disable=["bip"])
        assert registry.step_metrics_hook() is None
