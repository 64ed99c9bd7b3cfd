"""In a layer, under an optimizer: does it balance?"""

import pytest
import torch

from moerouters import Gating, MoELayer, RouteContext, attach
from moerouters.metrics import max_violation
from moerouters_loss_free.config import LossFreeConfig, Rule
from moerouters_loss_free.router import LossFreeRouter

E, K, D, T = 8, 2, 4, 512


def skewed_layer(gating: Gating, **config: object) -> MoELayer:
    """A layer whose gate reads a constant last feature that prefers the first experts."""
    layer = MoELayer(LossFreeRouter(gating, LossFreeConfig.model_validate(config)), hidden_size=D + 1, expert_size=2)
    with torch.no_grad():
        layer.gate.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.5)
        layer.gate.weight[:, -1] = torch.linspace(1.5, -1.5, E)
    return layer


def tokens(step: int) -> torch.Tensor:
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(step))
    return torch.cat([x_TD, torch.ones(T, 1)], dim=1)


@pytest.mark.parametrize(
    ("gating", "rule", "rate"),
    [
        (Gating.sigmoid(E, K), "sign", 0.01),
        (Gating.sigmoid(E, K), "error", 0.05),
        (Gating.sigmoid(E, K), "multiplicative", 0.01),
        (Gating.softmax(E, K), "error", 0.02),
        (Gating.softmax_after_topk(E, K), "sign", 0.05),  # real domain: the rate is in units of logits
    ],
    ids=["sigmoid-sign", "sigmoid-error", "sigmoid-multiplicative", "softmax-error", "logits-sign"],
)
def test_balances_skewed_logits(gating: Gating, rule: Rule, rate: float) -> None:
    layer = skewed_layer(gating, rule=rule, rate=rate)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = attach(optimizer, layer)
    violations = []
    for step in range(200):
        layer(tokens(step))
        optimizer.step()
        violations.append(max_violation(handle.loads[""]).item())
    assert violations[0] > 1.5
    assert sum(violations[-20:]) / 20 < 0.2


def test_micro_batches_and_masks_reach_the_state_like_one_batch() -> None:
    valid_T = torch.arange(T) % 3 != 0
    states = []
    for pieces in (1, 4):
        layer = skewed_layer(Gating.sigmoid(E, K), rule="error")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        attach(optimizer, layer)
        for step in range(3):
            for x_TD, mask_T in zip(tokens(step).chunk(pieces), valid_T.chunk(pieces), strict=True):
                layer(x_TD, RouteContext(valid_T=mask_T))
            optimizer.step()
        layer.eval()
        layer(tokens(9))  # evaluation leaves the state alone
        optimizer.step()
        states.append(layer.router.get_buffer("expert_bias_E"))
    assert torch.equal(states[0], states[1])
    assert states[0].unique().numel() > 1
