"""Adapters for routers of an unusual form keep the bits of the model, train, count, and come and go with the swap."""

import copy
import pickle
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moerouters.swapping import swap, unswap
from moerouters.swapping.adapters import ADAPTERS, adapter_for
from moerouters.swapping.find import Found, find
from moerouters.swapping.module import SwappedRouter

from .survey_outputs import reaching
from .zoo import RouterClass, router_classes, tiny_inputs, tiny_model

CLASSES = {router.name: router for router in router_classes()}
ODD = [CLASSES[name] for name in ADAPTERS]
DTYPES = (torch.float32, torch.bfloat16)
each_odd = pytest.mark.parametrize("router", ODD, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def outputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Every tensor that the model returns."""
    with torch.no_grad():
        found = model(**inputs)
    values = [each for value in found.values() for each in (value if isinstance(value, tuple | list) else [value])]
    return [value for value in values if isinstance(value, Tensor)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def loads(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the adapters say of each router's results in one forward."""
    noted = {}
    routers = find(model)

    def note(each: Found, module: nn.Module, args: Any, returned: Any) -> None:
        noted[each.name] = adapter_for(module).load_E(each.stock, returned)

    hooks = [each.module.register_forward_hook(partial(note, each)) for each in routers]
    outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return noted


def named_routers(model: nn.Module) -> list[tuple[str, SwappedRouter]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SwappedRouter)]


def swapped_routers(model: nn.Module) -> list[SwappedRouter]:
    return [module for _, module in named_routers(model)]


@each_odd
@each_dtype
def test_bits_of_the_model(router: RouterClass, dtype: torch.dtype) -> None:
    model = tiny_model(router, dtype=dtype)
    batches = [tiny_inputs(model, padding=padding) for padding in (False, True)]
    stock = [outputs(model, inputs) for inputs in batches]
    assert len(swap(model, "topk").swapped) == len(swapped_routers(model)) > 0
    assert same(outputs(model, batches[0]), stock[0])
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(outputs(each, batches[1]), stock[1])
        unswap(each)
        assert not swapped_routers(each)
        assert same(outputs(each, batches[1]), stock[1])


@pytest.mark.parametrize("router", [each for each in ODD if each.name != "DbrxRouter"], ids=str)
def test_bits_under_autocast(router: RouterClass) -> None:
    """DbrxExperts add bfloat16 to float32 there, which raises in the stock model."""
    model = tiny_model(router)
    inputs = tiny_inputs(model, padding=True)
    with torch.autocast("cpu", torch.bfloat16):
        stock = outputs(model, inputs)
    swap(model, "topk")
    with torch.autocast("cpu", torch.bfloat16):
        assert same(outputs(model, inputs), stock)


@pytest.mark.parametrize("router", [each for each in ODD if each.name != "PhimoeTopKRouter"], ids=str)
def test_bits_of_training(router: RouterClass) -> None:
    """PhimoeTopKRouter is the one that samples; noise on hidden states is the stock router's."""
    model = tiny_model(router).train()
    for found in find(model):
        if hasattr(found.module, "moe_jitter_eps"):
            found.module.moe_jitter_eps = 0.1  # type: ignore[assignment]
    inputs = tiny_inputs(model, padding=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stock = outputs(model, inputs)
        swap(model, "topk")
        torch.manual_seed(0)
        assert same(outputs(model, inputs), stock)


@each_odd
@pytest.mark.parametrize("name", ["loss-free", "bip"])
def test_balancers_train_it(router: RouterClass, name: str) -> None:
    model = tiny_model(router).train()
    inputs = tiny_inputs(model, padding=True)
    if "decoder_input_ids" in inputs:
        inputs["decoder_attention_mask"] = inputs["attention_mask"]
    swap(model, name)
    model(**inputs)[0].float().square().mean().backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())
    for where, module in named_routers(model):
        grad = module.gating.tensors(module.gating.reading.projection.weight).grad
        assert grad is not None and grad.any()
        load_E = module.running.sums["load_E"]
        valid_BS = inputs["attention_mask"].bool() & reaching(where, inputs)
        assert load_E.sum() == valid_BS.sum() * module.gating.top_k
        assert name != "bip" or load_E.max() < 2 * load_E.float().mean()
    copy.deepcopy(model)  # no tensor of the graph stays behind


@each_odd
def test_loads_of_stock_and_swapped_routers(router: RouterClass) -> None:
    model = tiny_model(router)
    inputs = tiny_inputs(model)
    stock = loads(model, inputs)
    swap(model, "topk")
    found = loads(model, inputs)
    assert found.keys() == stock.keys() and all(torch.equal(found[name], stock[name]) for name in found)
    for (where, module), load_E in zip(named_routers(model), found.values(), strict=True):
        assert load_E.shape == (module.gating.num_experts,)
        assert load_E.sum() == reaching(where, inputs).sum() * module.gating.top_k


@pytest.mark.parametrize("name", ["DbrxRouter", "JetMoeTopKGating", "PhimoeTopKRouter"])
def test_the_stock_aux_loss_counts_nothing(name: str) -> None:
    model = tiny_model(CLASSES[name])
    inputs = tiny_inputs(model) | {"labels": tiny_inputs(model)["input_ids"]}
    plain = model(**inputs, output_router_logits=False).loss
    stock = model(**inputs, output_router_logits=True)
    assert stock.loss > plain
    swap(model, "topk")
    found = model(**inputs, output_router_logits=True)
    assert found.loss == plain and found.aux_loss == 0
    assert same(list(found.router_logits), list(stock.router_logits))
