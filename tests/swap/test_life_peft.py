"""PEFT around a swapped model, and swapping inside a PEFT model; a router that PEFT has wrapped is refused."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from moerouters import attach, swap, unswap
from moerouters.errors import UnsupportedError

from .life import LOUD, batch, expect_same_bits, hooks, logits, routed_pairs, routers, sgd, tiny, train

pytestmark = [
    # peft 0.21 asks transformers 5.23 by names that are deprecated there.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),
]

TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}
each_target = pytest.mark.parametrize("target", TARGETS)


def adapted(target: str, router: str, *, swap_first: bool, name: str = "qwen") -> PeftModel:
    """Adapters start as the identity would not: `init_lora_weights` is off, so that they matter at once."""
    model = tiny(name, train=True)
    if swap_first:
        swap(model, router, config=LOUD[router])
    torch.manual_seed(0)
    found = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **TARGETS[target]))
    assert isinstance(found, PeftModel)
    if not swap_first:
        swap(found, router, config=LOUD[router])
    return found


@each_target
@pytest.mark.parametrize("swap_first", [True, False], ids=["swap-first", "peft-first"])
@pytest.mark.parametrize("router", ["loss-controlled", "bip"])
def test_adapters_train_beside_any_router(router: str, swap_first: bool, target: str) -> None:
    model = adapted(target, router, swap_first=swap_first)
    assert len(routers(model)) == 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = attach(optimizer, model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batches = [batch(seed, padding="right") for seed in range(3)]
    train(model, optimizer, batches, handle=handle)
    assert {int(load_E.sum()) for load_E in handle.loads.values()} == {routed_pairs(batches[-1])}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and all("lora_" in name for name in changed)
    for each in routers(model).values():
        assert all(each.router.get_buffer(name).any() for name in each.router.state_names())


@each_target
@pytest.mark.parametrize("swap_first", [True, False], ids=["swap-first", "peft-first"])
def test_topk_gives_the_bits_of_the_adapted_stock_model(swap_first: bool, target: str) -> None:
    found = []
    for router in (None, "topk"):
        if router is None:
            torch.manual_seed(0)
            model: nn.Module = get_peft_model(
                tiny("qwen", train=True), LoraConfig(r=2, init_lora_weights=False, **TARGETS[target])
            )
        else:
            model = adapted(target, router, swap_first=swap_first)
        model(**batch(padding="left")).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    stock, swapped = found
    assert stock
    expect_same_bits(swapped, stock)


@each_target
@pytest.mark.parametrize("swap_first", [True, False], ids=["swap-first", "peft-first"])
def test_adapters_can_be_merged(swap_first: bool, target: str) -> None:
    """The model that is left still has its routers, what they learned, and their hooks."""
    model = adapted(target, "loss-free", swap_first=swap_first)
    adapters = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train(model, adapters, [batch(0), batch(1)], handle=(handle := attach(adapters, model)))
    handle.remove()
    before = logits(model.eval(), batch())
    merged = model.merge_and_unload()
    assert not any("lora_" in name for name, _ in merged.named_modules()) and len(routers(merged)) == 3
    torch.testing.assert_close(logits(merged, batch()), before, rtol=1e-4, atol=1e-4)
    inputs = batch(padding="right")
    optimizer = sgd(merged.train().requires_grad_())
    handle = attach(optimizer, merged)
    train(merged, optimizer, [inputs])
    assert {int(load_E.sum()) for load_E in handle.loads.values()} == {routed_pairs(inputs)}


def test_unswap_leaves_the_adapters() -> None:
    model = adapted("attention", "loss-free", swap_first=True)
    stock = get_peft_model(tiny("qwen", train=True), LoraConfig(r=2, **TARGETS["attention"]))
    unswap(model.get_base_model())
    assert not routers(model) and hooks(model) == hooks(stock)


def test_saved_adapters_hold_nothing_of_the_routers(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    model = adapted("attention", "loss-free", swap_first=True)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
    ],
    ids=["parameter", "module"],
)
def test_a_router_that_peft_has_wrapped_is_refused(settings: dict[str, Any]) -> None:
    model = get_peft_model(tiny("qwen"), LoraConfig(r=2, **settings))
    counts = hooks(model)
    with pytest.raises(UnsupportedError, match=r"wrapped by PEFT; leave the router out of target_modules"):
        swap(model, "loss-free")
    assert not routers(model) and hooks(model) == counts


def test_a_router_can_be_wrapped_after_it_was_swapped() -> None:
    """As the refusal advises: LoRA on the gate of a swapped router trains it, and `topk` is still the stock one."""
    settings: dict[str, Any] = {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}
    found = []
    for router in (None, "topk"):
        model = tiny("qwen", train=True)
        if router is not None:
            swap(model, router)
        torch.manual_seed(0)
        wrapped = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings))
        wrapped(**batch()).loss.backward()
        found.append({name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None})
    stock, swapped = found
    assert len(stock) == 6 and all(grad.any() for grad in stock.values())
    expect_same_bits(swapped, stock)


def gate_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if "gate." in name and p.grad is not None}


def test_a_gate_that_peft_has_frozen_needs_no_loss() -> None:
    """`attach` looks for losses that nobody differentiated: those of a frozen gate are none."""
    model = adapted("attention", "loss-controlled", swap_first=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = attach(optimizer, model)
    train(model, optimizer, [batch(0)], handle=handle)
    assert not gate_gradients(model) and handle.steps == 1
