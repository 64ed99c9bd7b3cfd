"""Aux losses of routers join the gradient exactly once per layer, without anybody adding them."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moerouters import attach, swap
from moerouters.errors import ConfigError, UnconsumedLoss

from .life import (
    CHECKPOINTING,
    batch,
    expect_close,
    expect_same_bits,
    gates,
    gradients,
    routed_pairs,
    sgd,
    tiny,
    train,
)

EXPERTS = 8
ALPHA = 0.3


def balance_loss(logits_TE: Tensor, ids_TK: Tensor, valid_T: Tensor, score: str) -> Tensor:
    """sum_i f_i P_i of some tokens of one layer, in float64."""
    logits_TE = logits_TE[valid_T].double()
    scores_TE = logits_TE.softmax(dim=-1) if score == "softmax" else logits_TE.sigmoid()
    share_E = ids_TK[valid_T].flatten().bincount(minlength=EXPERTS).double()
    return EXPERTS * (share_E / share_E.sum() * (scores_TE / scores_TE.sum(-1, keepdim=True)).mean(0)).sum()


def by_hand(
    name: str, batches: list[dict[str, Tensor]], config: Mapping[str, float], scale: float
) -> dict[str, Tensor]:
    """Gradients of scale * (loss + aux losses of all layers) on the stock model, summed over batches."""
    model = tiny(name, train=True)
    score = "softmax" if name == "mixtral" else "sigmoid"
    seen: list[tuple[Tensor, Tensor]] = []

    def see(gate: nn.Module, args: Any, results: tuple[Tensor, ...]) -> None:
        seen.append((results[0], results[2]))

    for gate in gates(model, name).values():
        gate.register_forward_hook(see)
    for inputs in batches:
        seen.clear()
        total = model(**inputs).loss.double()
        mask_BS = inputs["attention_mask"].bool()
        for logits_TE, ids_TK in seen:
            total = total + config.get("alpha", 0) * balance_loss(logits_TE, ids_TK, mask_BS.flatten(), score)
            for row in range(len(mask_BS)):
                own_BS = torch.zeros_like(mask_BS)
                own_BS[row] = mask_BS[row]
                loss = balance_loss(logits_TE, ids_TK, own_BS.flatten(), score)
                total = total + config.get("sequence_alpha", 0) * loss / len(mask_BS)
        (scale * total).backward()
    return gate_gradients(model, name)


def gate_gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    found = gradients(model)
    return {f"{gate}.weight": found[f"{gate}.weight"] for gate in gates(model, name)}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_gates_get_the_gradient_of_all_losses(name: str, checkpointing: str) -> None:
    """Also where the model has an aux loss of its own, which counts nothing."""
    config = {"alpha": ALPHA}
    model = tiny(name, train=True, checkpointing=checkpointing)
    swap(model, "loss-controlled", config=config)
    attach(sgd(model), model)
    inputs = batch(padding="right")
    model(**inputs, **({"output_router_logits": True} if name == "mixtral" else {})).loss.backward()
    found = gate_gradients(model, name)
    expect_close(found, by_hand(name, [inputs], config, 1.0), 1e-5)
    # The tolerance is far below what a loss adds, so one that counted twice or never would show.
    without = by_hand(name, [inputs], {}, 1.0)
    assert all((found[gate] - without[gate]).abs().max() > 1e-2 * found[gate].abs().max() for gate in found)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_losses_of_sequences_know_their_sequences(padding: Any) -> None:
    config = {"alpha": 0.0, "sequence_alpha": ALPHA}
    model = tiny("mixtral", train=True)
    swap(model, "loss-controlled", config=config)
    inputs = batch(padding=padding, size=3)
    model(**inputs).loss.backward()
    expect_close(gate_gradients(model, "mixtral"), by_hand("mixtral", [inputs], config, 1.0), 1e-5)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_accumulated_batches_share_the_scale_of_the_training_loss(checkpointing: str) -> None:
    config = {"alpha": ALPHA}
    model = tiny("mixtral", train=True, checkpointing=checkpointing)
    swap(model, "loss-controlled", config=config)
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    batches = [batch(seed, padding="right" if seed % 2 else "") for seed in range(3)]
    handle.scale_losses(accumulation_steps=3)
    for inputs in batches:
        (model(**inputs).loss / 3).backward()
    expect_close(gate_gradients(model, "mixtral"), by_hand("mixtral", batches, config, 1 / 3), 1e-5)
    optimizer.step()
    assert {int(load_E.sum()) for load_E in handle.loads.values()} == {routed_pairs(*batches)}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_batch_that_is_recomputed_keeps_its_padding(checkpointing: str) -> None:
    """Two forwards before one backward: when the first is computed again, the second was the latest to pass by."""
    config = {"alpha": ALPHA}
    model = tiny("mixtral", train=True, checkpointing=checkpointing)
    swap(model, "loss-controlled", config=config)
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    batches = [batch(0, padding="left"), batch(1, padding="right", size=3), batch(2)]
    losses = [model(**inputs).loss for inputs in batches]
    torch.autograd.backward(losses)
    expect_close(gate_gradients(model, "mixtral"), by_hand("mixtral", batches, config, 1.0), 1e-5)
    optimizer.step()
    assert {int(load_E.sum()) for load_E in handle.loads.values()} == {routed_pairs(*batches)}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_no_loss_is_missed_in_training(checkpointing: str) -> None:
    """Several steps, with accumulation, evaluation in between, and a frozen gate."""
    model = tiny("qwen", train=True, checkpointing=checkpointing)
    swap(model, "loss-controlled", config={"alpha": ALPHA, "z_alpha": 0.01})
    model.model.layers[1].mlp.gate.weight.requires_grad_(False)
    optimizer = sgd(model)
    handle = attach(optimizer, model)

    def evaluate() -> None:
        model.train(False)
        model(**batch(9))
        model.train()

    train(
        model,
        optimizer,
        [batch(seed, padding="left") for seed in range(6)],
        handle=handle,
        accumulation_steps=2,
        after_step=evaluate,
    )
    assert handle.steps == 3


def test_a_pass_without_backward_is_an_error_in_training() -> None:
    """The check that the test above has to pass is in force."""
    model = tiny("qwen", train=True)
    swap(model, "loss-controlled", config={"alpha": ALPHA})
    optimizer = sgd(model)
    attach(optimizer, model)
    model(**batch(1))
    model(**batch(2)).loss.backward()
    with pytest.raises(UnconsumedLoss, match="computed its aux loss 2 times in this step, but it was differentiated 1"):
        optimizer.step()


def test_losses_cannot_be_collected() -> None:
    model = tiny("qwen")
    swap(model, "loss-controlled")
    with pytest.raises(ConfigError, match="cannot have loss_mode='collect'"):
        attach(sgd(model), model, loss_mode="collect")


def test_no_losses_in_eval_mode() -> None:
    model, stock = tiny("qwen"), tiny("qwen")
    swap(model, "loss-controlled", config={"alpha": ALPHA})
    for each in (model, stock):
        each(**batch()).loss.backward()
    expect_same_bits(gradients(model), gradients(stock))
