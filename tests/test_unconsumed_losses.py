"""A router whose loss reaches nobody would silently never balance: it is an error at the step."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moerouters import attach
from moerouters.errors import UnconsumedLoss
from support.stack import Stack, backward, batch, sgd


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "nonreentrant"])
def test_a_loss_that_nobody_adds_is_an_error(checkpointing: str) -> None:
    model = Stack(checkpointing=checkpointing)
    optimizer = sgd(model)
    attach(optimizer, model)
    for _ in range(3):
        model(batch())[0].square().mean().backward()
    with pytest.raises(
        UnconsumedLoss, match=r"layer 'layers\.0' computed its aux loss 3 times in this step, but it was"
    ):
        optimizer.step()
    assert model.biases() == [[0.0] * 4] * 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_loss_that_nobody_adds_is_an_error_when_compiled(where: str) -> None:
    torch._dynamo.reset()
    model = Stack(num_layers=1)
    optimizer = sgd(model)
    attach(optimizer, model)
    if where == "outside":
        hidden = torch.compile(model, backend="aot_eager")(batch())[0]
    else:
        compiled = torch.compile(model.one, backend="aot_eager")
        hidden = checkpoint(compiled, model.layers[0], batch(), use_reentrant=True)[0]
    hidden.square().mean().backward()
    with pytest.raises(UnconsumedLoss, match="differentiated 0 times"):
        optimizer.step()


def test_one_forgotten_micro_batch_is_noticed() -> None:
    model = Stack()
    optimizer = sgd(model)
    attach(optimizer, model)
    backward(model, batch(1))
    model(batch(2))[0].sum().backward()
    with pytest.raises(UnconsumedLoss, match="2 times in this step, but it was differentiated 1 times"):
        optimizer.step()


def test_a_run_may_go_on_after_the_error() -> None:
    model = Stack()
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    model(batch())[0].sum().backward()
    with pytest.raises(UnconsumedLoss):
        optimizer.step()
    backward(model, batch(3))
    optimizer.step()
    assert int(handle.loads["layers.1"].sum()) == 12


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "nonreentrant"])
def test_injected_losses_need_nobody(checkpointing: str) -> None:
    """And what the assignment shows of them is for the log: adding it changes no gradient."""
    gradients = []
    for added in (False, True):
        model = Stack(loss_mode="inject", checkpointing=checkpointing)
        optimizer = sgd(model)
        attach(optimizer, model)
        hidden, aux = model(batch())
        (hidden.square().mean() + (aux if added else 0)).backward()
        optimizer.step()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_an_injected_loss_without_a_backward_is_an_error() -> None:
    model = Stack(loss_mode="inject")
    optimizer = sgd(model)
    attach(optimizer, model)
    model(batch())
    with pytest.raises(UnconsumedLoss, match="loss_mode='inject'"):
        optimizer.step()


@pytest.mark.parametrize("loss_mode", ["collect", "inject"])
def test_a_frozen_gate_has_no_use_for_losses(loss_mode: str) -> None:
    model = Stack(loss_mode=loss_mode)
    for layer in model.layers:
        layer.gate.requires_grad_(False)
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    hidden, _ = model(batch())
    hidden.sum().backward()
    optimizer.step()
    assert handle.steps == 1
