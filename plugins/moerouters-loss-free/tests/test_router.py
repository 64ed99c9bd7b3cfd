"""Selection against a loop over tokens, and what the contract of a router asks for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

import moerouters
from moerouters import Gating, RouteContext
from moerouters.errors import ConfigError
from moerouters_loss_free.config import LossFreeConfig, Rule
from moerouters_loss_free.router import LossFreeRouter

RULES: tuple[Rule, ...] = ("sign", "error", "multiplicative")


def make(gating: Gating, state: list[float] | None = None, **config: object) -> LossFreeRouter:
    router = LossFreeRouter(gating, LossFreeConfig.model_validate(config))
    if state is not None:
        (name,) = router.state_names()
        router.get_buffer(name).copy_(torch.tensor(state))
    return router


def route_by_the_paper(
    logits: list[list[float]], state: list[float], K: int, rule: Rule, valid: list[bool]
) -> tuple[list[list[int]], list[list[float]]]:
    """Eq. 3 token by token: the K best of s_i + b_i (or s_i * b_i), weighted by s_i over the sum of the chosen s_i."""
    ids, weights = [], []
    for row, real in zip(logits, valid, strict=True):
        E = len(row)
        scores = [1 / (1 + math.exp(-value)) for value in row]
        adjusted = [s * b if rule == "multiplicative" else s + b for s, b in zip(scores, state, strict=True)]
        chosen = sorted(range(E), key=lambda e, adjusted=adjusted: (-adjusted[e], e))[:K]
        total = sum(scores[e] for e in chosen)
        ids.append(chosen if real else [E] * K)
        weights.append([scores[e] / total if real else 0.0 for e in chosen])
    return ids, weights


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[float]], list[float], int, list[bool]]:
    E, T = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    K = draw(st.integers(1, E))
    # Few distinct values: equal logits and equal biases are common, and ties must go to the lowest id.
    logits = draw(st.lists(st.lists(st.integers(-3, 3).map(float), min_size=E, max_size=E), min_size=T, max_size=T))
    state = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=E, max_size=E))
    valid = draw(st.lists(st.booleans(), min_size=T, max_size=T))
    return logits, state, K, valid


@settings(max_examples=80, deadline=None)
@given(case=cases(), rule=st.sampled_from(RULES))
def test_routes_as_the_paper_says(case: tuple[list[list[float]], list[float], int, list[bool]], rule: Rule) -> None:
    logits, state, K, valid = case
    E = len(state)
    router = make(Gating.sigmoid(E, K), state, rule=rule)
    logits_TE = torch.tensor(logits, dtype=torch.float64).reshape(-1, E)
    valid_T = torch.tensor(valid, dtype=torch.bool)
    assignment = router(logits_TE, RouteContext(valid_T=valid_T)).validate()
    ids, weights = route_by_the_paper(logits, state, K, rule, valid)
    assert assignment.expert_ids_TK.tolist() == ids
    expected_TK = torch.tensor(weights, dtype=torch.float64).reshape(-1, K)
    torch.testing.assert_close(assignment.weights_TK, expected_TK)
    counted = [sum(row.count(e) for row in ids) for e in range(E)]
    assert assignment.stats["load_E"].tolist() == counted
    assert assignment.stats["load_E"].dtype == torch.int64


def test_the_bias_gets_no_gradient_and_gives_none() -> None:
    torch.manual_seed(0)
    logits_TE = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    forced_TK = make(Gating.sigmoid(4, 2), [0.9, 0.0, -0.9, 0.0])(logits_TE).expert_ids_TK
    for rule in RULES:
        router = make(Gating.sigmoid(4, 2), [0.9, 0.0, 0.1, 0.2], rule=rule)
        assert not any(parameter.requires_grad for parameter in router.parameters())

        def weights(x: Tensor, router: LossFreeRouter = router) -> Tensor:
            return router(x, RouteContext(forced_ids_TK=forced_TK)).weights_TK

        assert torch.autograd.gradcheck(weights, (logits_TE,))
        assert not router(logits_TE, RouteContext(forced_ids_TK=forced_TK)).stats


def test_padding_changes_nothing_for_the_others() -> None:
    torch.manual_seed(1)
    logits_TE = torch.randn(10, 6)
    padded_TE = torch.cat([logits_TE, torch.full((4, 6), float("nan"))])
    valid_T = torch.arange(14) < 10
    router = make(Gating.sigmoid(6, 2), [0.3, 0.0, -0.2, 0.0, 0.1, 0.0])
    plain, padded = router(logits_TE), router(padded_TE, RouteContext(valid_T=valid_T))
    assert torch.equal(padded.expert_ids_TK[:10], plain.expert_ids_TK)
    assert torch.equal(padded.stats["load_E"], plain.stats["load_E"])
    assert (padded.expert_ids_TK[10:] == 6).all()


@pytest.mark.parametrize("rule", RULES)
def test_micro_batches_add_up(rule: Rule) -> None:
    torch.manual_seed(2)
    logits_TE = torch.randn(24, 5)
    whole, split = make(Gating.sigmoid(5, 2), rule=rule), make(Gating.sigmoid(5, 2), rule=rule)
    whole.update(whole(logits_TE).stats)
    parts = [split(part).stats["load_E"] for part in logits_TE.split([7, 0, 17])]
    split.update({"load_E": torch.stack(parts).sum(dim=0)})
    assert all(torch.equal(whole.get_buffer(n), split.get_buffer(n)) for n in whole.state_names())


def test_a_negative_bias_never_lets_another_group_in() -> None:
    gating = Gating.sigmoid(6, 2, num_groups=3, kept_groups=1)
    router = make(gating, [-3.0] * 6)
    assignment = router(torch.randn(50, 6)).validate()
    groups_TK = assignment.expert_ids_TK // 2
    assert (groups_TK[:, 0] == groups_TK[:, 1]).all()


@pytest.mark.parametrize(("E", "K"), [(1, 1), (4, 4), (3, 2)])
@pytest.mark.parametrize("T", [0, 1, 5])
@pytest.mark.parametrize("rule", RULES)
def test_edges(T: int, E: int, K: int, rule: Rule) -> None:
    router = make(Gating.softmax(E, K), rule=rule)
    before = {name: router.get_buffer(name).clone() for name in router.state_names()}
    assignment = router(torch.randn(T, E)).validate()
    assert assignment.load_E.sum() == T * K
    router.update(assignment.stats)
    if E == K or T == 0:  # nothing to choose, or nothing chosen: nothing to learn
        assert all(torch.equal(router.get_buffer(name), value) for name, value in before.items())


@pytest.mark.parametrize("rule", RULES)
def test_state_stays_float32_and_travels(rule: Rule) -> None:
    state = [0.001, 0.0005, 1.0001]
    router = make(Gating.sigmoid(3, 1), state, rule=rule)
    (name,) = router.state_names()
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        router.to(cast)
        assert router.get_buffer(name).dtype == torch.float32
        assert torch.equal(router.get_buffer(name), torch.tensor(state))
    twin = make(Gating.sigmoid(3, 1), rule=rule)
    twin.load_state_dict(router.state_dict())
    assert torch.equal(twin.get_buffer(name), torch.tensor(state))
    twin.reset_state()
    assert torch.equal(twin.get_buffer(name), torch.full((3,), 1.0 if rule == "multiplicative" else 0.0))


def test_a_factor_is_never_loaded_as_a_bias() -> None:
    saved = make(Gating.sigmoid(3, 1)).state_dict()
    with pytest.raises(RuntimeError, match="expert_scale_E"):
        make(Gating.sigmoid(3, 1), rule="multiplicative").load_state_dict(saved)


@pytest.mark.parametrize("rule", RULES)
def test_eval_is_frozen_and_batch_invariant(rule: Rule) -> None:
    torch.manual_seed(3)
    logits_TE = torch.randn(8, 4)
    router = make(Gating.sigmoid(4, 2), [0.5, 0.1, 0.7, 0.2], rule=rule).eval()
    together = router(logits_TE)
    assert not together.stats and not together.losses
    alone = torch.cat([router(row).expert_ids_TK for row in logits_TE.split(1)])
    assert torch.equal(alone, together.expert_ids_TK)


@pytest.mark.parametrize("rule", RULES)
def test_compiles_whole_and_gives_the_same_bits(rule: Rule) -> None:
    torch._dynamo.reset()
    torch.manual_seed(4)
    router = make(Gating.sigmoid(4, 2), [0.5, 0.1, 0.7, 0.2], rule=rule)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    logits_TE, ctx = torch.randn(9, 4), RouteContext(valid_T=torch.arange(9) != 3)
    for _ in range(2):  # the second time with another bias: it must not be baked into the graph
        eager, traced = router(logits_TE, ctx), compiled(logits_TE, ctx)
        assert torch.equal(traced.expert_ids_TK, eager.expert_ids_TK)
        assert torch.equal(traced.weights_TK, eager.weights_TK)
        assert torch.equal(traced.stats["load_E"], eager.stats["load_E"])
        router.update({"load_E": torch.tensor([10**6, 0, 0, 0])})
        (name,) = router.state_names()
        router.get_buffer(name)[1] = 5.0
    assert (compiled(logits_TE, ctx).expert_ids_TK[torch.arange(9) != 3] == 1).any(dim=1).all()


def test_the_plugin_offers_it_by_name() -> None:
    router = moerouters.build("loss-free", Gating.softmax(4, 1), config={"rule": "error", "rate": 0.01})
    assert isinstance(router, LossFreeRouter)
    spec = moerouters.info("loss-free").spec
    assert spec.config is LossFreeConfig
    assert spec.capabilities == router.capabilities
    assert (spec.capabilities.state, spec.capabilities.load_scope) == ("additive", "global")
    assert spec.capabilities.causal and spec.capabilities.eval_batch_invariant
    assert all(field.description for field in LossFreeConfig.model_fields.values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rate": 0}, "rate"),
        ({"rate": -0.1}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rule": "signs"}, "'sign', 'error' or 'multiplicative'"),
        ({"center": True}, "did you mean 'centre'"),
    ],
)
def test_a_bad_config_is_named(config: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        moerouters.build("loss-free", Gating.softmax(4, 1), config=config)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        LossFreeConfig().rate = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("gating", "found"),
    [
        (Gating.softmax_after_topk(4, 2), "score='identity'"),
        (Gating.sigmoid(4, 2, correction_bias=True), "correction_bias=True"),
    ],
)
def test_a_factor_needs_scores_that_are_never_negative(gating: Gating, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        make(gating, rule="multiplicative")
    assert make(gating, rule="sign")(torch.randn(3, 4)).validate().load_E.sum() == 6
