"""Modes, dtypes, some layers only, one router after the other, and the way back."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moerouters import attach, swap, unswap
from moerouters.errors import ConfigError, UnsupportedError

from .life import (
    LOUD,
    batch,
    expect_same_bits,
    gates,
    gradients,
    hooks,
    in_dtype,
    logits,
    prepared,
    routers,
    sgd,
    tensors,
    tiny,
    train,
)


def chosen(model: nn.Module) -> dict[str, str]:
    """Router names by decoder layer."""
    return {name.split(".")[2]: each.router_name for name, each in routers(model).items()}


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: {*vars(module), *module._buffers, *module._modules} for name, module in model.named_modules()}


def test_routers_follow_the_mode_of_the_model() -> None:
    model = tiny("qwen", train=True)
    swap(model, "loss-free")
    assert all(each.router.training for each in routers(model).values())
    model.train(False)
    assert not any(each.training or each.router.training for each in routers(model).values())
    swap(model, "bip")
    assert not any(each.router.training for each in routers(model).values())
    model.train()
    assert all(each.router.training for each in routers(model).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen", "deepseek"])
def test_state_stays_float32(name: str, dtype: torch.dtype) -> None:
    """A step of 0.001 would vanish in 16 bits."""
    model = tiny(name, train=True)
    swap(model, "loss-free")
    optimizer = sgd(model)
    train(model, optimizer, [batch(0)], handle=attach(optimizer, model))
    before = {where: each.router.get_buffer("expert_bias_E").clone() for where, each in routers(model).items()}
    in_dtype(model, dtype)
    for where, each in routers(model).items():
        assert each.weight.dtype == dtype
        assert {buffer.dtype for name, buffer in each.router.named_buffers() if not name.endswith("_0")} == {
            torch.float32
        }
        assert torch.equal(each.router.get_buffer("expert_bias_E"), before[where])
    assert logits(model.train(False), batch()).dtype == dtype
    assert logits(model, batch()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen", "deepseek", "minimax", "gpt-oss"])
def test_topk_follows_a_cast_that_comes_later(name: str, dtype: torch.dtype) -> None:
    stock, swapped = tiny(name), tiny(name)
    swap(swapped, "topk")
    assert torch.equal(logits(in_dtype(swapped, dtype), batch()), logits(in_dtype(stock, dtype), batch()))


def test_layers_may_have_different_routers() -> None:
    model = tiny("qwen", train=True)
    stock = tiny("qwen")
    swap(model, "loss-free", layers=[0], config=LOUD["loss-free"])
    swap(model, "bip", layers=["*layers.2.mlp.gate"])
    assert chosen(model) == {"0": "loss-free", "2": "bip"}
    assert type(gates(model)["model.layers.1.mlp.gate"]) is type(gates(stock)["model.layers.1.mlp.gate"])
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    train(model, optimizer, [batch(0), batch(1)], handle=handle)
    assert list(handle.loads) == ["model.layers.0.mlp.gate", "model.layers.2.mlp.gate"]
    first, last = routers(model).values()
    assert first.router.get_buffer("expert_bias_E").any() and last.router.get_buffer("dual_E").any()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([1], "1"),
        ([0, 2], "02"),
        (["*.1.*", 2], "12"),
        (["model.layers.[01].mlp.gate"], "01"),
        (None, "012"),
        ((number for number in (2,)), "2"),
    ],
)
def test_layers_go_by_number_or_pattern(layers: Any, expected: str) -> None:
    model = tiny("qwen")
    record = swap(model, "topk", layers=layers)
    assert "".join(chosen(model)) == expected
    assert [layer.name.split(".")[2] for layer in record.swapped] == list(expected)


@pytest.mark.parametrize("layers", [[3], [0, -1], ["layers.0"], ["*.gate", "*.router"]])
def test_layers_that_do_not_exist_are_an_error(layers: Any) -> None:
    """The first of them is named, with what could have been chosen; nothing is swapped."""
    model = tiny("qwen")
    with pytest.raises(ConfigError, match=r"matches no router(.|\n)*model\.layers\.1\.mlp\.gate"):
        swap(model, "topk", layers=layers)
    assert not routers(model) and not any(map(any, hooks(model).values()))


def test_dense_layers_have_no_router_to_swap() -> None:
    with pytest.raises(ConfigError, match="layers=0 matches no router"):
        swap(tiny("deepseek"), "topk", layers=[0])


def test_no_layers_are_an_error() -> None:
    model = tiny("qwen")
    with pytest.raises((ConfigError, UnsupportedError)):
        swap(model, "topk", layers=[])


def test_a_swapped_layer_gets_the_new_router() -> None:
    model = tiny("qwen", train=True)
    swap(model, "loss-free", config=LOUD["loss-free"])
    counts = hooks(model)
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    train(model, optimizer, [batch(0)], handle=handle)
    handle.remove()
    record = swap(model, "loss-free", layers=[1])
    swap(model, "bip", layers=[2])
    assert [layer.stock_class for layer in record.swapped] == ["Qwen3MoeTopKRouter"]
    assert chosen(model) == {"0": "loss-free", "1": "loss-free", "2": "bip"}
    biases = [each.router.get_buffer("expert_bias_E") for each in list(routers(model).values())[:2]]
    assert biases[0].any() and not biases[1].any()
    assert hooks(model) == counts
    # Swapped three times over, `topk` is still the stock model.
    fresh = tiny("qwen")
    for router in ("topk", "bip", "topk"):
        swap(fresh, router)
    assert torch.equal(logits(fresh, batch()), logits(tiny("qwen"), batch()))


@pytest.mark.parametrize("name", ["qwen", "deepseek", "minimax", "gpt-oss"])
def test_unswap_leaves_no_trace(name: str) -> None:
    model = tiny(name)
    before, counts, names = tensors(model), hooks(model), attributes(model)
    kinds = {where: type(gate) for where, gate in gates(model, name).items()}
    forwards = {where: gate.forward.__func__ for where, gate in gates(model, name).items()}  # type: ignore[attr-defined]
    stock = logits(model, batch())
    swap(model, "loss-free")
    assert hooks(model) != counts
    logits(model, batch())
    unswap(model)
    assert {where: type(gate) for where, gate in gates(model, name).items()} == kinds
    assert all(gate.forward.__func__ is forwards[where] for where, gate in gates(model, name).items())  # type: ignore[attr-defined]
    assert hooks(model) == counts and attributes(model) == names
    assert not any("moerouters" in attribute for attribute in vars(model))
    expect_same_bits(tensors(model), before)
    assert torch.equal(logits(model, batch()), stock)
    unswap(model)
    assert hooks(model) == counts and attributes(model) == names


def test_a_model_trains_on_after_unswap() -> None:
    model, stock = tiny("qwen", train=True), tiny("qwen", train=True)
    swap(model, "loss-controlled", config={"alpha": 0.5})
    attach(sgd(model), model).remove()
    unswap(model)
    for each in (model, stock):
        each(**batch()).loss.backward()
    expect_same_bits(gradients(model), gradients(stock))


def test_autocast_gives_the_bits_of_the_stock_model() -> None:
    def trained(router: str | None) -> tuple[Tensor, dict[str, Tensor]]:
        model = prepared(tiny("qwen"))
        if router is not None:
            swap(model, router)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(padding="right")).loss
        loss.backward()
        return loss, gradients(model)

    (stock_loss, stock), (loss, swapped) = trained(None), trained("topk")
    assert torch.equal(loss, stock_loss)
    expect_same_bits(swapped, stock)
