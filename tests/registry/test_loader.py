import sys

import pytest

from moerouters.registry.hookspecs import PluginHooks
from moerouters.registry.loader import LoadedPlugin, LoadFailure, load_plugin
from support.fake_plugins import PluginModules

SPEC = "RouterSpec(name='bip', summary='Is bip.', factory=dict, api='0.1')"
ROUTERS = f"@hookimpl\ndef moerouters_routers():\n    return ({SPEC},)\n"


def load(modules: PluginModules, body: str, *declared: str) -> LoadedPlugin:
    modules.write("fake_bip", body)
    return load_plugin("fake_bip", declared=frozenset(declared or {"bip"}))


def cause(modules: PluginModules, body: str, *declared: str) -> str:
    with pytest.raises(LoadFailure) as caught:
        load(modules, body, *declared)
    return str(caught.value)


def test_routers_by_name(modules: PluginModules) -> None:
    plugin = load(modules, ROUTERS)
    assert {name: spec.summary for name, spec in plugin.routers.items()} == {"bip": "Is bip."}
    assert plugin.dispatchers == {}
    assert plugin.step_metrics is None


def test_what_a_plugin_offers_cannot_be_changed(modules: PluginModules) -> None:
    plugin = load(modules, ROUTERS)
    with pytest.raises(TypeError, match="does not support item assignment"):
        plugin.routers["other"] = plugin.routers["bip"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("import flux_capacitor", "ModuleNotFoundError: No module named 'flux_capacitor'"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError: invalid syntax (fake_bip.py, line 2)"),
        ("", "the module has no function moerouters_routers"),
        (ROUTERS.removeprefix("@hookimpl"), "moerouters_routers is not marked with @hookimpl"),
        ("@hookimpl\ndef moerouters_routers():\n    return ()", "moerouters_routers returned no router"),
        ("@hookimpl\ndef moerouters_routers():\n    return None", "moerouters_routers returned no router"),
        ("@hookimpl\ndef moerouters_routers():\n    raise KeyError('x')", "KeyError: 'x'"),
        (
            f"@hookimpl\ndef moerouters_routers():\n    return {SPEC}",
            "moerouters_routers returned one RouterSpec; it returns a tuple of them",
        ),
        (
            "@hookimpl\ndef moerouters_routers():\n    return ('bip',)",
            "moerouters_routers returned a str where a RouterSpec belongs",
        ),
        (
            f"@hookimpl\ndef moerouters_routers():\n    return ({SPEC}, {SPEC})",
            "moerouters_routers returned 'bip' twice",
        ),
        ("@hookimpl\ndef moerouters_routers():\n    return 3", "TypeError: 'int' object is not iterable"),
        (
            ROUTERS.replace("'Is bip.'", "'', x=1"),
            "bad RouterSpec: summary: string should have at least 1 character (got ''); x: unknown field",
        ),
        (
            ROUTERS + "@hookimpl\ndef moerouters_dispatchers():\n    return ('pigeon',)",
            "moerouters_dispatchers returned a str where a DispatcherSpec belongs",
        ),
    ],
)
def test_causes(modules: PluginModules, body: str, expected: str) -> None:
    assert cause(modules, body) == expected


def test_original_exception_is_chained(modules: PluginModules) -> None:
    with pytest.raises(LoadFailure) as caught:
        load(modules, "import sys; sys.exit(3)")
    assert isinstance(caught.value.__cause__, SystemExit)
    assert caught.value.__cause__.code == 3


def test_keyboard_interrupt_is_the_users(modules: PluginModules) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(modules, "raise KeyboardInterrupt")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("moerouters_router", "did you mean 'moerouters_routers'?"),
        ("on_step", "the hooks are moerouters_dispatchers, moerouters_routers, moerouters_step_metrics"),
    ],
)
def test_misspelt_hook(modules: PluginModules, name: str, hint: str) -> None:
    assert cause(modules, ROUTERS + f"@hookimpl\ndef {name}():\n    return ()") == f"unknown hook {name!r}; {hint}"


def test_misspelt_hook_of_one_plugin_does_not_disturb_another(modules: PluginModules) -> None:
    cause(modules, "@hookimpl\ndef moerouters_router():\n    return ()")
    modules.router("other")
    assert set(load_plugin("fake_other", declared=frozenset({"other"})).routers) == {"other"}


def test_unknown_argument_of_a_hook(modules: PluginModules) -> None:
    text = cause(modules, ROUTERS + "@hookimpl\ndef moerouters_step_metrics(metrics, loss): ...")
    assert "moerouters_step_metrics(metrics, loss)" in text
    assert "Argument(s) {'loss'} are declared in the hookimpl but can not be found in the hookspec" in text


def test_entry_point_without_router(modules: PluginModules) -> None:
    assert cause(modules, ROUTERS, "bip", "bip-2") == (
        "entry point 'bip-2' names no router of the module, which returns bip"
    )


def test_router_without_entry_point(modules: PluginModules) -> None:
    modules.router("bip", also=["extra"])
    with pytest.raises(LoadFailure, match=r"^router 'extra' has no entry point of its name$"):
        load_plugin("fake_bip", declared=frozenset({"bip"}))


def test_every_hook_is_called(modules: PluginModules) -> None:
    """The hook surface stays as small as this test: a hook that is not in it is a hook nobody needs."""
    body = ROUTERS + (
        "HEARD = []\n"
        "@hookimpl\ndef moerouters_dispatchers():\n"
        "    return [DispatcherSpec(name='pigeon', summary='Carries.', factory=dict)]\n"
        "@hookimpl\ndef moerouters_step_metrics(metrics):\n"
        "    HEARD.append(metrics)\n"
    )
    assert [name for name in vars(PluginHooks) if not name.startswith("_")] == [
        "moerouters_routers",
        "moerouters_dispatchers",
        "moerouters_step_metrics",
    ]
    plugin = load(modules, body)
    assert list(plugin.routers) == ["bip"]
    assert plugin.dispatchers["pigeon"].summary == "Carries."
    assert plugin.step_metrics is not None
    plugin.step_metrics({"max_vio": 0.5})
    heard = sys.modules["fake_bip"].HEARD
    assert heard == [{"max_vio": 0.5}]
    with pytest.raises(TypeError):
        heard[0]["max_vio"] = 0.0  # one listener cannot change what the next one sees


def test_hook_implementation_may_take_fewer_arguments(modules: PluginModules) -> None:
    plugin = load(modules, ROUTERS + "CALLS = []\n@hookimpl\ndef moerouters_step_metrics():\n    CALLS.append(1)\n")
    assert plugin.step_metrics is not None
    plugin.step_metrics({})
    assert sys.modules["fake_bip"].CALLS == [1]
