"""The online form against a multiset in plain Python, and the router around it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_study import Recipe
from torch import Tensor

from moerouters import Gating, LoadScope, RouteContext, StateAlgebra, build
from moerouters.errors import ConfigError
from moerouters.metrics import max_violation
from moerouters_bip import BipConfig, BipRouter, OnlineBipRouter
from moerouters_bip.online import online_prices, online_prices_torch
from moerouters_bip.online_router import bip_router

VARIANTS = ["centred", "published"]


def prices_of_a_multiset(
    scores: list[list[float]], q: list[float], valid: list[bool], *, top_k: int, memory: float, variant: str
) -> list[list[float]]:
    """The q that each token is routed by: all bids are kept, and sorted anew for every token."""
    E = len(q)
    kept, tokens, bids, prices = q, 0, [[] for _ in q], []  # type: ignore[var-annotated]
    for s, counts in zip(scores, valid, strict=True):
        prices.append(q)
        falling = sorted((a - b for a, b in zip(s, q, strict=True)), reverse=True)
        if not counts or falling[top_k] == -math.inf:
            continue
        p = max(falling[top_k], 0.0) if variant == "published" else (falling[top_k - 1] + falling[top_k]) / 2
        for e in range(E):
            if s[e] > -math.inf:
                bids[e].append(s[e] - p)
        tokens += 1
        place = Fraction(tokens * top_k, E)  # the running rank
        batch = []
        for e in range(E):
            ordered = sorted(bids[e], reverse=True)
            if not ordered:
                batch.append(kept[e])
            elif variant == "published":
                batch.append(max(ordered[min(math.floor(place), len(ordered) - 1)], 0.0))
            else:
                low = math.floor(place + Fraction(1, 2))
                upper, lower = (ordered[min(max(at, 0), len(ordered) - 1)] for at in (low - 1, low))
                batch.append(upper + (lower - upper) * float(place + Fraction(1, 2) - low))
        q = [(memory * old + tokens * new) / max(memory + tokens, 1.0) for old, new in zip(kept, batch, strict=True)]
        if variant == "centred":
            mean = float(torch.tensor(q, dtype=torch.float64).mean())  # ties hang on its last bits
            q = [value - mean for value in q]
    return prices


@st.composite
def passes(draw: st.DrawFn) -> tuple[list[list[float]], list[float], list[bool], int, float]:
    T, E = draw(st.integers(0, 9), label="T"), draw(st.integers(2, 5), label="E")
    value = st.sampled_from([0.0, 0.5, -0.5, 1e3]) | st.integers(-64, 64).map(lambda n: n / 64 + n * n * 1e-5)
    row = st.lists(value | st.just(-math.inf), min_size=E, max_size=E)
    return (
        draw(st.lists(row, min_size=T, max_size=T), label="scores_TE"),
        draw(st.lists(value, min_size=E, max_size=E), label="dual_E"),
        draw(st.lists(st.booleans(), min_size=T, max_size=T), label="valid_T"),
        draw(st.integers(1, E - 1), label="K"),
        draw(st.sampled_from([0.0, 1.0, 7.0]), label="memory"),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@settings(deadline=None, max_examples=50)
@given(case=passes())
def test_prices_are_those_of_a_multiset(
    variant: str, case: tuple[list[list[float]], list[float], list[bool], int, float]
) -> None:
    scores, q, valid, top_k, memory = case
    found_TE = online_prices(
        torch.tensor(scores, dtype=torch.float64).reshape(len(scores), len(q)),
        torch.tensor(q, dtype=torch.float64),
        torch.tensor(valid, dtype=torch.bool),
        top_k=top_k,
        memory=torch.tensor(memory),
        variant=variant,  # type: ignore[arg-type]
    )
    expected = prices_of_a_multiset(scores, q, valid, top_k=top_k, memory=memory, variant=variant)
    expected_TE = torch.tensor(expected, dtype=torch.float64).reshape(found_TE.shape)
    torch.testing.assert_close(found_TE, expected_TE, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cpu_gives_the_bits_of_the_reference(dtype: torch.dtype, variant: str, generator: torch.Generator) -> None:
    for T, E, K, memory in ((40, 6, 2, 0.0), (23, 9, 3, 10.0), (12, 3, 2, 1.0), (5, 4, 4, 0.0), (0, 4, 2, 3.0)):
        scores_TE = torch.randn(T, E, generator=generator).to(dtype)
        scores_TE[2:4, 1:] = -math.inf
        scores_TE[: T // 2, 0] = -math.inf  # nobody bids for it until then, and its q may be negative
        dual_E = torch.randn(E, generator=generator).to(dtype) / 4
        valid_T = torch.rand(T, generator=generator) > 0.2
        given_ = {"top_k": K, "memory": torch.tensor(memory), "variant": variant}
        found_TE = online_prices(scores_TE, dual_E, valid_T, **given_)  # type: ignore[arg-type]
        assert torch.equal(found_TE, online_prices_torch(scores_TE, dual_E, valid_T, **given_))  # type: ignore[arg-type]
        assert found_TE.dtype == dtype


def test_the_operator_is_well_formed() -> None:
    scores_TE, valid_T = torch.rand(9, 4), torch.arange(9) != 3
    operator = torch.ops.moerouters_bip.online_prices.default
    for published in (False, True):
        torch.library.opcheck(operator, (scores_TE, torch.zeros(4), valid_T, torch.tensor(2.0), 2, published))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory", [0, 20])
def test_what_is_kept_is_what_the_next_token_would_have_gone_by(
    variant: str, memory: int, generator: torch.Generator
) -> None:
    router = OnlineBipRouter(Gating.sigmoid(6, 2), BipConfig(form="online", memory=memory, variant=variant))  # type: ignore[arg-type]
    for step in range(3):
        logits_TE = torch.randn(31, 6, generator=generator, dtype=torch.float64)
        valid_T = torch.arange(31) % 5 != 1
        weight = torch.tensor(float(memory if step else 0))
        expected_TE = online_prices(
            logits_TE.sigmoid(), router.dual_E, valid_T, top_k=2, memory=weight, variant=variant  # type: ignore[arg-type]
        )  # fmt: skip
        router.update(router(logits_TE[:30], RouteContext(valid_T=valid_T[:30])).stats)
        torch.testing.assert_close(router.dual_E, expected_TE[30].float())
        assert float(router.settled) == 1


def test_balances_the_first_batch_and_learns_for_the_next() -> None:
    router = OnlineBipRouter(Gating.softmax(16, 4), BipConfig(form="online"))
    recipe = Recipe(1024, 16, 4, "logits", 1.0)
    greedy = max_violation(router.eval()(recipe.scores(0)).load_E)
    first = router.train()(recipe.scores(0))
    router.update(first.stats)
    second = router(recipe.scores(0, batch=1))
    frozen = router.eval()(recipe.scores(0, batch=1))
    assert greedy > 1.5 and max_violation(first.load_E) < 0.2
    assert max_violation(second.load_E) < 0.15 and max_violation(frozen.load_E) < 0.3


def test_only_earlier_tokens_move_a_token(generator: torch.Generator) -> None:
    router = OnlineBipRouter(Gating.softmax(8, 2), BipConfig(form="online"))
    logits_TE = torch.randn(64, 8, generator=generator) + torch.linspace(-1, 1, 8)
    whole = router(logits_TE).expert_ids_TK
    other_TE = torch.cat([logits_TE[:40], -logits_TE[40:]])
    assert torch.equal(router(other_TE).expert_ids_TK[:40], whole[:40])
    earlier = router(torch.cat([-logits_TE[:40], logits_TE[40:]])).expert_ids_TK
    assert not torch.equal(earlier[40:], whole[40:])


def test_compiles_whole_and_equals_eager(generator: torch.Generator) -> None:
    router = OnlineBipRouter(Gating.softmax(8, 2), BipConfig(form="online"))
    logits_TE = torch.randn(24, 8, generator=generator)
    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")(logits_TE)
    eager = router(logits_TE)
    assert torch.equal(compiled.expert_ids, eager.expert_ids)
    assert torch.equal(compiled.stats["dual_times_tokens_E"], eager.stats["dual_times_tokens_E"])


def test_what_it_promises_and_refuses() -> None:
    gating = Gating.softmax(8, 2)
    router = build("bip", gating, config={"form": "online"})
    assert isinstance(router, OnlineBipRouter) and isinstance(bip_router(gating, BipConfig()), BipRouter)
    promised = router.capabilities
    assert promised.causal and promised.balance is None
    assert (promised.state, promised.load_scope) == (StateAlgebra.MEAN_OF_SOLVES, LoadScope.LOCAL)
    with pytest.raises(ConfigError, match="expert groups"):
        build("bip", Gating.softmax(8, 2, num_groups=4, kept_groups=2), config={"form": "online"})
    for settings_ in ({"form": "online", "iterations": 8}, {"form": "online", "scope": "exact"}, {"memory": 3}):
        with pytest.raises(ConfigError, match="leave"):
            build("bip", gating, config=settings_)


def test_memory_holds_q_back(generator: torch.Generator) -> None:
    scores_TE, valid_T = torch.rand(50, 6, generator=generator), torch.ones(50, dtype=torch.bool)
    dual_E = torch.linspace(-0.1, 0.1, 6)
    moved = [
        float((online_prices(scores_TE, dual_E, valid_T, top_k=2, memory=memory)[-1] - dual_E).abs().max())
        for memory in torch.tensor([0.0, 50.0, 1e6])
    ]
    assert moved[0] > 1.5 * moved[1] > 0 and moved[2] < 1e-4


def test_a_tensor_without_choices_moves_nothing() -> None:
    valid_T = torch.ones(4, dtype=torch.bool)
    dual_E = torch.tensor([0.2, -0.2, 0.0])
    for scores_TE, top_k in ((torch.rand(4, 3), 3), (torch.tensor([[0.5, 0.1, -math.inf]] * 4), 2)):
        found: Tensor = online_prices(scores_TE, dual_E, valid_T, top_k=top_k, memory=torch.tensor(0.0))
        assert torch.equal(found, dual_E.expand(4, 3))
