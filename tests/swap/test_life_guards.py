"""What must not be swapped is refused with its reason, and nothing has changed then."""

from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from moerouters import swap
from moerouters.errors import ConfigError, MoeroutersError, UnsupportedError

from .life import batch, gates, hooks, logits, routers, tiny
from .zoo import RouterClass, tiny_inputs, tiny_model

GATE = "model.layers.1.mlp.gate"


def replace_forward(model: PreTrainedModel) -> None:
    """As accelerate's add_hook_to_module does it."""
    gate = gates(model)[GATE]
    old = gate.forward
    gate.forward = lambda *args, **kwargs: old(*args, **kwargs)


def to_meta(model: PreTrainedModel) -> None:
    gates(model)[GATE].to("meta")


def quantise(model: PreTrainedModel) -> None:
    weight = torch.zeros(8, 32, dtype=torch.int8)
    gates(model)[GATE].weight = nn.Parameter(weight, requires_grad=False)


def subclass_of_tensor(model: PreTrainedModel) -> None:
    class Packed(torch.Tensor):
        pass

    gates(model)[GATE].weight = nn.Parameter(torch.zeros(8, 32).as_subclass(Packed))


def use_kernels(model: PreTrainedModel) -> None:
    """What `model.use_kernels = True` notes once it has replaced forwards; the library it needs is not installed."""
    model._use_kernels = True
    assert model.use_kernels


OBSTACLES: dict[str, tuple[Callable[[PreTrainedModel], None], str]] = {
    "forward": (replace_forward, "its forward was replaced on the instance .*; load without device_map"),
    "meta": (to_meta, "`weight` is on the meta device, so nothing can be proven; load the weights first"),
    "int8": (quantise, r"`weight` is quantised to torch\.int8; leave the router out of quantisation"),
    "packed": (subclass_of_tensor, "`weight` is a .*; swap before sharding or quantising"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_obstacles_are_refused(obstacle: str) -> None:
    """Though only the second of three layers has one, no layer is swapped; without it the others can be."""
    make, message = OBSTACLES[obstacle]
    model = tiny("qwen")
    make(model)
    counts, kinds = hooks(model), {name: type(gate) for name, gate in gates(model).items()}
    with pytest.raises(UnsupportedError, match=rf"router of layer '{GATE}' cannot be swapped: {message}"):
        swap(model, "topk")
    assert not routers(model) and hooks(model) == counts
    assert {name: type(gate) for name, gate in gates(model).items()} == kinds
    assert not any("moerouters" in attribute for attribute in vars(model))
    swap(model, "topk", layers=[0, 2])
    assert len(routers(model)) == 2


def test_kernels_that_replace_the_router_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt-oss")
    use_kernels(model)
    block = type(model.model.layers[0].mlp)
    monkeypatch.setattr(block, "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
    with pytest.raises(UnsupportedError, match=r"use_kernels=True replaces its forward.*load without it"):
        swap(model, "topk")
    assert not routers(model)
    model._use_kernels = False
    swap(model, "topk")
    assert len(routers(model)) == 3


def test_kernels_elsewhere_are_none_of_our_business() -> None:
    model = tiny("qwen")
    use_kernels(model)
    swap(model, "topk")
    assert len(routers(model)) == 3


def test_a_swapped_router_is_no_place_for_kernels() -> None:
    """`kernelize` asks a module for its condition before it replaces forward."""
    model = tiny("gpt-oss")
    swap(model, "topk")
    assert not any(type(each).kernel_condition(each) for each in routers(model).values())


@pytest.mark.parametrize("installed", ["4.57.1", "3.0.0"])
def test_transformers_4_is_refused(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen")
    monkeypatch.setattr("moerouters.swapping.guards.version", lambda name: installed)
    with pytest.raises(UnsupportedError, match=rf"transformers {installed} is too old for swapping routers"):
        swap(model, "topk")
    assert not routers(model)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("moerouters.swapping.guards.version", missing)
    with pytest.raises(UnsupportedError, match=r"pip install 'moerouters\[hf\]'"):
        swap(nn.Linear(2, 2), "topk")


def test_hash_routed_layers_are_skipped() -> None:
    """DeepSeek-V4 looks experts up in its first layers; the others are swapped."""
    hashed = RouterClass("DeepseekV4HashRouter", "deepseek_v4")
    model, stock = tiny_model(hashed), tiny_model(hashed)
    record = swap(model, "topk")
    skipped = [layer for layer in record.layers if layer.status == "skipped"]
    assert skipped and {layer.stock_class for layer in skipped} == {hashed.name}
    assert all(layer.router is None and "fixed table" in (layer.reason or "") for layer in skipped)
    assert "fixed table" in str(record)
    kind = hashed.load()
    assert {type(module) for module in model.modules() if isinstance(module, kind)} == {kind}
    assert [layer.name for layer in record.swapped] == list(routers(model)) != []
    inputs = tiny_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


def test_a_model_of_skipped_layers_only_is_refused() -> None:
    hashed = RouterClass("DeepseekV4HashRouter", "deepseek_v4")
    model = tiny_model(hashed)
    names = [name for name, module in model.named_modules() if isinstance(module, hashed.load())]
    with pytest.raises(UnsupportedError, match=r"no router of DeepseekV4ForCausalLM can be swapped(.|\n)*fixed table"):
        swap(model, "topk", layers=names)
    assert not routers(model)


def test_a_model_without_experts_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="no router of Sequential can be swapped"):
        swap(model, "topk")
    assert not any(map(any, hooks(model).values()))


@pytest.mark.parametrize(
    ("router", "config", "layers"),
    [
        ("loss-free", {"rate": -1.0}, None),
        ("loss-free", {"speed": 1.0}, None),
        ("no-such-router", {}, None),
        ("loss-free", {"rule": "multiplicative"}, [2]),
    ],
)
def test_a_plugin_that_refuses_does_so_before_anything_has_changed(router: str, config: Any, layers: Any) -> None:
    """Names, configs, and gatings that a plug-in cannot serve, here scores that may be negative."""
    model = tiny("deepseek")
    counts = hooks(model)
    with pytest.raises(MoeroutersError):
        swap(model, router, config=config, layers=layers)
    assert not routers(model) and hooks(model) == counts


def test_a_failed_swap_leaves_the_routers_of_an_earlier_one() -> None:
    model = tiny("qwen")
    swap(model, "bip")
    before, counts = logits(model, batch()), hooks(model)
    with pytest.raises(ConfigError):
        swap(model, "loss-free", config={"rate": -1.0})
    assert {each.router_name for each in routers(model).values()} == {"bip"} and hooks(model) == counts
    assert torch.equal(logits(model, batch()), before)
