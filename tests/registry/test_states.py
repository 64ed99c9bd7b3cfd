from collections.abc import Mapping

from moerouters.registry.states import PluginState, PluginStatus, resolve
from moerouters.registry.switches import Switches
from support.fake_plugins import TOPK, entry

BIP, FREE = entry("bip"), entry("loss-free")
TWINS = entry("twin", "twin_a", distribution="twin-a"), entry("twin", "twin_b", distribution="twin-b")
SHADOW = entry("topk", "shadow", distribution="moerouters-shadow")
ENTRIES = (BIP, FREE, *TWINS, TOPK, SHADOW)


def resolved(environ: Mapping[str, str]) -> dict[str, PluginStatus]:
    """Statuses by module."""
    return {status.entry.module: status for status in resolve(ENTRIES, Switches.from_environment(environ))}


def states(environ: Mapping[str, str]) -> dict[str, str]:
    return {module: status.state for module, status in resolved(environ).items()}


def test_without_switches() -> None:
    assert states({}) == {
        "fake_bip": "discovered",
        "fake_loss_free": "discovered",
        "twin_a": "conflict",
        "twin_b": "conflict",
        "fake_builtin": "discovered",
        "shadow": "conflict",
    }


def test_allowlist_leaves_built_in_routers_alone() -> None:
    found = resolved({"MOEROUTERS_PLUGINS": "bip"})
    allowed = {module for module, status in found.items() if status.state is PluginState.DISCOVERED}
    assert allowed == {"fake_bip", "fake_builtin"}
    blocked = found["fake_loss_free"]
    assert (blocked.state, blocked.cause, blocked.fix) == (
        PluginState.BLOCKED,
        "not on the allowlist, MOEROUTERS_PLUGINS",
        "add 'loss-free' to the list",
    )


def test_empty_allowlist_leaves_built_in_routers_only() -> None:
    found = states({"MOEROUTERS_PLUGINS": ""})
    assert found.pop("fake_builtin") == "discovered"
    assert set(found.values()) == {"blocked"}


def test_denylist() -> None:
    blocked = resolved({"MOEROUTERS_DISABLE": "bip"})["fake_bip"]
    assert (blocked.state, blocked.cause, blocked.fix) == (
        PluginState.BLOCKED,
        "on the denylist, MOEROUTERS_DISABLE",
        "take 'bip' off the list",
    )


def test_denying_one_claimant_leaves_the_other() -> None:
    found = states({"MOEROUTERS_DISABLE": "twin@twin-b"})
    assert (found["twin_a"], found["twin_b"]) == ("discovered", "blocked")


def test_allowing_one_claimant_leaves_it() -> None:
    found = states({"MOEROUTERS_PLUGINS": "twin@twin-b"})
    assert (found["twin_a"], found["twin_b"]) == ("blocked", "discovered")


def test_allowing_the_name_picks_nobody() -> None:
    found = states({"MOEROUTERS_PLUGINS": "twin"})
    assert (found["twin_a"], found["twin_b"]) == ("conflict", "conflict")


def test_conflict_says_how_to_pick() -> None:
    found = resolved({})
    assert found["twin_a"].cause == found["twin_b"].cause
    assert found["twin_a"].cause == "one name stands for one router, and twin-a and twin-b claim it"
    assert found["twin_a"].fix == (
        "pick one: MOEROUTERS_DISABLE=twin@twin-b leaves twin-a\n"
        "(with an allowlist, write twin@twin-a in MOEROUTERS_PLUGINS);\n"
        "or `pip uninstall` the one you do not want"
    )


def test_built_in_name_is_not_to_be_had() -> None:
    shadow = resolved({})["shadow"]
    assert shadow.cause == "a built-in router has this name and cannot be shadowed"
    assert shadow.fix == "`pip uninstall moerouters-shadow`, or tell its authors"


def test_summary_is_the_distributions_until_the_router_is_known() -> None:
    assert resolved({})["fake_bip"].summary == "About bip."
