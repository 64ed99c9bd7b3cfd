"""Copies and pickles of a swapped model are models of their own."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from moerouters import attach, swap, unswap

from .life import (
    LOUD,
    batch,
    expect_same_bits,
    gates,
    hooks,
    logits,
    routed_pairs,
    routers,
    same_bits,
    sgd,
    tensors,
    tiny,
    train,
)


def pickled(model: PreTrainedModel) -> PreTrainedModel:
    """As torch.save and torch.load do it."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    assert isinstance(found, PreTrainedModel)
    return found


each_way = pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
Copy = Callable[[PreTrainedModel], PreTrainedModel]


def trained(name: str = "qwen", router: str = "loss-free") -> PreTrainedModel:
    model = tiny(name, train=True)
    swap(model, router, config=LOUD[router])
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    train(model, optimizer, [batch(seed) for seed in range(2)], handle=handle)
    handle.remove()
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that can change by training, routers included."""
    return tensors(model) | {
        f"{name}.router.{key}": value.clone()
        for name, each in routers(model).items()
        for key, value in each.router.state_dict().items()
    }


@each_way
@pytest.mark.parametrize(("name", "router"), [("qwen", "loss-free"), ("deepseek", "loss-free"), ("minimax", "bip")])
def test_training_a_copy_leaves_the_original(copied: Copy, name: str, router: str) -> None:
    original = trained(name, router)
    before = state(original)
    other = copied(original)
    expect_same_bits(state(other), before)
    assert torch.equal(logits(other.train(False), batch()), logits(original.train(False), batch()))
    other.train()
    optimizer = sgd(other)
    handle = attach(optimizer, other)
    train(other, optimizer, [batch(seed) for seed in range(2, 4)], handle=handle)
    expect_same_bits(state(original), before)
    learned = [key for key in before if ".router." in key and "correction" not in key]
    assert learned and all(not torch.equal(state(other)[key], before[key]) for key in learned)


@each_way
def test_a_copy_goes_on_like_the_original(copied: Copy) -> None:
    """Same bits from the same batches: nothing of the routers stayed behind."""
    original = trained("deepseek")
    other = copied(original)
    for model in (original, other):
        optimizer = sgd(model)
        train(model, optimizer, [batch(seed) for seed in range(2, 4)], handle=attach(optimizer, model))
    expect_same_bits(state(other), state(original))
    assert not same_bits(state(other), state(trained("deepseek")))


@each_way
def test_hooks_of_a_copy_serve_the_copy(copied: Copy) -> None:
    original = trained()
    other = copied(original)
    assert hooks(other) == hooks(original)
    assert all(each.batch is None for each in routers(other).values())  # the tokens of the latest forward stay behind
    inputs = batch(padding="right")
    optimizer = sgd(other)
    handle = attach(optimizer, other)
    train(other, optimizer, [inputs])
    assert {int(load_E.sum()) for load_E in handle.loads.values()} == {routed_pairs(inputs)}
    # The original saw nothing of it, and its own hooks still work.
    assert all(int(each.running.sums["tokens"]) == 0 for each in routers(original).values())
    del inputs["attention_mask"]
    original(**inputs)
    counted = {int(each.running.sums["load_E"].sum()) for each in routers(original).values()}
    assert counted == {2 * inputs["input_ids"].numel()}


@each_way
def test_the_stock_aux_loss_of_a_copy_counts_nothing(copied: Copy) -> None:
    original = trained()
    other = copied(original)
    model: Any
    for model in (other, original):
        model.router_aux_loss_coef = 0.5
        plain = model(**batch()).loss
        found = model(**batch(), output_router_logits=True)
        assert torch.equal(found.loss, plain) and found.aux_loss.item() == 0
        assert model.router_aux_loss_coef == 0.5


@each_way
def test_a_copy_can_be_unswapped_alone(copied: Copy) -> None:
    original = trained()
    other = copied(original)
    unswap(other)
    assert not routers(other) and len(routers(original)) == 3
    assert {type(gate) for gate in gates(other).values()} == {type(gate) for gate in gates(tiny("qwen")).values()}
    assert all(not any(counts) for counts in hooks(other).values())
    swap(other, "bip")
    assert {each.router_name for each in routers(other).values()} == {"bip"}
    assert {each.router_name for each in routers(original).values()} == {"loss-free"}


def test_one_router_alone_can_be_copied() -> None:
    original: Any = next(iter(routers(trained()).values()))
    other = copy.deepcopy(original)
    assert type(other) is type(original) and other.router is not original.router
    hidden_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    for one, two in zip(original.train(False)(hidden_TD), other.train(False)(hidden_TD), strict=True):
        assert torch.equal(one, two)
    original.weight.data.zero_()
    assert other(hidden_TD)[0].any()
