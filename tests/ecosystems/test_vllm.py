"""The real layer factory, routers and plug-in loader of vLLM, on a CPU; skipped where that is not installed.

The factory is real up to the experts, whose kernels are compiled: experts and runner are classes handed to it. Some
packages that vLLM imports, and that nothing here uses, are stand-ins.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moerouters.errors import ConfigError, UnsupportedError

from .declared import registered_as
from .learned import saved_layers
from .stand_ins import stand_in

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm")
    stand_in("opentelemetry", "partial_json_parser", "llguidance", "einops")
    from vllm import platforms, plugins
    from vllm.platforms.cpu import CpuPlatform

    platforms._current_platform = CpuPlatform()  # the wheel is built for another one, and modules ask when imported
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.model_executor.layers import fused_moe
    from vllm.model_executor.layers.fused_moe import layer
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of vLLM's own making

E, K, T, D = 8, 2, 24, 16
GROUPED = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
BIAS_E = torch.linspace(-0.3, 0.3, E)
CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax as it is": {"renormalize": False},
    "groups": GROUPED | {"renormalize": False},
    "groups, scaled": GROUPED | {"renormalize": False, "routed_scaling_factor": 16.0},
    "biased groups": GROUPED | {"scoring_func": "sigmoid", "e_score_correction_bias": BIAS_E},
    "biased groups, scaled": GROUPED
    | {"scoring_func": "sigmoid", "e_score_correction_bias": BIAS_E, "routed_scaling_factor": 2.5},
    "scaled by the runner": GROUPED
    | {"renormalize": False, "routed_scaling_factor": 16.0, "apply_routed_scale_to_output": True},
}


class Kept:
    """Experts or runner of a layer: keeps what the factory hands it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(kwargs)


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meeting = tmp_path_factory.mktemp("world") / "rendezvous"
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel(1, 1, backend="gloo")
        yield
        destroy_model_parallel()
        destroy_distributed_environment()


@pytest.fixture(autouse=True)
def loader(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """vLLM's plug-in loader, which finds what moerouters declares and nothing else."""
    real = importlib.metadata.entry_points

    def entry_points(*, group: str) -> importlib.metadata.EntryPoints:
        return registered_as(group) if group.startswith("vllm.") else real(group=group)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    monkeypatch.delenv("MOEROUTERS_SERVE", raising=False)
    for module in (layer, fused_moe):  # what is wrapped comes back
        monkeypatch.setattr(module, "FusedMoEFactory", module.FusedMoEFactory)
    return plugins


def router_of(number: int = 0, **asked: Any) -> Any:
    """The router of a layer, as a model builds it."""
    given = {"num_experts": E, "top_k": K, "hidden_size": D, "intermediate_size": D, "runner_cls": Kept}
    built = fused_moe.FusedMoEFactory(
        **given, routed_experts_cls=Kept, prefix=f"model.layers.{number}.mlp.experts", **asked
    )
    return built.router


def logits() -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0))


def chosen(router: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights, each token's in the order of ids."""
    weights_TK, ids_TK = router.select_experts(torch.zeros(T, D), logits(), torch.int32)
    assert (weights_TK.dtype, ids_TK.dtype) == (torch.float32, torch.int32)
    ids_TK, order_TK = ids_TK.long().sort(1)
    return ids_TK, weights_TK.gather(1, order_TK)


def test_without_the_variable_models_get_their_stock_routers(loader: ModuleType) -> None:
    stock = fused_moe.FusedMoEFactory
    loader.load_general_plugins()
    assert fused_moe.FusedMoEFactory is stock and type(router_of()) is CPURouter


@pytest.mark.parametrize("case", CASES)
def test_topk_gives_what_the_stock_router_gives(case: str, loader: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_ids_TK, stock_TK = chosen(router_of(**CASES[case]))
    monkeypatch.setenv("MOEROUTERS_SERVE", "topk")
    loader.load_general_plugins()
    router = router_of(**CASES[case])
    assert isinstance(router, CustomRoutingRouter) and not router.supports_monolithic_kernels
    assert router.routing_method_type.name == "Custom"
    ids_TK, weights_TK = chosen(router)
    assert torch.equal(ids_TK, stock_ids_TK)
    torch.testing.assert_close(weights_TK, stock_TK)


@pytest.mark.parametrize("plugin", ["loss-free", "bip", "quantile"])
def test_each_layer_serves_with_what_its_router_has_learned(
    plugin: str, loader: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = tmp_path / "state.safetensors"
    layers = saved_layers(plugin, state, num_experts=E, top_k=K, hidden_size=D)
    monkeypatch.setenv("MOEROUTERS_SERVE", plugin)
    monkeypatch.setenv("MOEROUTERS_SERVE_STATE", str(state))
    stock_ids_TK, _ = chosen(router_of())
    loader.load_general_plugins()
    for number, each in enumerate(layers):
        expected = each.router(logits())
        expected_ids_TK, order_TK = expected.expert_ids.sort(1)
        ids_TK, weights_TK = chosen(router_of(number))
        assert torch.equal(ids_TK, expected_ids_TK) and not torch.equal(ids_TK, stock_ids_TK)
        torch.testing.assert_close(weights_TK, expected.weights.gather(1, order_TK))


def test_what_cannot_be_served_is_refused_where_a_layer_is_built(
    loader: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEROUTERS_SERVE", "loss-free")
    loader.load_general_plugins()
    with pytest.raises(UnsupportedError, match="MOEROUTERS_SERVE_STATE"):
        router_of()
    with pytest.raises(ConfigError, match="custom_routing_function"):
        router_of(custom_routing_function=print)


def test_a_mistake_in_the_variables_stops_the_engine(loader: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEROUTERS_SERVE", "topk")
    monkeypatch.setenv("MOEROUTERS_SERVE_CONFIG", "[]")
    with pytest.raises(ConfigError, match="no JSON object"):
        loader.load_general_plugins()
