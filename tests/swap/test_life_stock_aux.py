"""The aux loss that a stock model adds by itself: it counts nothing for swapped layers, in value and in gradient."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from moerouters import swap

from .life import batch, expect_same_bits, gradients, tiny

COEFFICIENT = 0.5


def with_aux(name: str = "qwen") -> PreTrainedModel:
    model: Any = tiny(name, train=True)
    model.router_aux_loss_coef = model.config.router_aux_loss_coef = COEFFICIENT
    assert isinstance(model, PreTrainedModel)
    return model


def outputs(model: PreTrainedModel, *, aux: bool = True) -> Any:
    """Of a padded batch with labels; gradients are those of its loss."""
    model.zero_grad()
    found = model(**batch(padding="right"), output_router_logits=aux)
    found.loss.backward()
    return found


@pytest.mark.parametrize("name", ["qwen", "mixtral"])
def test_with_all_layers_swapped_the_loss_is_that_without_aux(name: str) -> None:
    model = with_aux(name)
    plain = outputs(model, aux=False)
    without = gradients(model)
    assert outputs(model).loss != plain.loss
    swap(model, "topk")
    found = outputs(model)
    assert torch.equal(found.loss, plain.loss)
    expect_same_bits(gradients(model), without)
    assert found.aux_loss.item() == 0
    assert len(found.router_logits) == 3
    assert model.router_aux_loss_coef == model.config.router_aux_loss_coef == COEFFICIENT


def test_a_forward_that_fails_leaves_the_coefficient() -> None:
    model = with_aux()
    swap(model, "topk")
    with pytest.raises(RuntimeError):
        model(**batch() | {"attention_mask": torch.ones(2, 5)}, output_router_logits=True)
    assert model.router_aux_loss_coef == model.config.router_aux_loss_coef == COEFFICIENT
    plain = outputs(model, aux=False)
    assert torch.equal(outputs(model).loss, plain.loss)


def test_a_forward_that_fails_leaves_the_logits_of_the_next() -> None:
    """With some layers swapped it is the logits that are held back."""
    model = with_aux()
    swap(model, "topk", layers=[0])
    expected = outputs(model)
    with pytest.raises(ValueError, match="batch_size"):
        model(**batch() | {"labels": torch.zeros(3, 5, dtype=torch.int64)}, output_router_logits=True)
    found = outputs(model)
    assert torch.equal(found.loss, expected.loss) and len(found.router_logits) == 3


def test_with_some_layers_swapped_the_others_are_pooled() -> None:
    model = with_aux()
    stock = outputs(model)
    swap(model, "topk", layers=[0])
    plain = outputs(model, aux=False).loss
    found = outputs(model)
    mask = batch(padding="right")["attention_mask"]
    pooled: Any = load_balancing_loss_func(found.router_logits[1:], 8, 2, mask)
    assert torch.equal(found.aux_loss, pooled) and not torch.equal(found.aux_loss, stock.aux_loss)
    torch.testing.assert_close(found.loss, plain + COEFFICIENT * pooled)
    assert all(torch.equal(*pair) for pair in zip(found.router_logits, stock.router_logits, strict=True))
    assert len(found.router_logits) == 3


def test_with_some_layers_swapped_no_gradient_comes_from_their_logits() -> None:
    model = with_aux()
    swap(model, "topk", layers=[2])  # nothing comes after it that the pooled loss could see
    outputs(model, aux=False)
    without = model.model.layers[2].mlp.gate.weight.grad.clone()
    outputs(model)
    assert torch.equal(model.model.layers[2].mlp.gate.weight.grad, without)


@pytest.mark.parametrize("layers", [None, [0]])
def test_outputs_in_a_tuple_hold_the_same(layers: list[int] | None) -> None:
    """But the aux loss, which nothing names there, is the one that was computed, and not added."""
    model = with_aux()
    swap(model, "topk", layers=layers)
    expected = outputs(model)
    loss, aux_loss, *_, logits = model(**batch(padding="right"), output_router_logits=True, return_dict=False)
    assert torch.equal(loss, expected.loss) and aux_loss.item() > 0
    assert all(torch.equal(*pair) for pair in zip(logits, expected.router_logits, strict=True))


def test_the_stock_loss_can_be_kept() -> None:
    model = with_aux()
    stock = outputs(model)
    with_stock = gradients(model)
    swap(model, "topk", keep_stock_aux=True)
    found = outputs(model)
    assert torch.equal(found.loss, stock.loss) and torch.equal(found.aux_loss, stock.aux_loss)
    expect_same_bits(gradients(model), with_stock)


def test_another_swap_decides_anew() -> None:
    model = with_aux()
    stock = outputs(model)
    swap(model, "topk", keep_stock_aux=True)
    swap(model, "topk")
    assert outputs(model).aux_loss.item() == 0
    swap(model, "topk", keep_stock_aux=True)
    assert torch.equal(outputs(model).loss, stock.loss)
