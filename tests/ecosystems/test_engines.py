"""What vLLM and SGLang are handed, through stand-ins that have their declared signatures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moerouters.ecosystems import sglang, vllm
from moerouters.ecosystems.serving import Request
from moerouters.errors import ConfigError, UnsupportedError

from .declared import CUSTOM, FACTORY, TOPK, declared, signature, symbol

E, K, T = 8, 2, 12


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    def add(name: str, **contents: Any) -> ModuleType:
        parts = name.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent) or ModuleType(parent))
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    yield add


# vLLM.


class CustomRoutingRouter:
    """As declared."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(signature(f"{CUSTOM}.__init__").bind(*args, **kwargs).arguments)


@pytest.fixture
def engine(modules: Callable[..., ModuleType]) -> tuple[ModuleType, list[dict[str, Any]]]:
    """vLLM's module with the factory, and what the factory was called with."""
    called: list[dict[str, Any]] = []
    path = "vllm.model_executor.layers.fused_moe"
    layer = modules(f"{path}.layer", FusedMoEFactory=declared(FACTORY, called))
    sys.modules[path].layer = layer  # type: ignore[attr-defined]
    modules(f"{path}.router.custom_routing_router", CustomRoutingRouter=CustomRoutingRouter)
    return layer, called


def built(engine: tuple[ModuleType, list[dict[str, Any]]], router: str = "topk", **asked: Any) -> dict[str, Any]:
    layer, called = engine
    factory = vllm.with_router(layer.FusedMoEFactory, Request(router=router))
    given = {"num_experts": E, "top_k": K, "hidden_size": 4, "intermediate_size": 4, "prefix": "model.layers.1.mlp"}
    assert factory(**(given | asked)) == "built"
    return called[-1]


def reference(logits_TE: Tensor, score: str, *, renormalize: bool, scale: float, bias_E: Tensor | None = None,
              groups: int = 1, kept: int = 1) -> tuple[Tensor, Tensor]:  # fmt: skip
    """vLLM's and SGLang's arithmetic, one token after the other."""
    rows = []
    for logits_E in logits_TE.float():
        scores = (logits_E.softmax(0) if score == "softmax" else logits_E.sigmoid()).tolist()
        biased = scores if bias_E is None else [a + b for a, b in zip(scores, bias_E.tolist(), strict=True)]
        size = E // groups
        rated = [sorted(biased[g * size : (g + 1) * size])[::-1] for g in range(groups)]
        rating = [row[0] if bias_E is None else row[0] + row[1] for row in rated]
        open_groups = sorted(range(groups), key=lambda g: -rating[g])[:kept]
        chosen = sorted((e for e in range(E) if e // size in open_groups), key=lambda e: -biased[e])[:K]
        total = sum(scores[e] for e in chosen) if renormalize else 1.0
        rows.append((chosen, [scores[e] / total * scale for e in chosen]))
    return torch.tensor([row[1] for row in rows]), torch.tensor([row[0] for row in rows], dtype=torch.int32)


CASES = [
    {"scoring_func": "softmax", "renormalize": True},
    {"scoring_func": "softmax", "renormalize": False},
    {"scoring_func": "sigmoid", "renormalize": True, "biased": True, "routed_scaling_factor": 2.5},
    {"scoring_func": "sigmoid", "renormalize": True, "biased": True, "groups": 4, "routed_scaling_factor": 2.5},
    {"scoring_func": "softmax", "renormalize": False, "groups": 4, "routed_scaling_factor": 16.0},
]


def asked_for(case: dict[str, Any], bias_name: str) -> tuple[dict[str, Any], Tensor | None]:
    case = dict(case)
    bias_E = torch.linspace(-0.3, 0.3, E) if case.pop("biased", False) else None
    groups = case.pop("groups", 1)
    if groups > 1:
        case |= {"use_grouped_topk": True, "num_expert_group": groups, "topk_group": 2}
    return case | {bias_name: bias_E}, bias_E


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vllm_gets_a_router_that_weighs_as_its_own(engine: Any, case: dict[str, Any]) -> None:
    asked, bias_E = asked_for(case, "e_score_correction_bias")
    router = built(engine, **asked)["router"]
    assert router.top_k == K and router.global_num_experts == E and not router.supports_monolithic_kernels
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    weights_TK, ids_TK = router.custom_routing_function(
        hidden_states=torch.zeros(T, 4), gating_output=logits_TE, topk=K, renormalize=case["renormalize"]
    )
    expected_TK, expected_ids_TK = reference(
        logits_TE, case["scoring_func"], renormalize=case["renormalize"], scale=case.get("routed_scaling_factor", 1.0),
        bias_E=bias_E, groups=case.get("groups", 1), kept=2 if "groups" in case else 1,
    )  # fmt: skip
    assert torch.equal(ids_TK, expected_ids_TK)
    torch.testing.assert_close(weights_TK, expected_TK)


def test_a_factor_that_vllm_applies_itself_is_left_to_it(engine: Any) -> None:
    asked, _ = asked_for(CASES[3] | {"apply_routed_scale_to_output": True}, "e_score_correction_bias")
    assert built(engine, **asked)["router"].custom_routing_function.router.gating.settings.scale == 1.0


def test_layers_that_have_a_router_or_route_by_token_id_stay(engine: Any) -> None:
    assert built(engine, router="topk", hash_indices_table=torch.zeros(3))["router"] is None
    layer, called = engine
    own = object()
    vllm.with_router(layer.FusedMoEFactory, Request(router="topk"))(E, K, 4, 4, router=own)
    assert called[-1]["router"] is own


@pytest.mark.parametrize(
    "asked", [{"custom_routing_function": print}, {"enable_eplb": True}, {"bias_vl": torch.zeros(E)}], ids=str
)
def test_what_a_routing_function_cannot_do_in_vllm_is_refused(engine: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(asked))):
        built(engine, **asked)


def test_vllm_calls_register_in_every_process(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, called = engine
    model = ModuleType("vllm.model_executor.models.some")
    model.FusedMoEFactory = stock = layer.FusedMoEFactory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, model.__name__, model)
    monkeypatch.delenv("MOEROUTERS_SERVE", raising=False)
    vllm.register()
    assert layer.FusedMoEFactory is stock
    monkeypatch.setenv("MOEROUTERS_SERVE", "topk")
    vllm.register()
    served = layer.FusedMoEFactory
    assert served is model.FusedMoEFactory is not stock
    vllm.register()
    assert layer.FusedMoEFactory is served
    served(num_experts=E, top_k=K, hidden_size=4, intermediate_size=4, prefix="layers.0.mlp")
    assert isinstance(called[-1]["router"], CustomRoutingRouter)


# SGLang.


@pytest.fixture
def hooks(modules: Callable[..., ModuleType]) -> list[tuple[Any, ...]]:
    """What was registered."""
    registered: list[tuple[Any, ...]] = []
    members = {name: name for name in symbol("sglang.srt.layers.moe.topk:TopKOutputFormat")}
    modules("sglang.srt.layers.moe.topk", TopKOutputFormat=type("TopKOutputFormat", (), members))
    how = signature("sglang.srt.plugins.hook_registry:HookRegistry.register")
    registry = type(
        "HookRegistry", (), {"register": staticmethod(lambda *args: registered.append(tuple(how.bind(*args).args)))}
    )
    types = {name: name for name in symbol("sglang.srt.plugins.hook_registry:HookType")}
    modules("sglang.srt.plugins.hook_registry", HookRegistry=registry, HookType=type("HookType", (), types))
    return registered


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sglang_gets_a_routing_function_that_weighs_as_its_own(hooks: Any, case: dict[str, Any]) -> None:
    asked, bias_E = asked_for(case, "correction_bias")
    layer = object()
    args, kwargs = sglang.before_topk(Request(router="topk"))(layer, top_k=K, layer_id=3, **asked)
    given = signature(TOPK).bind(*args[1:], **kwargs).arguments
    assert args[0] is layer and given["output_format"] == "STANDARD"
    assert not given["use_grouped_topk"] and given["correction_bias"] is None
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
    weights_TK, ids_TK = given["custom_routing_function"](
        hidden_states=torch.zeros(T, 4), gating_output=logits_TE, topk=K, renormalize=case["renormalize"]
    )
    expected_TK, expected_ids_TK = reference(
        logits_TE, case["scoring_func"], renormalize=case["renormalize"], scale=1.0,
        bias_E=bias_E, groups=case.get("groups", 1), kept=2 if "groups" in case else 1,
    )  # fmt: skip
    assert torch.equal(ids_TK, expected_ids_TK)
    torch.testing.assert_close(weights_TK, expected_TK)
    with pytest.raises(UnsupportedError, match="disable-shared-experts-fusion"):
        sglang.LayerRouter(Request(router="topk"), {"layer_id": 3}, K)(torch.zeros(T, 4), logits_TE, K + 1, True)


def test_sglang_is_hooked_only_if_the_environment_asks(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEROUTERS_SERVE", raising=False)
    sglang.register()
    assert hooks == []
    monkeypatch.setenv("MOEROUTERS_SERVE", "topk")
    sglang.register()
    module, _, name = sglang.TARGET.rpartition(".TopK.")
    assert f"{module}:TopK.{name}" == TOPK
    assert [(target, kind) for target, _, kind in hooks] == [(sglang.TARGET, "BEFORE")]


@pytest.mark.parametrize("router", ["nosuch", "ds-moe"])
def test_sglang_does_not_go_on_without_the_router(hooks: Any, router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It swallows what a plug-in raises, unless that ends the process."""
    monkeypatch.setenv("MOEROUTERS_SERVE", router)
    with pytest.raises(SystemExit, match=router):
        sglang.register()
    assert hooks == []
