"""Forward and backward: with `topk` the bits of the stock model, every token counted once, padding never."""

import pytest
import torch
from torch import Tensor

from moerouters import attach, swap

from .life import (
    CHECKPOINTING,
    LOUD,
    Padding,
    batch,
    expect_close,
    expect_same_bits,
    gradients,
    prepared,
    routed_pairs,
    routers,
    sgd,
    tiny,
    train,
)

each_checkpointing = pytest.mark.parametrize("checkpointing", CHECKPOINTING)


@pytest.mark.parametrize(
    ("name", "checkpointing", "padding"),
    [
        *(("qwen", checkpointing, padding) for checkpointing in CHECKPOINTING for padding in ("", "left")),
        ("deepseek", "none", "right"),
        ("gpt-oss", "reentrant", "right"),
        ("minimax", "non-reentrant", "right"),
        ("mixtral", "none", "left"),
        ("olmoe", "none", "right"),
    ],
)
def test_topk_gives_the_gradients_of_the_stock_model(name: str, checkpointing: str, padding: Padding) -> None:
    stock, swapped = (tiny(name, train=True, checkpointing=checkpointing) for _ in range(2))
    swap(swapped, "topk")
    inputs = batch(padding=padding)
    losses = [model(**inputs).loss for model in (stock, swapped)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert len(gradients(stock)) > 20
    expect_same_bits(gradients(swapped), gradients(stock))


@each_checkpointing
@pytest.mark.parametrize("name", ["qwen", "minimax"])
def test_tokens_count_once(name: str, checkpointing: str) -> None:
    model = tiny(name, train=True, checkpointing=checkpointing)
    swap(model, "loss-free", config=LOUD["loss-free"])
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    for padding in ("", "left", "right"):
        inputs = batch(padding=padding)
        train(model, optimizer, [inputs])
        assert {int(load_E.sum()) for load_E in handle.loads.values()} == {routed_pairs(inputs)}
        assert len(handle.loads) == 3


def test_evaluation_counts_nothing() -> None:
    model = tiny("qwen")
    swap(model, "loss-free")
    model(**batch())
    assert all(int(router.running.sums["passes"]) == 0 for router in routers(model).values())


def padded_with(token: int) -> dict[str, Tensor]:
    inputs = batch(padding="right")
    return inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, token)}


@each_checkpointing
@pytest.mark.parametrize("router", ["loss-free", "loss-controlled", "bip"])
def test_nothing_depends_on_what_padding_holds(router: str, checkpointing: str) -> None:
    """Neither loads nor the gradients of gates, through aux losses or through the model's own."""
    found = []
    for token in (0, 41):
        model = prepared(tiny("qwen"), checkpointing=checkpointing)
        swap(model, router, config=LOUD[router])
        handle = attach(sgd(model), model)
        model(**padded_with(token)).loss.backward()
        found.append(
            (
                {name: grad for name, grad in gradients(model).items() if "gate." in name},
                {name: each.running.sums["load_E"].clone() for name, each in routers(model).items()},
            )
        )
        handle.remove()
    (first_grads, first_loads), (second_grads, second_loads) = found
    expect_same_bits(second_loads, first_loads)
    assert len(first_grads) == 3
    expect_close(second_grads, first_grads, 1e-5)


def test_padding_reaches_experts_as_in_the_stock_model() -> None:
    """What the model computes for padding is nobody's business, yet it stays what it was."""
    stock, swapped = tiny("qwen", train=True), tiny("qwen", train=True)
    swap(swapped, "loss-free")
    inputs = batch(padding="right")
    assert torch.equal(stock(**inputs).logits, swapped(**inputs).logits)


def test_aux_losses_would_see_padding_without_a_mask() -> None:
    """The counterpart of the tests above: a batch without a mask routes all its tokens."""
    model = tiny("qwen", train=True)
    swap(model, "loss-free")
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    inputs = batch(padding="right")
    del inputs["attention_mask"]
    train(model, optimizer, [inputs])
    assert {int(load_E.sum()) for load_E in handle.loads.values()} == {2 * inputs["input_ids"].numel()}
