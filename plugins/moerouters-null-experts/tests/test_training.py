"""In a layer, under an optimizer: is the budget held, and are the real experts balanced?"""

import pytest
import torch

from moerouters import Gating, MoELayer, attach
from moerouters.metrics import max_violation
from moerouters_null_experts.config import NullExpertsConfig
from moerouters_null_experts.router import NullExpertsRouter

E, K, D, T = 8, 3, 4, 512


def skewed_layer(gating: Gating, **config: object) -> MoELayer:
    """A layer whose gate reads a constant last feature that prefers the first experts."""
    router = NullExpertsRouter(gating, NullExpertsConfig.model_validate(config))
    layer = MoELayer(router, hidden_size=D + 1, expert_size=2)
    with torch.no_grad():
        layer.gate.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.5)
        layer.gate.weight[:, -1] = torch.linspace(1.0, -1.0, E)
    return layer


def tokens(step: int) -> torch.Tensor:
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(step))
    return torch.cat([x_TD, torch.ones(T, 1)], dim=1)


@pytest.mark.parametrize(
    ("gating", "config"),
    [
        (Gating.softmax(E, K), {"rate": 0.01}),
        (Gating.sigmoid(E, K), {"rate": 0.02, "null_share": 0.5}),
        (Gating.softmax_after_topk(E, K), {"rate": 0.1, "num_null": 2}),
        (Gating.sigmoid(E, K), {"rate": 0.01, "source": "gate", "num_null": 3}),
    ],
    ids=["softmax", "half", "logits", "gate"],
)
def test_the_budget_is_held_and_real_experts_are_balanced(gating: Gating, config: dict[str, object]) -> None:
    layer = skewed_layer(gating, **config)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = attach(optimizer, layer)
    router = layer.router
    assert isinstance(router, NullExpertsRouter)
    used, violations = [], []
    for step in range(200):
        layer(tokens(step))
        optimizer.step()
        used.append(router.experts_per_token.item())
        violations.append(max_violation(handle.loads[""][: router.num_real]).item())
    share = float(config.get("null_share", 0.25))  # type: ignore[arg-type]
    assert sum(used[-20:]) / 20 == pytest.approx((1 - share) * K, rel=0.05)
    assert violations[0] > 0.5
    assert sum(violations[-20:]) / 20 < 0.25


def test_the_loss_alone_spreads_slots_over_real_and_null_experts() -> None:
    """AdaMoE: at balance each of the 8 experts, 2 of them null, takes an eighth of the slots."""
    layer = skewed_layer(Gating.softmax(E, K), source="gate", num_null=2, rate=0, alpha=1.0)
    optimizer = torch.optim.SGD(layer.gate.parameters(), lr=1.0)
    attach(optimizer, layer, loss_mode="inject")
    used = []
    for step in range(80):
        (layer(tokens(step)).hidden.sum() * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        used.append(layer.router.get_buffer("experts_per_token").item())
    assert used[0] > 2.7
    assert sum(used[-10:]) / 10 == pytest.approx(K * 6 / 8, rel=0.08)


def test_empty_slots_cost_nothing_and_tokens_without_experts_pass_through() -> None:
    layer = skewed_layer(Gating.sigmoid(E, K))
    router = layer.router
    assert isinstance(router, NullExpertsRouter)
    router.expert_bias_E.fill_(-2.0)  # below every sigmoid: null experts win every slot
    out = layer(tokens(0))
    assert out.assignment.load_E.sum() == 0
    assert not out.hidden.any()
    out.hidden.sum().backward()
    assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
