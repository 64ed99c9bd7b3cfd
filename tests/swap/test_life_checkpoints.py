"""Checkpoints of a swapped model are those of the stock model; what routers have learned travels beside them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moerouters import attach, load_router_state, save_router_state, swap, unswap
from moerouters.errors import TraceError

from .life import LOUD, batch, expect_same_bits, logits, prepared, routers, same_bits, sgd, tensors, tiny, train

EVAL = batch(77, padding="right")
CORRECTED = ["deepseek", "minimax"]


def trained(name: str, router: str, steps: int = 3) -> PreTrainedModel:
    model = tiny(name, train=True)
    swap(model, router, config=LOUD[router])
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    train(model, optimizer, [batch(seed) for seed in range(steps)], handle=handle)
    handle.remove()
    return prepared(model, train=False)


def at_tokens(model: nn.Module) -> Tensor:
    """Logits of EVAL where it holds no padding, which is routed without a router's bias."""
    return logits(model, EVAL)[EVAL["attention_mask"].bool()]


def loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The stock model of a checkpoint, in which nothing was missing and nothing too much."""
    kind: Any = type(model)
    found, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(found, PreTrainedModel) and not routers(found)
    return found


def corrections(model: nn.Module) -> dict[str, Tensor]:
    """The stock tensors that hold a correction bias."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}


def learned(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, each in routers(model).items()
        for key, value in each.router.state_dict().items()
    }


@pytest.mark.parametrize(("name", "router"), [("qwen", "loss-free"), ("deepseek", "bip"), ("minimax", "loss-free")])
def test_a_checkpoint_has_the_keys_of_the_stock_model(name: str, router: str, tmp_path: Path) -> None:
    model, stock = trained(name, router), tiny(name)
    assert list(model.state_dict()) == list(stock.state_dict())
    model.save_pretrained(tmp_path / "swapped")
    stock.save_pretrained(tmp_path / "stock")
    files = [load_file(tmp_path / kind / "model.safetensors") for kind in ("swapped", "stock")]
    assert files[0].keys() == files[1].keys()
    assert {key: value.shape for key, value in files[0].items()} == {k: value.shape for k, value in files[1].items()}
    expect_same_bits(tensors(loaded(model, tmp_path / "swapped")), tensors(model))


@pytest.mark.parametrize("router", ["loss-free", "bip"])
@pytest.mark.parametrize("name", CORRECTED)
def test_the_stock_model_of_a_checkpoint_chooses_as_the_swapped_one(name: str, router: str, tmp_path: Path) -> None:
    """What was learned is in the model's own correction bias, so any engine serves the balanced model."""
    model = trained(name, router)
    assert not same_bits(corrections(model), corrections(tiny(name)))
    model.save_pretrained(tmp_path)
    stock = loaded(model, tmp_path)
    torch.testing.assert_close(at_tokens(stock), at_tokens(model), rtol=0, atol=1e-6)
    # Without the bias it would choose otherwise.
    for buffer_name in corrections(stock):
        stock.get_buffer(buffer_name).copy_(tiny(name).get_buffer(buffer_name))
    assert (at_tokens(stock) - at_tokens(model)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "router"), [("deepseek", "loss-free"), ("minimax", "bip"), ("qwen", "loss-free")])
def test_training_goes_on_where_it_was_saved(name: str, router: str, tmp_path: Path) -> None:
    model = trained(name, router)
    model.save_pretrained(tmp_path)
    save_router_state(model, tmp_path / "router_state.safetensors")
    other = loaded(model, tmp_path)
    swap(other, router, config=LOUD[router])
    load_router_state(other, tmp_path / "router_state.safetensors")
    assert torch.equal(logits(other, EVAL), logits(model, EVAL))
    expect_same_bits(learned(other), learned(model))
    expect_same_bits(tensors(other), tensors(model))
    for each in (model.train(), other.train()):
        optimizer = sgd(each)
        train(each, optimizer, [batch(seed) for seed in range(3, 6)], handle=attach(optimizer, each))
    expect_same_bits(learned(other), learned(model))
    expect_same_bits(tensors(other), tensors(model))


@pytest.mark.parametrize("name", CORRECTED)
def test_what_was_learned_can_be_loaded_before_the_weights(name: str, tmp_path: Path) -> None:
    model = trained(name, "loss-free")
    save_router_state(model, tmp_path / "state")
    other = tiny(name)
    swap(other, "loss-free", config=LOUD["loss-free"])
    load_router_state(other, tmp_path / "state")
    expect_same_bits(corrections(other), corrections(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, EVAL), logits(model, EVAL))
    expect_same_bits(learned(other), learned(model))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", CORRECTED)
def test_a_swapped_model_takes_another_checkpoint(name: str, assign: bool) -> None:
    """Its correction bias too: with nothing learned yet, choices are those of the other stock model."""
    stock, model = tiny(name, seed=5), tiny(name)
    swap(model, "loss-free")
    result = model.load_state_dict(stock.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(model, EVAL), logits(stock, EVAL))
    expect_same_bits(corrections(model), corrections(stock))


@pytest.mark.parametrize("name", CORRECTED)
def test_a_checkpoint_of_its_own_brings_back_its_choices(name: str) -> None:
    """The model's own part of the bias is what is left when the router's is subtracted."""
    model = trained(name, "loss-free")
    before, saved = logits(model, EVAL), tensors(model)
    for each in model.parameters():
        each.data.add_(1)
    model.load_state_dict(saved)
    assert torch.equal(logits(model, EVAL), before)


def test_strict_loading_still_names_what_is_missing() -> None:
    model = tiny("deepseek")
    swap(model, "loss-free")
    saved = tensors(model)
    del saved["model.layers.1.mlp.gate.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*layers\.1\.mlp\.gate\.weight"):
        model.load_state_dict(saved)
    result = model.load_state_dict(saved | {"router.expert_bias_E": torch.zeros(8)}, strict=False)
    assert result.missing_keys == ["model.layers.1.mlp.gate.weight"]
    assert result.unexpected_keys == ["router.expert_bias_E"]


def test_loading_leaves_the_dictionary_of_the_caller() -> None:
    model = tiny("deepseek")
    saved = tensors(model)
    names = list(saved)
    swap(model, "loss-free")
    model.load_state_dict(saved)
    assert list(saved) == names


@pytest.mark.parametrize("prefix", [{}, {"prefix": "policy."}])
def test_state_dicts_inside_other_models(prefix: dict[str, Any]) -> None:
    """What collects the weights of a part by a prefix finds no router keys either."""
    model, stock = tiny("qwen"), tiny("qwen")
    swap(model, "loss-free")
    assert list(model.model.state_dict(**prefix)) == list(stock.model.state_dict(**prefix))
    outer = nn.ModuleDict({"policy": model, "other": nn.Linear(2, 2)})
    assert not any("router" in name for name in outer.state_dict())
    assert not outer.load_state_dict(outer.state_dict()).missing_keys


@pytest.mark.parametrize("name", CORRECTED)
def test_a_router_that_is_taken_out_leaves_its_bias(name: str) -> None:
    """Unswapped or swapped for another, the model keeps choosing as it has learned."""
    model = trained(name, "loss-free")
    before = at_tokens(model)
    swap(model, "topk")
    torch.testing.assert_close(at_tokens(model), before, rtol=0, atol=1e-6)
    unswap(model)
    torch.testing.assert_close(at_tokens(model), before, rtol=0, atol=1e-6)


def test_state_of_other_routers_is_refused(tmp_path: Path) -> None:
    model = trained("qwen", "loss-free", steps=1)
    save_router_state(model, tmp_path / "state")
    swap(model, "bip")
    with pytest.raises(TraceError, match="does not fit"):
        load_router_state(model, tmp_path / "state")
    unswap(model)
    with pytest.raises(TraceError, match="does not fit"):
        load_router_state(model, tmp_path / "state")
