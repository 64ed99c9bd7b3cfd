"""What a swapped model gives to those who use it: generated tokens, recorded logits, and peace to its neighbours."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moerouters import swap

from .life import LOUD, batch, expect_same_bits, gates, logits, routers, tensors, tiny


def generated(model: Any, *, cache: bool = True) -> Tensor:
    """Twelve greedy tokens after a batch of two, the second of which is padded on the left."""
    inputs = batch(padding="left")
    del inputs["labels"]
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=cache, eos_token_id=None)
    assert isinstance(found, Tensor) and found.shape == (2, 24)
    return found


def recorded(model: PreTrainedModel) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = model(**batch(padding="right"), output_router_logits=True).router_logits
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("name", ["qwen", "deepseek", "gpt-oss"])
def test_topk_generates_the_tokens_of_the_stock_model(name: str) -> None:
    stock, swapped = tiny(name), tiny(name)
    swap(swapped, "topk")
    assert torch.equal(generated(swapped), generated(stock))


@pytest.mark.parametrize("router", ["loss-free", "bip", "loss-controlled"])
def test_every_router_generates_the_same_with_and_without_a_cache(router: str) -> None:
    """One token at a time or all at once: in eval mode what a token gets depends on no other token."""
    model = tiny("qwen")
    swap(model, router, config=LOUD[router])
    for each in routers(model).values():
        for name in each.router.state_names():
            each.router.get_buffer(name).copy_(torch.linspace(-0.3, 0.3, 8))
    stock = generated(tiny("qwen"))
    tokens = generated(model)
    assert torch.equal(tokens, generated(model, cache=False))
    # What a balancer has learned matters; a router without state chooses as before.
    assert torch.equal(tokens, stock) == (router == "loss-controlled")


@pytest.mark.parametrize("name", ["qwen", "deepseek", "gpt-oss", "minimax"])
@pytest.mark.parametrize("recorded_before", [False, True])
def test_router_logits_are_recorded_as_before(name: str, recorded_before: bool) -> None:
    """Raw logits, of every layer, also if the model had its recorders' hooks before the swap."""
    stock, swapped = tiny(name), tiny(name)
    if recorded_before:
        recorded(swapped)
    swap(swapped, "loss-free", config=LOUD["loss-free"])
    # Another choice in the first layer would change what the second one is given.
    expected, found = recorded(stock), recorded(swapped)
    assert len(found) == len(expected) == len(routers(swapped)) >= 2
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    # Also when nothing is asked for, and when it is asked for once more.
    assert torch.equal(logits(swapped, batch()), logits(stock, batch()))
    assert len(recorded(swapped)) == len(expected)


def test_recorded_logits_are_raw() -> None:
    """Without the bias that the router adds to choose."""
    stock, swapped = tiny("qwen"), tiny("qwen")
    swap(swapped, "loss-free")
    for each in routers(swapped).values():
        each.router.get_buffer("expert_bias_E").copy_(torch.linspace(-1, 1, 8))
    assert torch.equal(recorded(swapped)[0], recorded(stock)[0])
    assert not torch.equal(recorded(swapped)[1], recorded(stock)[1])


def test_a_stock_model_beside_it_notices_nothing() -> None:
    beside, swapped = tiny("qwen"), tiny("qwen")
    before, kinds = logits(beside, batch()), {name: type(gate) for name, gate in gates(beside).items()}
    recorders = dict(type(beside)._can_record_outputs or {})
    tables = dict(vars(next(iter(kinds.values()))))
    swap(swapped, "bip")
    swapped.train()(**batch()).loss.backward()
    assert {name: type(gate) for name, gate in gates(beside).items()} == kinds
    assert dict(vars(next(iter(kinds.values())))) == tables
    assert type(beside)._can_record_outputs == recorders == type(swapped)._can_record_outputs
    assert type(beside) is type(swapped)
    assert torch.equal(logits(beside, batch()), before)
    assert len(recorded(beside)) == 3
    expect_same_bits(tensors(beside), tensors(tiny("qwen")))
    # And one that is built afterwards is stock.
    assert not routers(tiny("qwen"))


def test_a_swapped_router_is_still_one_of_its_class() -> None:
    model = tiny("qwen")
    stock = dict(gates(model))
    swap(model, "loss-free")
    assert gates(model) == stock == routers(model)
