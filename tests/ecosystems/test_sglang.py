"""The real TopK of SGLang, its loader of plug-ins and its hooks, on a CPU; skipped where that is not installed.

Some packages that SGLang imports, and that nothing here uses, are stand-ins: images, tokenizers, quantised files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from .declared import registered_as
from .learned import saved_layers
from .stand_ins import stand_in

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("sglang")
    from transformers import AutoImageProcessor, AutoProcessor  # noqa: F401  (asks for the version of torchvision)

    stand_in("torchvision", "sentencepiece", "einops", "compressed_tensors", "gguf")
    from sglang.srt import plugins
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.runtime_context import get_context

E, K, T, D = 8, 2, 24, 4
GROUPED = {"use_grouped_topk": True, "num_expert_group": 4, "topk_group": 2}
CASES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax as it is": {"renormalize": False},
    "sigmoid": {"scoring_func": "sigmoid"},
    "biased": {"scoring_func": "sigmoid", "correction_bias": torch.linspace(-0.3, 0.3, E)},
    "groups": GROUPED | {"renormalize": False},
    "biased groups": GROUPED | {"correction_bias": torch.linspace(-0.3, 0.3, E)},
    "biased groups, scaled": GROUPED
    | {"correction_bias": torch.zeros(E), "routed_scaling_factor": 2.5, "apply_routed_scaling_factor_on_output": True},
}


@pytest.fixture(autouse=True)
def server() -> Iterator[None]:
    with get_context().override_server_args():
        yield


@pytest.fixture(autouse=True)
def loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """SGLang's plug-in loader, which finds what moerouters declares and nothing else."""
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: registered_as(group))
    monkeypatch.setattr(plugins, "_plugins_loaded", False)
    monkeypatch.delenv("MOEROUTERS_SERVE", raising=False)
    monkeypatch.setattr(TopK, "__init__", TopK.__init__)  # what a hook replaces comes back
    HookRegistry.reset()
    yield plugins
    HookRegistry.reset()


def logits() -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0))


def chosen(layer_id: int = 0, **asked: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights of a layer, each token's in the order of ids."""
    found = TopK(K, layer_id=layer_id, **asked).forward_native(torch.zeros(T, D), logits())
    ids_TK, order_TK = found.topk_ids.long().sort(1)
    return ids_TK, found.topk_weights.gather(1, order_TK)


def test_without_the_variable_no_hook_is_registered(loader: ModuleType) -> None:
    loader.load_plugins()
    assert not HookRegistry._hooks
    assert TopK(K, layer_id=0).topk_config.custom_routing_function is None


@pytest.mark.parametrize("case", CASES)
def test_topk_gives_what_the_stock_layer_gives(case: str, loader: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_ids_TK, stock_TK = chosen(**CASES[case])
    monkeypatch.setenv("MOEROUTERS_SERVE", "topk")
    loader.load_plugins()
    ids_TK, weights_TK = chosen(**CASES[case])
    assert torch.equal(ids_TK, stock_ids_TK)
    torch.testing.assert_close(weights_TK, stock_TK)


@pytest.mark.parametrize("router", ["loss-free", "bip", "quantile"])
def test_each_layer_serves_with_what_its_router_has_learned(
    router: str, loader: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    state = tmp_path / "state.safetensors"
    layers = saved_layers(router, state, num_experts=E, top_k=K, hidden_size=D)
    monkeypatch.setenv("MOEROUTERS_SERVE", router)
    monkeypatch.setenv("MOEROUTERS_SERVE_STATE", str(state))
    stock_ids_TK, _ = chosen()
    loader.load_plugins()
    for number, layer in enumerate(layers):
        expected = layer.router(logits())
        expected_ids_TK, order_TK = expected.expert_ids.sort(1)
        ids_TK, weights_TK = chosen(layer_id=number)
        assert torch.equal(ids_TK, expected_ids_TK) and not torch.equal(ids_TK, stock_ids_TK)
        torch.testing.assert_close(weights_TK, expected.weights.gather(1, order_TK))


@pytest.mark.parametrize("router", ["nosuch", "ds-moe"])
def test_a_mistake_in_the_variables_ends_the_process(
    router: str, loader: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEROUTERS_SERVE", router)
    with pytest.raises(SystemExit, match=router):
        loader.load_plugins()
