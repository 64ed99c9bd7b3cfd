"""The choice against a list of real and null candidates per token, and what a router of this kind promises."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moerouters
from moerouters import Gating, RouteContext, StateAlgebra
from moerouters.errors import ConfigError
from moerouters_null_experts.config import NullExpertsConfig
from moerouters_null_experts.plugin import moerouters_routers
from moerouters_null_experts.router import NullExpertsRouter


def make(gating: Gating, bias: list[float] | None = None, **config: object) -> NullExpertsRouter:
    router = NullExpertsRouter(gating, NullExpertsConfig.model_validate(config))
    if bias is not None:
        router.expert_bias_E.copy_(torch.tensor(bias))
    return router


def choose_shared(scores: list[float], bias: list[float], *, K: int, num_null: int) -> list[int]:
    """The K best of the biased real experts, and of num_null null ones that score as the worst real one unbiased."""
    E = len(scores)
    candidates = [(-(s + b), e) for e, (s, b) in enumerate(zip(scores, bias, strict=True))]
    candidates += [(-min(scores), E)] * num_null  # among equals behind every real expert, whose id is below E
    best = [expert for _, expert in sorted(candidates)[:K]]
    return sorted(best, key=lambda expert: expert == E)  # empty slots come last


def choose_gate(scores: list[float], bias: list[float], *, K: int, num_null: int) -> list[int]:
    """The K best, the last num_null of them null."""
    E = len(scores)
    adjusted = [s + b for s, b in zip(scores, bias, strict=True)]
    best = sorted(range(E), key=lambda e: (-adjusted[e], e))[:K]
    return [e if e < E - num_null else E for e in best]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    E, T = draw(st.integers(2, 6)), draw(st.integers(0, 6))
    K = draw(st.integers(1, E - 1))
    eighths = st.integers(-8, 8).map(lambda n: n / 8)  # exact sums, and ties are common
    row = st.lists(eighths, min_size=E, max_size=E)
    return {
        "E": E,
        "K": K,
        "num_null": draw(st.integers(1, E - K)),
        "logits": draw(st.lists(row, min_size=T, max_size=T)),
        "bias": draw(row),
        "valid": draw(st.lists(st.booleans(), min_size=T, max_size=T)),
    }


@settings(max_examples=200, deadline=None)
@given(case=cases(), gate=st.booleans())
def test_slots_that_null_experts_win_are_empty(case: dict[str, Any], gate: bool) -> None:
    E, K, n = case["E"], case["K"], case["num_null"]
    config: dict[str, Any] = {"num_null": n, "null_share": min(0.25, n / (2 * K))}
    bias = case["bias"]
    if gate:
        config["source"] = "gate"
        bias = [*bias[: E - n], *[0.0] * n]
    router = make(Gating.softmax_after_topk(E, K), bias, **config)  # chosen by logits, exact in floats
    logits_TE = torch.tensor(case["logits"], dtype=torch.float64).reshape(-1, E)
    assignment = router(logits_TE, RouteContext(valid_T=torch.tensor(case["valid"], dtype=torch.bool))).validate()
    choose = choose_gate if gate else choose_shared
    expected = [
        choose(row, bias, K=K, num_null=n) if real else [E] * K
        for row, real in zip(case["logits"], case["valid"], strict=True)
    ]
    assert assignment.expert_ids_TK.tolist() == expected
    counted = [sum(ids.count(e) for ids in expected) for e in range(E)]
    assert assignment.stats["load_E"].tolist() == counted
    assert assignment.stats["tokens"].item() == sum(case["valid"])


@pytest.mark.parametrize("make_gating", [Gating.softmax, Gating.sigmoid, Gating.sqrtsoftplus, Gating.relu])
def test_weights_are_shared_among_the_real_experts(make_gating: Any) -> None:
    """As in AdaMoE: a null expert takes a slot, and no part of the weight."""
    torch.manual_seed(0)
    gating = make_gating(6, 3, renormalize=True)
    logits_TE = torch.randn(50, 6, dtype=torch.float64)
    assignment = make(gating, [-0.3] * 6)(logits_TE).validate()
    taken_TK = assignment.expert_ids_TK < 6
    assert len(set(taken_TK.sum(dim=1).tolist())) > 2
    sums_T = assignment.weights_TK.sum(dim=1)
    some_T = taken_TK.any(dim=1)
    torch.testing.assert_close(sums_T[some_T], torch.ones_like(sums_T[some_T]))
    assert not sums_T[~some_T].any()


def test_without_renormalisation_the_gates_null_experts_lower_the_weights() -> None:
    """As in MoE++: the softmax runs over null experts as well, so the language loss reaches their logits."""
    gating = Gating.softmax(4, 2, renormalize=False)
    logits_TE = torch.tensor([[1.0, 0.0, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    assignment = make(gating, source="gate", num_null=1)(logits_TE)
    assert assignment.expert_ids_TK.tolist() == [[4, 0]]
    assert assignment.weights_TK[0, 1].item() == pytest.approx(logits_TE.softmax(dim=1)[0, 0].item())
    (gradient_TE,) = torch.autograd.grad(assignment.weights_TK.sum(), logits_TE)
    assert gradient_TE[0, 3] < 0


def test_a_fresh_router_is_plain_top_k() -> None:
    torch.manual_seed(1)
    logits_TE = torch.randn(100, 8)
    for gating in (Gating.softmax(8, 3), Gating.sigmoid(8, 3, correction_bias=True), Gating.softmax_after_topk(8, 3)):
        if gating.settings.correction_bias:
            gating.correction_bias_E.copy_(torch.linspace(-3, -1, 8))
        expected = moerouters.build("topk", gating)(logits_TE)
        assert torch.equal(make(gating)(logits_TE).expert_ids_TK, expected.expert_ids_TK)


def test_num_null_bounds_the_empty_slots() -> None:
    logits_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    for num_null, least in ((1, 3), (3, 1), (4, 0), (9, 0)):
        ids_TK = make(Gating.sigmoid(8, 4), [-5.0] * 8, num_null=num_null)(logits_TE).expert_ids_TK
        assert ((ids_TK < 8).sum(dim=1) == least).all()
        assert (ids_TK[:, least:] == 8).all()  # the first slots are the best experts


def test_the_choice_does_not_see_a_shift_of_all_scores() -> None:
    """A correction bias that all experts share means nothing, as in a trained DeepSeek-V3."""
    logits_TE = torch.randn(50, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    routed = []
    for shift in (0.0, -4.0):
        gating = Gating.sigmoid(6, 3, correction_bias=True)
        gating.correction_bias_E.fill_(shift)
        routed.append(make(gating, [-0.25, -0.5, -0.25, 0.0, -0.5, -0.75])(logits_TE).expert_ids_TK)
    assert torch.equal(*routed)
    assert (routed[0] == 6).any() and (routed[0] < 6).any()


@pytest.mark.parametrize(
    ("gating", "config", "words"),
    [
        (Gating.softmax(4, 2), {"source": "gate", "num_null": 4}, "all of its 4 experts would be null"),
        (Gating.softmax(4, 3), {"num_null": 1, "null_share": 0.5}, "null_share 0.5 of top_k 3 slots is more than"),
        (Gating.softmax(4, 3), {"source": "gate", "num_null": 2}, "2 real experts cannot fill 0.75 of top_k 3 slots"),
        (Gating.softmax(4, 2), {"source": "gate"}, "source='gate' needs num_null"),
        (Gating.softmax(4, 2), {"rate": 0}, "source='shared' needs a rate above 0"),
        (Gating.softmax(4, 2), {"null_share": 1}, "null_share"),
        (Gating.softmax(4, 2), {"null_shares": 0.5}, "did you mean 'null_share'"),
    ],
)
def test_what_does_not_fit_is_refused(gating: Gating, config: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        moerouters.build("null-experts", gating, config=config)


@pytest.mark.parametrize("config", [{}, {"source": "gate", "num_null": 1}], ids=["shared", "gate"])
def test_micro_batches_add_up_and_padding_counts_nowhere(config: dict[str, object]) -> None:
    torch.manual_seed(4)
    logits_TE, valid_T = torch.randn(24, 5), torch.arange(24) % 5 != 0
    whole, split = make(Gating.softmax(5, 2), **config), make(Gating.softmax(5, 2), **config)
    whole.update(whole(logits_TE[valid_T]).stats)
    parts = [
        split(part, RouteContext(valid_T=mask)).stats
        for part, mask in zip(logits_TE.split([7, 0, 17]), valid_T.split([7, 0, 17]), strict=True)
    ]
    split.update({name: torch.stack([part[name] for part in parts]).sum(dim=0) for name in parts[0]})
    assert all(torch.equal(whole.get_buffer(name), split.get_buffer(name)) for name in whole.state_names())
    assert whole.experts_per_token.item() > 0


def test_the_bias_gets_no_gradient() -> None:
    router = make(Gating.sigmoid(4, 2), [-0.2, -0.1, 0.0, 0.1])
    assert not list(router.parameters())
    logits_TE = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    forced = RouteContext(forced_ids_TK=router(logits_TE).expert_ids_TK)
    assert torch.autograd.gradcheck(lambda x: router(x, forced).weights_TK, (logits_TE,))
    assert not router(logits_TE, forced).stats


def test_spec_and_capabilities() -> None:
    (spec,) = moerouters_routers()
    assert spec.name == "null-experts" and spec.config is NullExpertsConfig
    assert spec.capabilities == spec.factory(Gating.softmax(4, 2), spec.config()).capabilities
    assert spec.capabilities.state is StateAlgebra.ADDITIVE and not spec.capabilities.balanced_losses
    assert make(Gating.softmax(4, 2), alpha=0.1).capabilities.balanced_losses == {"balance": 0.1}
    gate = make(Gating.softmax(4, 2), alpha=0.1, source="gate", num_null=1)
    assert not gate.capabilities.balanced_losses
    assert all(field.description for field in NullExpertsConfig.model_fields.values())


@pytest.mark.parametrize("config", [{}, {"source": "gate", "num_null": 2}], ids=["shared", "gate"])
def test_compiles_whole_and_gives_the_same_numbers(config: dict[str, object]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(5)
    router = make(Gating.softmax(6, 2), [-0.3, -0.2, -0.1, 0.0, 0.0, 0.0], alpha=0.1, **config)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    ctx = RouteContext(valid_T=torch.arange(9) != 3)
    logits_TE = torch.randn(9, 6)

    def run(route: torch.nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        leaf_TE = logits_TE.clone().requires_grad_()
        assignment = route(leaf_TE, ctx)
        total = assignment.losses["balance"] + assignment.weights[:, 0].sum()
        return assignment.expert_ids, assignment.losses["balance"], torch.autograd.grad(total, leaf_TE)[0]

    torch.testing.assert_close(run(compiled), run(router))
