"""attach: one update per optimizer step, or a clear error."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moerouters import Capabilities, Gating, MoELayer, RouteContext, Router, attach
from moerouters.errors import ConfigError, NonFiniteLogits
from moerouters.routed import RoutedModule
from support.balanced import RATE, balanced
from support.stack import WIDTH, Stack, backward, batch, sgd

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


def test_a_pickle_between_micro_batches_goes_on_where_it_was() -> None:
    model = Stack()
    backward(model, batch(1))
    twin = pickle.loads(pickle.dumps(model))
    optimizer = sgd(twin)
    handle = attach(optimizer, twin)
    backward(twin, batch(2))
    optimizer.step()
    assert int(handle.loads["layers.0"].sum()) == 24


def test_routers_that_talk_in_their_forward_learn_the_group() -> None:
    class Talking(Router):
        capabilities = Capabilities(forward_collective=True)

    talking = MoELayer(Talking(Gating.softmax(4, 2)), hidden_size=WIDTH, expert_size=3)
    quiet = MoELayer(balanced(), hidden_size=WIDTH, expert_size=3)
    model = nn.ModuleList([talking, quiet])
    group: Any = threading.Lock()  # like a process group, nothing that can be copied
    handle = attach(sgd(model), model, token_group=group)
    assert talking.router.token_group is group
    assert quiet.router.token_group is None
    assert copy.deepcopy(model)[0].router.token_group is None
    handle.remove()
    assert talking.router.token_group is None


def test_every_routed_module_names_the_parameters_of_its_router() -> None:
    with pytest.raises(NotImplementedError):
        _ = RoutedModule().trains_router


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


def test_a_layer_without_a_name_is_named_by_its_class() -> None:
    """A lone MoELayer is its own model: `layer ''` would name nothing."""
    layer = MoELayer(balanced(), hidden_size=8, expert_size=8)
    optimizer = sgd(layer)
    attach(optimizer, layer)
    layer(torch.full((3, 8), float("nan"))).hidden.sum().backward()
    with pytest.raises(NonFiniteLogits, match="the gate of layer 'MoELayer' gave"):
        optimizer.step()
