"""Gating against loops over tokens and experts, in Python's own floats."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor, nn

from moerouters import Gating, RouteContext, Router
from moerouters.errors import ConfigError, ShapeError
from moerouters.gating import GatingSettings
from support.oracles import top_ids

E, K = 6, 2
FUNCTIONS = {
    "softmax": Gating.softmax,
    "sigmoid": Gating.sigmoid,
    "sqrtsoftplus": Gating.sqrtsoftplus,
    "relu": Gating.relu,
    "softmax_after_topk": Gating.softmax_after_topk,
}

finite = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 20.0, -20.0, 104.0, -104.0, 1e4, -1e4]),
    st.floats(min_value=-30, max_value=30, width=32),
)
rows = st.lists(finite, min_size=E, max_size=E)


examples = settings(deadline=None, derandomize=True, max_examples=40)


def row_of(values: Sequence[float]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


# The oracle.


def score(name: str, logits: Sequence[float]) -> list[float]:
    if name == "softmax":
        peak = max(logits)
        powers = [math.exp(x - peak) for x in logits]
        return [p / sum(powers) for p in powers]
    if name == "sigmoid":
        return [1 / (1 + math.exp(-x)) if x > -700 else 0.0 for x in logits]
    if name == "sqrtsoftplus":
        # torch's softplus is the identity above 20
        return [math.sqrt(x if x > 20 else max(x, 0.0) + math.log1p(math.exp(-abs(x)))) for x in logits]
    if name == "relu":
        return [max(x, 0.0) for x in logits]
    return list(logits)


def limit(adjusted: Sequence[float], groups: int, kept: int, rule: str) -> list[float]:
    size = len(adjusted) // groups
    members = [list(adjusted[g * size : (g + 1) * size]) for g in range(groups)]
    best = [max(m) if rule == "max" else sum(sorted(m)[-2:]) for m in members]
    open_groups = top_ids(best, kept)
    return [a if e // size in open_groups else -math.inf for e, a in enumerate(adjusted)]


def weigh(scores: Sequence[float], ids: Sequence[int], s: GatingSettings) -> list[float]:
    chosen = [scores[e] if e < len(scores) else 0.0 for e in ids]
    if s.softmax_after_topk:
        real = [e for e in ids if e < len(scores)]
        peak = max((scores[e] for e in real), default=0.0)
        total = sum(math.exp(scores[e] - peak) for e in real)
        return [s.scale * math.exp(scores[e] - peak) / total if e < len(scores) else 0.0 for e in ids]
    if s.renormalize and any(e < len(scores) for e in ids):
        total = sum(chosen) + s.eps
        chosen = [c / total for c in chosen]
    return [c * s.scale for c in chosen]


# Scores.


@pytest.mark.parametrize("name", FUNCTIONS)
@examples
@given(logits=rows)
def test_scores(name: str, logits: list[float]) -> None:
    expected = score(name, logits)
    found = FUNCTIONS[name](E, K).score(row_of(logits))[0].tolist()
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-150)


@examples
@given(logits=rows, cap=st.sampled_from([0.5, 5.0, 30.0]))
def test_soft_cap(logits: list[float], cap: float) -> None:
    prepared = Gating.softmax(E, K, soft_cap=cap).prepare(row_of(logits))[0].tolist()
    assert prepared == pytest.approx([cap * math.tanh(x / cap) for x in logits], rel=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@examples
@given(logits=rows)
def test_probabilities(name: str, logits: list[float]) -> None:
    found = FUNCTIONS[name](E, K).probabilities(row_of(logits))[0].tolist()
    scores = score("softmax" if name == "softmax_after_topk" else name, logits)
    expected = [s / (sum(scores) + (0 if name in ("softmax", "softmax_after_topk") else 1e-20)) for s in scores]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-30)


def test_domain_tells_where_scores_live() -> None:
    domains = {name: make(E, K).domain for name, make in FUNCTIONS.items()}
    assert domains == {
        "softmax": "unit",
        "sigmoid": "unit",
        "sqrtsoftplus": "real",
        "relu": "real",
        "softmax_after_topk": "real",
    }


def test_compute_dtype() -> None:
    gating = Gating.softmax(E, K)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert gating.prepare(torch.zeros(2, E, dtype=dtype)).dtype == torch.float32
    assert gating.prepare(torch.zeros(2, E, dtype=torch.float64)).dtype == torch.float64


# Groups.


@pytest.mark.parametrize("rule", ["max", "top2_sum"])
@pytest.mark.parametrize(("groups", "kept"), [(2, 1), (3, 2), (3, 1), (3, 3), (1, 1)])
@examples
@given(adjusted=st.lists(st.sampled_from([0.0, -1.0, 1.0, -2.5, 0.5, -1e4, 1e4, -0.25]), min_size=E, max_size=E))
def test_limit(rule: str, groups: int, kept: int, adjusted: list[float]) -> None:
    gating = Gating.sigmoid(E, K, num_groups=groups, kept_groups=kept, group_score=rule)
    assert gating.limit(row_of(adjusted))[0].tolist() == limit(adjusted, groups, kept, rule)


def test_closed_groups_stay_closed_under_negative_scores() -> None:
    """A mask of 0.0 lets closed experts win when biased scores are negative; several frameworks shipped that."""
    gating = Gating.sigmoid(E, K, num_groups=3, kept_groups=1)
    scores_TE = -1 - torch.rand(200, E)
    assignment_ids = Router(gating).select(scores_TE, RouteContext()).expert_ids
    best_group_T = scores_TE.unflatten(1, (3, 2)).amax(-1).argmax(-1)
    assert torch.equal(assignment_ids // 2, best_group_T.unsqueeze(1).expand(-1, K))


# Order and ties.


@examples
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, 1e-40]), min_size=E, max_size=E)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@example(values=[0.0, -0.0, 0.0, -0.0, 0.0, -0.0])
def test_ties_go_to_the_lowest_id(dtype: torch.dtype, values: list[float]) -> None:
    found = Gating.softmax(E, K).top(torch.tensor([values], dtype=dtype), 4)[0].tolist()
    assert found == top_ids(values, 4)


def test_ties_of_torch_stay_those_of_torch() -> None:
    values = torch.randint(0, 3, (50, E)).float()
    assert torch.equal(Gating.softmax(E, K, ties="torch").top(values, 4), values.topk(4, dim=-1).indices)


# Weights.

ids_strategy = st.lists(st.integers(0, E), min_size=3, max_size=3).filter(
    lambda ids: len({e for e in ids if e < E}) == sum(e < E for e in ids)
)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("changes", [{}, {"scale": 2.5}, {"renormalize": False}, {"renormalize": True, "eps": 1e-2}])
@given(logits=rows, ids=ids_strategy)
@examples
def test_weights(name: str, changes: dict[str, Any], logits: list[float], ids: list[int]) -> None:
    gating = FUNCTIONS[name](E, K, **changes)
    scores_TE = gating.score(row_of(logits))
    found = gating.weigh(scores_TE, torch.tensor([ids]))[0].tolist()
    expected = weigh(scores_TE[0].tolist(), ids, gating.settings)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-30)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("changes", [{}, {"scale": 2.5}, {"renormalize": False}, {"renormalize": True, "eps": 0.0}])
@given(tokens=st.lists(st.tuples(rows, ids_strategy), min_size=0, max_size=4), order=st.randoms(use_true_random=False))
@examples
def test_pairs_weigh_as_slots_do(name: str, changes: dict[str, Any], tokens: list[Any], order: Any) -> None:
    gating = FUNCTIONS[name](E, K, **changes)
    if changes.get("eps") == 0.0:  # 0 / 0 is what eps = 0 asks for when every chosen score vanishes
        tokens = [([abs(x) + 0.1 if abs(x) < 30 else 30.0 for x in logits], ids) for logits, ids in tokens]
    scores_TE = gating.score(torch.tensor([row for row, _ in tokens], dtype=torch.float64).reshape(-1, E))
    ids_TK = torch.tensor([ids for _, ids in tokens], dtype=torch.int64).reshape(-1, 3)
    by_slot = gating.weigh(scores_TE, ids_TK).reshape(-1)
    places = list(range(len(by_slot)))
    order.shuffle(places)
    token_ids_N = torch.tensor([n // 3 for n in places], dtype=torch.int64)
    by_pair = gating.weigh_pairs(scores_TE, token_ids_N, ids_TK.reshape(-1)[places])
    torch.testing.assert_close(by_pair, by_slot[places], rtol=1e-9, atol=1e-30)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("level", [-1e4, -200.0, -104.0, -90.0, 0.0, 90.0, 1e4])
@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
def test_gradients_stay_finite(name: str, level: float, loss_scale: float) -> None:
    """Also where every score underflows to zero, and with an empty slot and a row of empty slots."""
    gating = FUNCTIONS[name](E, K, renormalize=name != "softmax_after_topk")
    logits_TE = (level + torch.linspace(-1, 1, 3 * E).reshape(3, E)).requires_grad_()
    ids_TK = torch.tensor([[0, 3], [2, E], [E, E]])
    scores_TE = gating.score(gating.prepare(logits_TE))
    by_pair = gating.weigh_pairs(scores_TE, torch.tensor([0, 0, 1, 1, 2, 2]), ids_TK.reshape(-1))
    slopes_TK = torch.tensor([[1.0, -2.0], [3.0, 1.0], [1.0, 1.0]])
    for value in (
        (gating.weigh(scores_TE, ids_TK) * slopes_TK).sum(),
        (by_pair * slopes_TK.reshape(-1)).sum(),
        (gating.probabilities(gating.prepare(logits_TE)) * torch.arange(E)).sum(),
    ):
        (gradient_TE,) = torch.autograd.grad(value * loss_scale, logits_TE, retain_graph=True)
        assert bool(torch.isfinite(value))
        assert bool(torch.isfinite(gradient_TE).all())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_right(name: str) -> None:
    gating = FUNCTIONS[name](E, K, scale=1.5)
    logits_TE = torch.randn(4, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids_TK = torch.tensor([[0, 3], [2, E], [E, E], [5, 1]])
    assert torch.autograd.gradcheck(lambda x: gating.weigh(gating.score(x), ids_TK), logits_TE)
    token_ids_N, expert_ids_N = torch.tensor([3, 0, 0, 1, 1]), torch.tensor([1, 4, 2, E, 5])
    assert torch.autograd.gradcheck(lambda x: gating.weigh_pairs(gating.score(x), token_ids_N, expert_ids_N), logits_TE)
    assert torch.autograd.gradcheck(gating.probabilities, logits_TE)


# Settings.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": 7}, "top_k 7 exceeds num_experts 6"),
        ({"top_k": 0}, "top_k: Input should be greater than or equal to 1"),
        ({"num_groups": 4}, "num_experts 6 is not a multiple of num_groups 4"),
        ({"num_groups": 3, "kept_groups": 4}, "kept_groups 4 exceeds num_groups 3"),
        ({"num_groups": 6}, "1 kept groups of 1 experts hold fewer than top_k 2"),
        (
            {"num_groups": 6, "kept_groups": 2, "group_score": "top2_sum"},
            "group_score top2_sum needs 2 experts per group, num_groups 6 leaves 1",
        ),
        ({"softmax_after_topk": True}, "softmax_after_topk selects on logits: set score='identity'"),
        ({"score": "identity"}, "score='identity' gives no valid weights: set softmax_after_topk=True"),
        ({"soft_cap": 0.0}, "soft_cap: Input should be greater than 0"),
        ({"scale": math.nan}, "scale: Input should be a finite number"),
        ({"renormalise": True}, "renormalise: Extra inputs are not permitted"),
        ({"ties": "random"}, "ties: Input should be 'lowest_id' or 'torch'"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Gating._make(**{"num_experts": 6, "top_k": 2} | wrong)
    text = str(caught.value)
    assert text.startswith("the gating got bad settings.\n  from   num_experts=6")
    assert f"\n  cause  {message}" in text
    assert text.endswith("mend the fields named above; moerouters.gating.GatingSettings documents each")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Gating.softmax(E, K).settings.top_k = 3


@pytest.mark.parametrize("shape", [(3, 5), (6,), (2, 3, 6)])
def test_logits_of_another_width(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="but the gating has 6 experts"):
        Gating.softmax(E, K).prepare(torch.zeros(shape))


def test_a_gating_shows_what_differs_from_the_defaults() -> None:
    assert repr(Gating.sigmoid(E, K, scale=2.5)) == "Gating(num_experts=6, top_k=2, score='sigmoid', scale=2.5)"


# The model's own correction bias.


def test_correction_bias_steers_selection_and_not_the_weights() -> None:
    gating = Gating.sigmoid(E, K, correction_bias=True)
    gating.correction_bias_E.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0, 0.0, 4.0]))
    logits_TE = torch.randn(7, E)
    assignment = Router(gating)(logits_TE)
    assert assignment.expert_ids.tolist() == [[2, 5]] * 7
    scores_TE = logits_TE.sigmoid()[:, [2, 5]]
    torch.testing.assert_close(assignment.weights, scores_TE / scores_TE.sum(dim=-1, keepdim=True))


def test_a_balancer_sees_the_correction_bias() -> None:
    seen: list[Tensor] = []

    class Looking(Router):
        def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> None:
            seen.append(scores_TE)

    gating = Gating.sigmoid(E, K, correction_bias=True)
    gating.correction_bias_E.fill_(5.0)
    logits_TE = torch.randn(3, E)
    Looking(gating)(logits_TE)
    torch.testing.assert_close(seen[0], logits_TE.sigmoid() + 5.0)


def test_correction_bias_stays_float32() -> None:
    gating = Gating.sigmoid(E, K, correction_bias=True)
    fine_E = torch.linspace(0, 1, E) / 3
    gating.correction_bias_E.copy_(fine_E)
    model = nn.ModuleList([gating, nn.Linear(2, 2)])
    for cast in (model.half, model.bfloat16, model.double, lambda: model.to(torch.bfloat16)):
        cast()
        assert torch.equal(gating.correction_bias_E, fine_E)
        assert gating.correction_bias_E.dtype == torch.float32
    assert torch.equal(copy.deepcopy(model)[0].correction_bias_E, fine_E)
