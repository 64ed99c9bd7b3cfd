"""Ranks compare what routers they run; what a fingerprint tells apart. The exchange itself: tests/test_ranks.py."""

from __future__ import annotations

import pytest
import torch

from moerouters import Gating, MoELayer, Router, RouterConfig, build
from moerouters.fingerprint import fingerprint, router_identity


class Mine(Router):
    def __init__(self, gating: Gating, config: RouterConfig | None = None) -> None:
        super().__init__(gating)
        self.config = config


class Other(Mine):
    pass


def one(**changes: object) -> Router:
    return build("topk", Gating.softmax(4, 2, **changes))


def test_the_same_router_twice_has_one_fingerprint() -> None:
    assert fingerprint({"a": one()}) == fingerprint({"a": one()})
    assert len(fingerprint({})) == 32


def test_learned_values_do_not_matter() -> None:
    """Ranks may attach before and after a checkpoint was loaded; shapes have to agree, values are exchanged anyway."""
    router = Mine(Gating.sigmoid(4, 2, correction_bias=True))
    before = fingerprint({"a": router})
    with torch.no_grad():
        router.gating.correction_bias_E.add_(1)
    assert fingerprint({"a": router}) == before


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (one(scale=2.0), "gating"),
        (build("topk", Gating.softmax(4, 1)), "gating"),
        (Mine(Gating.softmax(4, 2)), "router"),
    ],
)
def test_what_differs_is_told_apart(other: Router, part: str) -> None:
    assert fingerprint({"a": one()}) != fingerprint({"a": other})
    assert router_identity(one())[part] != router_identity(other)[part]


def test_code_and_config_are_told_apart() -> None:
    class Config(RouterConfig):
        rate: float = 0.1

    gating = Gating.softmax(4, 2)
    assert router_identity(Mine(gating))["code"] != router_identity(Other(gating))["code"]
    first, second = Mine(gating, Config()), Mine(gating, Config(rate=0.2))
    assert router_identity(first)["config"] == '{"rate":0.1}'
    assert fingerprint({"a": first}) != fingerprint({"a": second})


def test_names_of_layers_count() -> None:
    assert fingerprint({"a": one()}) != fingerprint({"b": one()})


def test_a_class_without_source_has_an_identity() -> None:
    namespace: dict[str, type[Router]] = {}
    exec("class Typed(Base): pass", {"Base": Mine}, namespace)
    router = namespace["Typed"](Gating.softmax(4, 2))
    assert router_identity(router)["code"]
    MoELayer(router, hidden_size=4, expert_size=2)
