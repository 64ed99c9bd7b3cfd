"""Noise where it belongs: in the choice, in training, from the key; and what the router needs and refuses."""

import pytest
import torch
from torch import Tensor

import moerouters
from moerouters import Gating, MoELayer, RouteContext
from moerouters.errors import ConfigError, ContextError, ShapeError
from moerouters.metrics import max_violation
from moerouters.noise import normal_noise
from moerouters_noisy_topk.config import NoisyTopkConfig
from moerouters_noisy_topk.losses import expected_load, importance, squared_variation
from moerouters_noisy_topk.router import LEAST_STD, NoisyTopkRouter

T, E, K, D = 9, 5, 2, 6
GATINGS = [
    Gating.softmax(E, K),
    Gating.softmax(E, K, renormalize=False),
    Gating.sigmoid(E, K, scale=2.5),
    Gating.sqrtsoftplus(E, K),
    Gating.softmax_after_topk(E, K),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def context(*key: int, hidden_TD: Tensor | None = None, tokens: int = T) -> RouteContext:
    hidden_TD = random(tokens, D, seed=9) if hidden_TD is None else hidden_TD
    return RouteContext(noise_key=torch.tensor(key or (1, 2)), hidden_TD=hidden_TD)


def learned(gating: Gating = GATINGS[0], **config: object) -> NoisyTopkRouter:
    """With noise of another size for every expert and token."""
    router = NoisyTopkRouter(gating, NoisyTopkConfig.model_validate({"hidden_size": D} | config))
    with torch.no_grad():
        router.noise_ED.copy_(random(E, D, seed=4))
    return router


@pytest.mark.parametrize("gating", GATINGS, ids=str)
@pytest.mark.parametrize("width", [None, D])
def test_chooses_by_noisy_and_weighs_by_clean_logits(gating: Gating, width: int | None) -> None:
    router = learned(gating) if width else NoisyTopkRouter(gating, NoisyTopkConfig(std=0.7))
    logits_TE, ctx = random(T, E), context()
    assignment = router(logits_TE, ctx).validate()
    std_TE = 0.7
    if width:
        std_TE = torch.log1p(torch.exp(ctx.hidden_TD @ router.noise_ED.detach().t())) + LEAST_STD
    noisy_TE = logits_TE + std_TE * normal_noise(ctx.noise_key, (T, E))
    assert assignment.expert_ids.tolist() == noisy_TE.topk(K, dim=1).indices.tolist()
    assert assignment.expert_ids.tolist() != logits_TE.topk(K, dim=1).indices.tolist()
    expected_TK = gating.weigh(gating.score(logits_TE), assignment.expert_ids)
    torch.testing.assert_close(assignment.weights.detach(), expected_TK)


def test_noise_follows_the_key_and_nothing_else() -> None:
    router, logits_TE = NoisyTopkRouter(GATINGS[0]), random(T, E)
    first = router(logits_TE, context(1, 2)).expert_ids
    torch.manual_seed(3)
    assert torch.equal(router(logits_TE, context(1, 2)).expert_ids, first)
    assert not torch.equal(router(logits_TE, context(1, 3)).expert_ids, first)
    alone = router(logits_TE[:4], context(1, 2, tokens=4)).expert_ids
    assert torch.equal(alone, first[:4])


def test_there_is_none_in_eval() -> None:
    router, logits_TE = learned().eval(), random(T, E)
    assignment = router(logits_TE)
    assert torch.equal(assignment.expert_ids, logits_TE.topk(K, dim=1).indices)
    assert not assignment.losses


@pytest.mark.parametrize("width", [None, D])
def test_losses_are_the_papers(width: int | None) -> None:
    config = {"importance": 0.3, "load": 0.7}
    router = learned(**config) if width else NoisyTopkRouter(GATINGS[0], NoisyTopkConfig(std=0.4, **config))
    logits_TE, ctx = random(T, E), context()
    assignment = router(logits_TE, ctx)
    valid_T = torch.ones(T, dtype=torch.bool)
    sums_E = importance(assignment.weights, assignment.expert_ids, valid_T, E)
    torch.testing.assert_close(assignment.losses["importance"], 0.3 * squared_variation(sums_E))
    std_TE = torch.full((T, E), 0.4)
    if width:
        std_TE = torch.nn.functional.softplus(ctx.hidden_TD @ router.noise_ED.t()) + LEAST_STD
    noisy_TE = logits_TE + std_TE * normal_noise(ctx.noise_key, (T, E))
    load_E = expected_load(logits_TE, noisy_TE, std_TE, valid_T, router.gating)
    torch.testing.assert_close(assignment.losses["load"], 0.7 * squared_variation(load_E))


def test_the_noise_is_learned_from_the_load_loss() -> None:
    router = learned()
    hidden_TD = random(T, D, seed=9).requires_grad_()
    assignment = router(random(T, E), context(hidden_TD=hidden_TD))
    for value in (assignment.weights.sum(), assignment.losses["importance"]):
        assert not value.requires_grad
    gradients = torch.autograd.grad(assignment.losses["load"], [router.noise_ED, hidden_TD])
    assert all(bool(gradient.any()) for gradient in gradients)


def test_the_noise_starts_at_ln_2() -> None:
    router = NoisyTopkRouter(GATINGS[0], NoisyTopkConfig(hidden_size=D))
    assert router.capabilities.parameters
    assert not router.noise_ED.any()
    assert [name for name, _ in router.named_parameters()] == ["noise_ED"]
    _, std_TE = router._noisy(random(T, E), RouteContext(**vars(context()) | {"valid_T": torch.ones(T).bool()}))
    torch.testing.assert_close(std_TE.detach(), torch.full((T, E), 0.69314718 + LEAST_STD))


def test_losses_even_out_a_skewed_gate() -> None:
    """Gradient descent on the losses alone, on logits that prefer early experts."""
    router = NoisyTopkRouter(Gating.softmax(E, K), NoisyTopkConfig(std=0.5))
    offset_E = torch.linspace(2, -2, E).requires_grad_()
    optimizer = torch.optim.SGD([offset_E], lr=3.0)
    violations = []
    for step in range(60):
        assignment = router(random(200, E, seed=step) + offset_E, context(step, tokens=200))
        sum(assignment.losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        violations.append(float(max_violation(assignment.load_E)))
    assert violations[0] > 1
    assert sum(violations[-10:]) / 10 < 0.3


def test_garbage_in_padding_changes_nothing() -> None:
    router, logits_TE = learned(), random(T, E)
    valid_T = torch.arange(T) != 4
    outcomes = []
    for garbage in (0.0, float("nan")):
        hidden_TD = torch.where(valid_T.unsqueeze(1), random(T, D, seed=9), garbage)
        given_TE = torch.where(valid_T.unsqueeze(1), logits_TE, garbage).requires_grad_()
        ctx = RouteContext(noise_key=torch.tensor([3]), hidden_TD=hidden_TD, valid_T=valid_T)
        assignment = router(given_TE, ctx).validate()
        losses = sum(assignment.losses.values())
        outcomes.append([losses, *torch.autograd.grad(losses, [given_TE, router.noise_ED])])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_a_half_precision_model_keeps_its_width() -> None:
    router = learned().bfloat16()
    assignment = router(random(T, E).bfloat16(), context(hidden_TD=random(T, D, seed=9).bfloat16()))
    assert assignment.losses["load"].dtype == torch.float32


def test_all_experts_leave_nothing_to_choose() -> None:
    router = NoisyTopkRouter(Gating.softmax(3, 3), NoisyTopkConfig(hidden_size=D))
    assert not router.capabilities.parameters
    assert not list(router.parameters())
    assignment = router(random(4, 3))
    assert set(assignment.losses) == {"importance"}
    assert assignment.expert_ids.sort(dim=1).values.tolist() == [[0, 1, 2]] * 4


def test_it_trains_inside_a_layer() -> None:
    router = moerouters.build("noisy-topk", Gating.softmax(4, 2), config={"hidden_size": D})
    layer = MoELayer(router, hidden_size=D, expert_size=4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    moerouters.attach(optimizer, layer)
    hidden, assignment = layer(random(T, D), RouteContext(noise_key=torch.tensor([0, 0])))
    (hidden.square().mean() + sum(assignment.losses.values())).backward()
    optimizer.step()
    assert bool(router.noise_ED.any())


def test_it_says_what_it_misses() -> None:
    with pytest.raises(ContextError, match="router 'noisy-topk' needs noise_key, and the RouteContext has none"):
        NoisyTopkRouter(GATINGS[0])(random(T, E))
    with pytest.raises(ContextError, match="router 'noisy-topk' needs hidden_TD"):
        learned()(random(T, E), RouteContext(noise_key=torch.tensor([1])))
    with pytest.raises(ShapeError, match="hidden states of width 4, and was built for 6"):
        learned()(random(T, E), context(hidden_TD=random(T, 4)))


@pytest.mark.parametrize(
    ("gating", "config", "message"),
    [
        (Gating.softmax(4, 2), {"hidden_size": 8, "load": 0}, "cannot learn its noise without the load loss"),
        (Gating.sigmoid(4, 2, correction_bias=True), {}, "has no load loss under this gating"),
        (Gating.softmax(4, 2, num_groups=2, kept_groups=1), {}, "has no load loss under this gating"),
        (Gating.softmax(4, 2), {"hidden_size": True}, "hidden_size: input should be a width or None"),
        (Gating.softmax(4, 2), {"std": 0.0}, "std: input should be greater than 0"),
        (Gating.softmax(4, 2), {"width": 8}, "width: unknown field"),
    ],
)
def test_what_it_refuses(gating: Gating, config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moerouters.build("noisy-topk", gating, config=config)


def test_without_a_load_loss_any_gating_will_do() -> None:
    gating = Gating.sigmoid(6, 2, correction_bias=True, num_groups=3, kept_groups=1, renormalize=False)
    gating.correction_bias_E.copy_(torch.tensor([0.0, 0.0, 9.0, 9.0, 0.0, 0.0]))
    router = NoisyTopkRouter(gating, NoisyTopkConfig(load=0))
    assignment = router(random(T, 6), context()).validate()
    assert assignment.expert_ids.sort(dim=1).values.tolist() == [[2, 3]] * T
