"""The choice against a loop over tokens, and whose limit holds."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moerouters
from moerouters import Gating, LoadScope, MoELayer, RouteContext, Router, attach
from moerouters.errors import ConfigError
from moerouters_device_limited.config import DeviceLimitedConfig
from moerouters_device_limited.devices import devices_of_tokens
from moerouters_device_limited.plugin import moerouters_routers
from moerouters_device_limited.router import DeviceBalancedRouter, DeviceLimitedRouter, make_router


def make(gating: Gating, **config: object) -> Router:
    return make_router(gating, DeviceLimitedConfig.model_validate(config))


def best(values: list[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda place: (-values[place], place))[:count]


def choose(scores: list[float], K: int, D: int, M: int, group_score: str) -> list[int]:
    """Section 2.2.2 of arXiv:2405.04434, and of arXiv:2412.19437 section 2.1.2, for one token."""
    size = len(scores) // D
    affinity = []
    for d in range(D):
        falling = sorted(scores[d * size : (d + 1) * size], reverse=True)
        affinity.append(falling[0] if group_score == "max" else sum(falling[: math.ceil(K / M)]))
    kept = best(affinity, M)
    allowed = [scores[e] if e // size in kept else -math.inf for e in range(len(scores))]
    return best(allowed, K)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    D, size = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    M = draw(st.integers(1, D - 1))
    E, T = D * size, draw(st.integers(0, 5))
    # Few distinct values, eighths: ties of experts and of devices are common, and sums of sigmoids would not be exact.
    row = st.lists(st.integers(-8, 8).map(lambda eighths: eighths / 8), min_size=E, max_size=E)
    return {
        "D": D,
        "M": M,
        "K": draw(st.integers(1, M * size)),
        "group_score": draw(st.sampled_from(["max", "top_sum"])),
        "logits": draw(st.lists(row, min_size=T, max_size=T)),
        "valid": draw(st.lists(st.booleans(), min_size=T, max_size=T)),
    }


@settings(max_examples=150, deadline=None)
@given(case=cases(), correction=st.booleans())
def test_experts_are_the_best_on_the_best_devices(case: dict[str, Any], correction: bool) -> None:
    D, M, K, logits = case["D"], case["M"], case["K"], case["logits"]
    E = D * (len(logits[0]) // D) if logits else D * -(-K // M)
    gating = Gating.softmax_after_topk(E, K, correction_bias=correction)  # chosen by logits, exact in floats
    bias = [(-1) ** e * 0.5 for e in range(E)] if correction else [0.0] * E
    if correction:
        gating.correction_bias_E.copy_(torch.tensor(bias))
    router = make(gating, num_devices=D, max_devices=M, group_score=case["group_score"])
    logits_TE = torch.tensor(logits, dtype=torch.float64).reshape(-1, E)
    assignment = router(logits_TE, RouteContext(valid_T=torch.tensor(case["valid"], dtype=torch.bool))).validate()
    for ids, row, real in zip(assignment.expert_ids_TK.tolist(), logits, case["valid"], strict=True):
        adjusted = [value + b for value, b in zip(row, bias, strict=True)]
        assert ids == (choose(adjusted, K, D, M, case["group_score"]) if real else [E] * K)


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_the_limit_is_that_of_a_gating_with_the_same_groups(group_score: str) -> None:
    """DeepSeek-V2 and -V3 write the same limit into the model; K / M = 2, so that top_sum is top2_sum."""
    torch.manual_seed(0)
    logits_TE = torch.randn(400, 16)
    model = Gating.sigmoid(16, 4, num_groups=4, kept_groups=2, group_score=group_score)
    ours = "max" if group_score == "max" else "top_sum"
    own = make(Gating.sigmoid(16, 4), num_devices=4, max_devices=2, group_score=ours)
    expected = moerouters.build("topk", model)(logits_TE)
    for router in (own, make(model)):
        found = router(logits_TE)
        assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
        assert torch.equal(found.weights_TK, expected.weights_TK)
    assert own.train()(logits_TE).losses.keys() == make(model).train()(logits_TE).losses.keys()
    for name, loss in own(logits_TE).losses.items():
        torch.testing.assert_close(loss, make(model)(logits_TE).losses[name])


def test_no_token_reaches_more_devices_than_declared() -> None:
    torch.manual_seed(1)
    router = make(Gating.softmax(24, 6), num_devices=8, max_devices=3)
    ids_TK = router(torch.randn(500, 24)).expert_ids_TK
    reached_T = devices_of_tokens(ids_TK, num_experts=24, num_devices=8).sum(dim=1)
    assert reached_T.max() == 3 and reached_T.min() >= 2
    assert (ids_TK < 24).all()


def test_devices_of_tokens_counts_a_device_once() -> None:
    ids_TK = torch.tensor([[0, 1, 2], [5, 6, 6], [6, 6, 6], [3, 0, 4]])  # 6 is an empty slot
    sent_TD = devices_of_tokens(ids_TK, num_experts=6, num_devices=3)
    assert sent_TD.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]]


def test_who_limits() -> None:
    grouped = Gating.sigmoid(8, 2, num_groups=4, kept_groups=2)
    assert type(make(Gating.softmax(8, 2))) is DeviceBalancedRouter
    assert type(make(grouped)) is DeviceBalancedRouter
    assert type(make(grouped, num_devices=2)) is DeviceBalancedRouter  # losses over other blocks than the groups
    assert type(make(Gating.softmax(8, 2), num_devices=4, max_devices=4)) is DeviceBalancedRouter
    assert type(make(Gating.softmax(8, 2), num_devices=4, max_devices=1)) is DeviceLimitedRouter
    assert make(grouped).devices == (4, 2, False)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    ("gating", "config", "words"),
    [
        (Gating.softmax(8, 2), {"num_devices": 3}, "num_experts 8 is not a multiple of num_devices 3"),
        (Gating.softmax(8, 3), {"num_devices": 4, "max_devices": 1}, "1 devices of 2 experts hold fewer than top_k 3"),
        (
            Gating.softmax(8, 2, num_groups=4, kept_groups=2),
            {"num_devices": 4, "max_devices": 2},
            "leave num_devices out: the gating's groups are the devices",
        ),
    ],
)
def test_devices_that_do_not_fit_are_refused(gating: Gating, config: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        moerouters.build("device-limited", gating, config=config)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_devices": 2}, "max_devices needs num_devices"),
        ({"num_devices": 2, "max_devices": 3}, "max_devices 3 exceeds num_devices 2"),
        ({"num_devices": 2, "group_score": "top_sum"}, "group_score needs max_devices"),
        ({"num_devices": 0}, "num_devices"),
        ({"device_alpha": -0.1}, "device_alpha"),
        ({"num_device": 2}, "did you mean 'num_devices'"),
    ],
)
def test_a_bad_config_is_named(config: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        moerouters.build("device-limited", Gating.softmax(8, 2), config=config)


def test_weights_come_from_the_scores_and_the_limit_gets_no_gradient() -> None:
    torch.manual_seed(2)
    logits_TE = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)
    router = make(Gating.sigmoid(8, 2), num_devices=4, max_devices=1)
    assignment = router(logits_TE)
    chosen_TK = logits_TE.sigmoid().gather(1, assignment.expert_ids_TK)
    torch.testing.assert_close(assignment.weights_TK, chosen_TK / chosen_TK.sum(dim=1, keepdim=True))
    (gradient_TE,) = torch.autograd.grad(assignment.weights_TK[:, 0].sum(), logits_TE)
    assert ((gradient_TE != 0).sum(dim=1) == 2).all()


def test_spec_and_capabilities() -> None:
    (spec,) = moerouters_routers()
    assert spec.name == "device-limited" and spec.config is DeviceLimitedConfig
    assert spec.capabilities == spec.factory(Gating.softmax(4, 1), spec.config()).capabilities
    assert spec.capabilities.balanced_losses == {"expert": 0.003}
    silent = make(Gating.softmax(4, 1), expert_alpha=0, device_alpha=0, communication_alpha=0)
    assert silent.capabilities.load_scope is LoadScope.NONE and not silent(torch.randn(3, 4)).losses
    assert all(field.description for field in DeviceLimitedConfig.model_fields.values())


@pytest.mark.parametrize("group_score", ["max", "top_sum"])
def test_compiles_whole_and_gives_the_same_numbers(group_score: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(3)
    router = make(Gating.softmax(12, 4), num_devices=4, max_devices=2, group_score=group_score)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    ctx = RouteContext(valid_T=torch.arange(9) != 3)
    logits_TE = torch.randn(9, 12)

    def run(route: torch.nn.Module) -> tuple[Tensor, list[Tensor], Tensor]:
        leaf_TE = logits_TE.clone().requires_grad_()
        assignment = route(leaf_TE, ctx)
        total = torch.stack(list(assignment.losses.values())).sum() + assignment.weights[:, 0].sum()
        return assignment.expert_ids, list(assignment.losses.values()), torch.autograd.grad(total, leaf_TE)[0]

    torch.testing.assert_close(run(compiled), run(router))


def test_devices_balance_in_training() -> None:
    """A gate that prefers the experts of the first devices; only the device loss acts."""
    E, D_, T = 16, 4, 256
    gating = Gating.softmax(E, 2)
    config = {"num_devices": D_, "max_devices": 2, "expert_alpha": 0, "device_alpha": 1.0, "communication_alpha": 0}
    layer = MoELayer(make(gating, **config), hidden_size=5, expert_size=2)
    with torch.no_grad():
        layer.gate.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.5)
        layer.gate.weight[:, -1] = torch.linspace(1.0, -1.0, E)
    optimizer = torch.optim.SGD(layer.gate.parameters(), lr=1.0)
    handle = attach(optimizer, layer, loss_mode="inject")
    excess = []
    for step in range(60):
        x_TD = torch.cat([torch.randn(T, 4, generator=torch.Generator().manual_seed(step)), torch.ones(T, 1)], dim=1)
        (layer(x_TD).hidden.sum() * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        load_D = handle.loads[""].reshape(D_, -1).sum(dim=1).double()
        excess.append(float(load_D.max() / load_D.mean() - 1))
    assert excess[0] > 0.8
    assert sum(excess[-10:]) / 10 < 0.2
