import pytest

from moerouters.errors import ConfigError
from moerouters.registry.switches import Switches
from support.fake_plugins import TOPK, entry

ENTRIES = (entry("bip"), entry("loss-free"), entry("twin", distribution="twin-a"), entry("twin", distribution="Twin_B"))


def test_nothing_set_allows_everything() -> None:
    assert Switches.from_environment({}) == Switches(allow=None, deny=None, strict=False)


def test_empty_allowlist_is_a_list_that_allows_nothing() -> None:
    allow = Switches.from_environment({"MOEROUTERS_PLUGINS": ""}).allow
    assert allow is not None
    assert allow.items == ()
    assert not allow.selects(ENTRIES[0])


def test_lists_are_comma_separated() -> None:
    switches = Switches.from_environment({"MOEROUTERS_PLUGINS": " bip, loss-free,", "MOEROUTERS_DISABLE": "bip"})
    assert switches.allow is not None and switches.deny is not None
    assert (switches.allow.items, switches.deny.items) == (("bip", "loss-free"), ("bip",))


@pytest.mark.parametrize(("text", "strict"), [("", False), ("0", False), ("1", True)])
def test_strict(text: str, strict: bool) -> None:
    assert Switches.from_environment({"MOEROUTERS_STRICT_PLUGINS": text}).strict is strict


def test_strict_is_a_switch() -> None:
    with pytest.raises(ConfigError) as caught:
        Switches.from_environment({"MOEROUTERS_STRICT_PLUGINS": "yes"})
    assert str(caught.value) == (
        "MOEROUTERS_STRICT_PLUGINS is 'yes'.\n"
        "  cause  it is a switch: 1 is on, 0 or unset is off\n"
        "  fix    set it to 1, or unset it"
    )


def test_config_wins_list_by_list() -> None:
    environment = Switches.from_environment({"MOEROUTERS_PLUGINS": "bip", "MOEROUTERS_DISABLE": "bip"})
    merged = environment.under(Switches.from_config(plugins=["loss-free"], disable=None))
    assert merged.allow is not None and merged.deny is not None
    assert (merged.allow.items, merged.allow.source) == (("loss-free",), "configure(plugins=...)")
    assert (merged.deny.items, merged.deny.source) == (("bip",), "MOEROUTERS_DISABLE")
    assert environment.under(Switches.from_config(plugins=None, disable=None)) == environment


def test_empty_list_of_the_config_wins_too() -> None:
    environment = Switches.from_environment({"MOEROUTERS_PLUGINS": "bip", "MOEROUTERS_DISABLE": "bip"})
    merged = environment.under(Switches.from_config(plugins=(), disable=()))
    assert merged.allow is not None and merged.deny is not None
    assert (merged.allow.items, merged.deny.items) == ((), ())


def test_a_string_is_no_list() -> None:
    with pytest.raises(ConfigError) as caught:
        Switches.from_config(plugins="bip", disable=None)
    assert str(caught.value) == (
        "configure(plugins=...) got the string 'bip'.\n  cause  it takes a list of names\n  fix    ['bip']"
    )


def test_item_may_name_the_distribution() -> None:
    deny = Switches.from_environment({"MOEROUTERS_DISABLE": "twin@twin-b"}).deny
    assert deny is not None
    assert [deny.selects(claim) for claim in ENTRIES] == [False, False, False, True]


@pytest.mark.parametrize(
    ("item", "cause"),
    [
        ("bipp", "did you mean 'bip'? installed: bip, loss-free, topk, twin"),
        ("sinkhorn", "installed: bip, loss-free, topk, twin"),
        ("twin@twin-c", "did you mean 'twin@twin-a'? installed: bip, loss-free, topk, twin"),
    ],
)
@pytest.mark.parametrize("variable", ["MOEROUTERS_PLUGINS", "MOEROUTERS_DISABLE"])
def test_unknown_name_is_an_error(variable: str, item: str, cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Switches.from_environment({variable: item}).check((*ENTRIES, TOPK))
    assert str(caught.value) == (
        f"{variable} names {item!r}, which no installed plugin offers.\n"
        f"  cause  {cause}\n"
        "  fix    install the distribution that offers it, or correct the list"
    )


def test_built_in_router_cannot_be_switched_off() -> None:
    with pytest.raises(ConfigError) as caught:
        Switches.from_environment({"MOEROUTERS_DISABLE": "bip,topk"}).check((*ENTRIES, TOPK))
    assert str(caught.value) == (
        "MOEROUTERS_DISABLE names 'topk', which is built in.\n"
        "  cause  a built-in router cannot be switched off\n"
        "  fix    take it off the list"
    )


def test_known_names_pass() -> None:
    lists = {"MOEROUTERS_PLUGINS": "topk,bip,twin@twin-a", "MOEROUTERS_DISABLE": "loss-free"}
    Switches.from_environment(lists).check((*ENTRIES, TOPK))
