"""In layers, under an optimizer: does it balance, layer by layer?"""

import pytest
import torch
from torch import nn

from moerouters import Gating, MoELayer, RouteContext, attach
from moerouters.metrics import max_violation
from moerouters_loss_controlled.config import LossControlledConfig
from moerouters_loss_controlled.router import LossControlledRouter

E, K, D, T = 8, 2, 4, 256


def layer_with(gate_ED: torch.Tensor, top_k: int = K, **config: object) -> MoELayer:
    gating = Gating.softmax(gate_ED.shape[0], top_k)
    router = LossControlledRouter(gating, LossControlledConfig.model_validate(config))
    layer = MoELayer(router, hidden_size=gate_ED.shape[1], expert_size=2)
    layer.gate.weight.data.copy_(gate_ED)
    return layer


def skewed_gate() -> torch.Tensor:
    """A gate that reads a constant last feature, and through it prefers the first experts."""
    gate_ED = torch.randn(E, D + 1, generator=torch.Generator().manual_seed(0)) * 0.5
    gate_ED[:, -1] = torch.linspace(1.5, -1.5, E)
    return gate_ED


def tokens(step: int) -> torch.Tensor:
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(step))
    return torch.cat([x_TD, torch.ones(T, 1)], dim=1)


@pytest.mark.parametrize(
    ("config", "loss_mode"),
    [
        ({"alpha": 1.0}, "collect"),
        ({"alpha": 1.0, "form": "gshard"}, "inject"),
        ({"alpha": 0.0, "sequence_alpha": 1.0}, "collect"),
        ({"alpha": 0.0, "global_alpha": 1.0}, "inject"),
        ({"alpha": 0.0, "global_alpha": 1.0, "global_load": "all_reduce"}, "collect"),
        ({"alpha": 0.3, "sequence_alpha": 0.3, "global_alpha": 0.3, "z_alpha": 0.01}, "inject"),
        ({"alpha": 0.3, "sequence_alpha": 0.3, "global_alpha": 0.3, "z_alpha": 0.01}, "collect"),
    ],
    ids=["switch", "gshard", "sequence", "global-last-step", "global-all-reduce", "several-inject", "several-collect"],
)
def test_balances_skewed_logits(config: dict[str, object], loss_mode: str) -> None:
    layer = layer_with(skewed_gate(), **config)
    optimizer = torch.optim.SGD(layer.gate.parameters(), lr=1.0)
    attach(optimizer, layer, loss_mode=loss_mode)
    counted = 1 if config.get("form") == "gshard" else K  # GShard's loss balances the first choices
    violations = []
    for step in range(80):
        out = layer(tokens(step).reshape(4, T // 4, D + 1))
        loss = out.hidden.sum() * 0
        if loss_mode == "collect":
            loss = loss + torch.stack(list(out.assignment.losses.values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ids_N = out.assignment.expert_ids_TK[:, :counted].reshape(-1)
        violations.append(max_violation(torch.bincount(ids_N, minlength=E)).item())
    assert violations[0] > 1.5
    assert sum(violations[-20:]) / 20 < 0.4


def test_layers_are_never_pooled() -> None:
    """Each layer collapses on another expert: pooled over the layers that is perfect balance."""
    layers = nn.ModuleList()
    for expert in range(4):
        gate_ED = torch.zeros(4, 1)
        gate_ED[expert] = 30.0
        layers.append(layer_with(gate_ED, top_k=1, alpha=0.01))
    for layer in layers:
        assert layer(torch.ones(12, 1)).assignment.losses["switch"].item() == pytest.approx(0.04)


def test_micro_batches_and_masks_reach_the_state_like_one_batch() -> None:
    valid_T = torch.arange(T) % 3 != 0
    states = []
    for pieces in (1, 4):
        layer = layer_with(skewed_gate(), alpha=0.0, global_alpha=1.0)
        optimizer = torch.optim.SGD(layer.gate.parameters(), lr=0.0)
        attach(optimizer, layer, loss_mode="inject")
        for x_TD, mask_T in zip(tokens(0).chunk(pieces), valid_T.chunk(pieces), strict=True):
            layer(x_TD, RouteContext(valid_T=mask_T)).hidden.sum().backward()
        optimizer.step()
        layer.eval()
        layer(tokens(9))  # evaluation leaves the state alone
        optimizer.step()
        states.append(layer.router.get_buffer("last_fraction_E"))
    assert torch.equal(states[0], states[1])
    assert states[0].unique().numel() > 1


def test_a_control_without_coefficients_trains() -> None:
    layer = layer_with(skewed_gate(), alpha=0.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    handle = attach(optimizer, layer)
    layer(tokens(0)).hidden.square().mean().backward()
    optimizer.step()
    assert handle.loads[""].sum() == T * K
