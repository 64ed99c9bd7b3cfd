"""The router `quantile`: one lagged dual step, against loops over all tokens of a step."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_study import Recipe
from torch import Tensor

from moerouters import Gating, LoadScope, MoELayer, RouteContext, StateAlgebra, attach
from moerouters.kernels.bin_rule import OCTAVE_BITS
from moerouters.metrics import max_violation
from moerouters_bip import QuantileConfig, QuantileRouter, solve_dual
from moerouters_bip.histogram import BINS, FINEST

ESTIMATORS = ["histogram", "exact"]


def quantile_by_loops(scores: list[list[float]], q: list[float], *, top_k: int) -> list[float]:
    """Of one list of tokens, all of which count: the step before its mean is taken off."""
    bids: list[list[float]] = [[] for _ in q]
    for s in scores:
        falling = sorted((a - b for a, b in zip(s, q, strict=True)), reverse=True)
        for e, value in enumerate(s):
            bids[e].append(value - (falling[top_k - 1] + falling[top_k]) / 2)
    place = Fraction(len(scores) * top_k, len(q)) + Fraction(1, 2)
    found = []
    for ordered in (sorted(column, reverse=True) for column in bids):
        at = min(max(place, 1), len(ordered))
        low = math.floor(at)
        after = ordered[min(low, len(ordered) - 1)]
        found.append(ordered[low - 1] + (after - ordered[low - 1]) * float(at - low))
    return found


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Tensor], Tensor, int]:
    """Micro-batches of logits, q and K."""
    E = draw(st.integers(2, 5), label="E")
    value = st.sampled_from([0.0, 0.25, -0.5, 3.0]) | st.integers(-99, 99).map(lambda n: n / 32)
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3), label="sizes")
    parts = [draw(st.lists(st.lists(value, min_size=E, max_size=E), min_size=n, max_size=n)) for n in sizes]
    q = draw(st.lists(st.integers(-8, 8).map(lambda n: n / 64), min_size=E, max_size=E), label="dual_E")
    tensors = [torch.tensor(part, dtype=torch.float64).reshape(-1, E) for part in parts]
    return tensors, torch.tensor(q), draw(st.integers(1, E - 1), label="K")


def learned(router: QuantileRouter, parts: list[Tensor], **ctx: Tensor) -> Tensor:
    """dual_E after one update on these micro-batches."""
    stats = [router(part, RouteContext(**ctx)).stats for part in parts]  # type: ignore[arg-type]
    router.update({name: torch.stack([each[name] for each in stats]).sum(dim=0) for name in stats[0]})
    return router.dual_E.clone()


def make(gating: Gating, dual_E: Tensor | None = None, **config: object) -> QuantileRouter:
    router = QuantileRouter(gating, QuantileConfig.model_validate(config))
    if dual_E is not None:
        router.dual_E.copy_(dual_E)
    return router


@settings(deadline=None, max_examples=40)
@given(case=steps())
def test_exact_is_the_mean_of_each_forward_s_own_quantile(case: tuple[list[Tensor], Tensor, int]) -> None:
    parts, q_E, top_k = case
    gating = Gating.sigmoid(q_E.numel(), top_k)
    found_E = learned(make(gating, q_E, estimator="exact"), parts)
    tokens = sum(map(len, parts))
    if not tokens:
        assert torch.equal(found_E, q_E)
        return
    own = [quantile_by_loops(part.sigmoid().tolist(), q_E.tolist(), top_k=top_k) for part in parts if len(part)]
    weights = [len(part) / tokens for part in parts if len(part)]
    centred = [torch.tensor(values, dtype=torch.float64) for values in own]
    expected_E = sum(w * (values - values.mean()) for w, values in zip(weights, centred, strict=True))
    torch.testing.assert_close(found_E, torch.as_tensor(expected_E).float(), rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(case=steps())
def test_histogram_is_the_quantile_of_all_tokens_up_to_a_bin(case: tuple[list[Tensor], Tensor, int]) -> None:
    parts, q_E, top_k = case
    found_E = learned(make(Gating.sigmoid(q_E.numel(), top_k), q_E), parts)
    whole_TE = torch.cat(parts).sigmoid()
    if not len(whole_TE):
        assert torch.equal(found_E, q_E)
        return
    true_E = torch.tensor(quantile_by_loops(whole_TE.tolist(), q_E.tolist(), top_k=top_k), dtype=torch.float64)
    # Both neighbours of the place may be a bin away, and the one below it lies further out.
    reach = float((whole_TE.max() - whole_TE.min()) + q_E.abs().max())
    width = max(2 * reach / 2**OCTAVE_BITS, 2.0 ** (FINEST + 1))
    assert float((found_E - (true_E - true_E.mean()).float()).abs().max()) <= 2 * width


@pytest.mark.parametrize("T", [64, 61])
@pytest.mark.parametrize("groups", [1, 4])
def test_exact_takes_the_first_step_of_bip_one_batch_late(T: int, groups: int, generator: torch.Generator) -> None:
    gating = Gating.sigmoid(8, 2, num_groups=groups, kept_groups=max(1, groups // 2))
    logits_TE = torch.randn(T, 8, generator=generator) + torch.linspace(-1, 1, 8)
    valid_T = torch.arange(T) % 7 != 2
    router = make(gating, torch.linspace(-0.1, 0.1, 8), estimator="exact")
    limit = gating.limit if groups > 1 else None
    scores_TE = logits_TE.sigmoid()
    expected_E = solve_dual(scores_TE, router.dual_E, top_k=2, iterations=1, valid_T=valid_T, limit=limit)
    torch.testing.assert_close(learned(router, [logits_TE], valid_T=valid_T), expected_E, rtol=0, atol=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "make_gating", [Gating.softmax, Gating.sigmoid, Gating.sqrtsoftplus, Gating.softmax_after_topk]
)
def test_balances_what_comes_next(make_gating: object, estimator: str) -> None:
    """Six steps; what is left is mostly the chance of 256 tokens an expert, 0.15 for q that are just right."""
    router = make(make_gating(16, 4), estimator=estimator)  # type: ignore[operator]
    recipe = Recipe(1024, 16, 4, "logits", 1.0)
    greedy = max_violation(router(recipe.scores(0)).load_E)
    for batch in range(6):
        learned(router, list(recipe.scores(0, batch=batch).split(300)))
    logits_TE = recipe.scores(0, batch=9)
    trained = router(logits_TE)
    assert greedy > 1.5 and max_violation(trained.load_E) < 0.3
    assert torch.equal(router.eval()(logits_TE).expert_ids, trained.expert_ids), "one sign in training and in eval"


def test_q_rises_where_too_many_came(generator: torch.Generator) -> None:
    for estimator in ESTIMATORS:
        router = make(Gating.softmax(6, 2), estimator=estimator)
        logits_TE = torch.randn(300, 6, generator=generator) + torch.tensor([2.0, 0, 0, 0, 0, -2])
        q_E = learned(router, [logits_TE])
        assert q_E.argmax() == 0 and q_E.argmin() == 5 and abs(float(q_E.mean())) < 1e-7
        assert router(logits_TE).load_E.max() < 1.5 * 100


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_padding_teaches_nothing(estimator: str, generator: torch.Generator) -> None:
    logits_TE, garbage_TE = torch.randn(40, 8, generator=generator), torch.randn(9, 8, generator=generator) * 50
    gating = Gating.softmax(8, 2)
    plain_E = learned(make(gating, estimator=estimator), [logits_TE])
    padded_TE = torch.cat([garbage_TE, logits_TE])
    assert torch.equal(learned(make(gating, estimator=estimator), [padded_TE], valid_T=torch.arange(49) >= 9), plain_E)
    broken_TE = logits_TE.clone()
    broken_TE[3, 1] = math.nan
    whole_E = learned(make(gating, estimator=estimator), [broken_TE])
    assert torch.equal(whole_E, learned(make(gating, estimator=estimator), [broken_TE[torch.arange(40) != 3]]))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("T", "E", "K"), [(0, 8, 2), (7, 4, 4), (5, 1, 1)])
def test_nothing_to_learn(estimator: str, T: int, E: int, K: int) -> None:
    q_E = torch.linspace(-0.1, 0.2, E)
    assert torch.equal(learned(make(Gating.softmax(E, K), q_E, estimator=estimator), [torch.randn(T, E)]), q_E)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ema_keeps_its_share_of_the_old_q(estimator: str, generator: torch.Generator) -> None:
    logits_TE, q_E = torch.randn(50, 6, generator=generator), torch.linspace(-0.1, 0.1, 6)
    whole_E, slow_E = (
        learned(make(Gating.sigmoid(6, 2), q_E, estimator=estimator, ema=ema), [logits_TE]) for ema in (0.0, 0.75)
    )
    torch.testing.assert_close(slow_E, 0.75 * q_E + 0.25 * whole_E)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiles_whole_and_equals_eager(estimator: str, generator: torch.Generator) -> None:
    router = make(Gating.softmax(8, 2), torch.linspace(-0.02, 0.02, 8), estimator=estimator)
    logits_TE = torch.randn(64, 8, generator=generator)
    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")(logits_TE)
    eager = router(logits_TE)
    assert torch.equal(compiled.expert_ids, eager.expert_ids)
    for name, value in eager.stats.items():
        torch.testing.assert_close(compiled.stats[name], value)


def test_updates_once_per_optimizer_step(generator: torch.Generator) -> None:
    layer = MoELayer(QuantileRouter(Gating.softmax(8, 2), QuantileConfig()), hidden_size=16, expert_size=8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = attach(optimizer, layer)
    for _ in range(4):
        for x_TD in torch.randn(512, 16, generator=generator).split(200):
            layer(x_TD + 0.7)
            optimizer.zero_grad()
        optimizer.step()
    assert handle.steps == 4 and max_violation(handle.loads[""]) < 0.4


def test_what_it_promises() -> None:
    histogram, exact = (make(Gating.softmax(8, 2), estimator=name).capabilities for name in ESTIMATORS)
    assert (histogram.state, histogram.load_scope) == (StateAlgebra.ADDITIVE, LoadScope.GLOBAL)
    assert (exact.state, exact.load_scope) == (StateAlgebra.MEAN_OF_SOLVES, LoadScope.LOCAL)
    assert histogram.causal and exact.causal and histogram.balance == exact.balance is not None
    assert make(Gating.softmax(8, 2), ema=0.9).capabilities.balance is None
    stats = make(Gating.softmax(8, 2))(torch.randn(5, 8)).stats
    assert stats["bids_EB"].shape == (8, BINS) and int(stats["bids_EB"].sum()) == 40
