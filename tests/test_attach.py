"""attach: one update per optimizer step, or a clear error."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moerouters import Gating, MoELayer, RouteContext, Router, attach
from moerouters.errors import ConfigError, NonFiniteLogits, UnconsumedLoss
from support.balanced import RATE, balanced

WIDTH = 4


class Stack(nn.Module):
    """MoE layers in a row; returns the hidden states and the sum of the losses."""

    def __init__(self, num_layers: int = 2, loss_mode: str = "collect", checkpointing: str = "none") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            MoELayer(balanced(), hidden_size=WIDTH, expert_size=3, loss_mode=loss_mode) for _ in range(num_layers)
        )
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        aux = x.new_zeros(())
        for layer in self.layers:
            if self.checkpointing == "none":
                x, more = self.one(layer, x)
            else:
                x, more = checkpoint(self.one, layer, x, use_reentrant=self.checkpointing == "reentrant")
            aux = aux + more
        return x, aux

    @staticmethod
    def one(layer: MoELayer, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden, assignment = layer(x)
        return x + hidden, sum(assignment.losses.values(), x.new_zeros(()))

    def biases(self) -> list[list[float]]:
        return [layer.router.b_E.tolist() for layer in self.layers]


def batch(seed: int = 1, tokens: int = 6) -> Tensor:
    """Asks for a gradient: reentrant checkpointing cuts the graph of a block without any such input."""
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def backward(model: Stack, x: Tensor, scale: float = 1.0) -> None:
    hidden, aux = model(x)
    (scale * (hidden.square().mean() + aux)).backward()


# Losses that nobody consumes.


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


# Numbers that are not finite.


def test_broken_logits_name_the_first_layer_and_teach_nothing() -> None:
    model = Stack()
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    x = batch().detach()
    x[2, 1] = torch.nan
    x[4] = torch.inf
    model(x)
    with pytest.raises(NonFiniteLogits) as caught:
        optimizer.step()
    assert str(caught.value).splitlines() == [
        "the gate of layer 'layers.0' gave NaN or infinite logits for 2 tokens in this step.",
        "  from   Balanced",
        "  cause  experts cannot be chosen from them; the weights of these tokens are NaN",
        "  fix    look at the loss and the gradient norm of the steps before; lower the learning rate, clip gradients, "
        "or add a z-loss",
    ]
    assert model.biases() == [[0.0] * 4] * 2
    assert handle.steps == 0
    backward(model, batch())
    optimizer.step()  # the layers above met the same NaN; it is forgotten there as well
    assert handle.steps == 1


# What counts, and when.


def test_a_step_learns_from_all_its_micro_batches() -> None:
    model = Stack()
    optimizer = sgd(model, lr=0.0)
    handle = attach(optimizer, model)
    loads = [torch.zeros(4, dtype=torch.int64) for _ in model.layers]
    for seed in range(3):
        x = batch(seed)
        for i, layer in enumerate(model.layers):
            hidden, assignment = layer(x)
            loads[i] += assignment.load_E
            x = x + hidden
            sum(assignment.losses.values()).backward(retain_graph=True)
    optimizer.step()
    for i, load_E in enumerate(loads):
        assert torch.equal(handle.loads[f"layers.{i}"], load_E)
        expected_E = RATE * torch.sign(load_E.double().mean() - load_E)
        torch.testing.assert_close(model.layers[i].router.b_E, expected_E.float())
    backward(model, batch(9))
    optimizer.step()
    assert int(handle.loads["layers.0"].sum()) == 12  # the next step starts from zero


def test_eval_counts_nothing() -> None:
    model = Stack()
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    backward(model, batch(1))
    model.eval()
    x = batch(2).detach()
    x[0] = torch.nan
    model(x)
    model.train()
    optimizer.step()
    assert int(handle.loads["layers.0"].sum()) == 12


def test_a_step_that_grad_scaler_skips_counts_later() -> None:
    model = Stack()
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(seed: int, factor: float) -> None:
        hidden, aux = model(batch(seed))
        scaler.scale((hidden.square().mean() + aux) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    before = copy.deepcopy(model.state_dict())
    step(1, torch.inf)
    assert handle.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    step(2, 1.0)
    assert handle.steps == 1
    assert int(handle.loads["layers.0"].sum()) == 24


def test_a_step_that_a_fused_optimizer_skips_counts_later() -> None:
    """GradScaler calls these and they skip inside, having been told found_inf."""
    model = Stack()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    handle = attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for seed, factor, steps in ((1, torch.inf, 0), (2, 1.0, 1)):
        hidden, aux = model(batch(seed))
        scaler.scale((hidden.square().mean() + aux) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert handle.steps == steps
    assert int(handle.loads["layers.0"].sum()) == 24


def test_with_two_optimizers_the_update_waits_for_both() -> None:
    model = Stack()
    first, second = sgd(model.layers[0]), sgd(model.layers[1])
    handle = attach([first, second], model)
    for steps in (1, 2):
        backward(model, batch(steps))
        first.step()
        assert handle.steps == steps - 1
        second.step()
        assert handle.steps == steps


def test_scale_losses_scales_injected_losses_only() -> None:
    gate_gradients = {}
    for loss_mode in ("collect", "inject"):
        for scale in (1, 4):
            model = Stack(num_layers=1, loss_mode=loss_mode)
            handle = attach(sgd(model), model)
            handle.scale_losses(accumulation_steps=scale)
            hidden, aux = model(batch())
            (hidden.sum() * 0 + (aux if loss_mode == "collect" else 0)).backward()
            gate_gradients[loss_mode, scale] = model.layers[0].gate.weight.grad
    torch.testing.assert_close(gate_gradients["inject", 4] * 4, gate_gradients["inject", 1])
    torch.testing.assert_close(gate_gradients["inject", 1], gate_gradients["collect", 1])
    torch.testing.assert_close(gate_gradients["collect", 4], gate_gradients["collect", 1])


def test_a_step_of_forced_assignments_teaches_nothing() -> None:
    calls: list[dict[str, Tensor]] = []

    class Noting(type(balanced())):  # type: ignore[misc]
        def update(self, stats: dict[str, Tensor]) -> None:
            calls.append(dict(stats))

    layer = MoELayer(Noting(Gating.softmax(4, 2)), hidden_size=WIDTH, expert_size=3)
    optimizer = sgd(layer)
    handle = attach(optimizer, layer)
    ctx = RouteContext(forced_ids_TK=torch.tensor([[0, 1]] * 6))
    for context in (ctx, RouteContext()):
        sum(layer(batch(), context).assignment.losses.values()).backward()
        optimizer.step()
        if context is ctx:
            assert calls == []
            assert handle.loads[""].tolist() == [6, 6, 0, 0]
    assert len(calls) == 1


def test_dropped_pairs_are_reported_beside_the_load_before_dropping() -> None:
    layer = MoELayer(balanced(), hidden_size=WIDTH, expert_size=3, capacity_factor=0.5)
    optimizer = sgd(layer)
    handle = attach(optimizer, layer)
    dropped = 0
    for seed in range(2):
        assignment = layer(batch(seed)).assignment
        dropped += int(assignment.dropped)
        sum(assignment.losses.values()).backward()
    optimizer.step()
    assert int(handle.loads[""].sum()) == 24
    assert int(handle.dropped[""]) == dropped > 0


def test_plugins_that_ask_for_step_metrics_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("moerouters.registry.step_metrics_hook", lambda: seen.append)
    model = Stack()
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    backward(model, batch())
    optimizer.step()
    assert [metrics["step"] for metrics in seen] == [1]
    assert seen[0]["loads"].keys() == seen[0]["dropped"].keys() == {"layers.0", "layers.1"}
    assert torch.equal(seen[0]["loads"]["layers.0"], handle.loads["layers.0"])


# Attaching.


def test_attaching_twice_is_attaching_once() -> None:
    model = Stack()
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    assert attach([optimizer], model) is handle
    backward(model, batch())
    optimizer.step()
    assert handle.steps == 1


def test_layers_belong_to_one_handle() -> None:
    model = Stack()
    handle = attach(sgd(model), model)
    with pytest.raises(ConfigError, match=r"layer 'layers\.0' is attached already"):
        attach(sgd(model), model)
    handle.remove()
    attach(sgd(model), model)


def test_remove_stops_the_updates() -> None:
    model = Stack()
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    handle.remove()
    backward(model, batch())
    optimizer.step()
    assert handle.steps == 0
    assert model.biases() == [[0.0] * 4] * 2


def test_attach_sets_one_loss_mode() -> None:
    model = Stack()
    model.layers[1].loss_mode = "inject"
    with pytest.raises(ConfigError, match=r"layers disagree on loss_mode.\n.*layers.0: collect, layers.1: inject"):
        attach(sgd(model), model)
    attach(sgd(model), model, loss_mode="inject")
    assert [layer.loss_mode for layer in model.layers] == ["inject", "inject"]


def test_attach_finds_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="attach found no layers with a router"):
        attach(sgd(nn.Linear(2, 2)), nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="attach found no optimizers"):
        attach([], Stack())


def test_names_are_those_the_user_wrote() -> None:
    model = torch.compile(Stack(num_layers=1), backend="eager")
    assert attach(sgd(model), model).layers.keys() == {"layers.0"}


def test_copies_and_pickles_leave_the_handle_behind() -> None:
    model = Stack()
    attach(sgd(model), model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = sgd(twin)
        handle = attach(own, twin)
        backward(twin, batch())
        own.step()
        assert handle.steps == 1
        assert int(handle.loads["layers.0"].sum()) == 12


def test_a_router_without_state_is_never_updated() -> None:
    class Stateless(Router):
        def update(self, stats: Any) -> None:
            raise AssertionError("stateless")

    layer = MoELayer(Stateless(Gating.softmax(4, 2)), hidden_size=WIDTH, expert_size=3)
    optimizer = sgd(layer)
    handle = attach(optimizer, layer)
    layer(batch()).hidden.sum().backward()
    optimizer.step()
    assert handle.steps == 1
