"""The router around the dual: what it keeps, what it reports, what it declares."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from moerouters import Gating, MoELayer, RouteContext, attach
from moerouters.metrics import max_violation
from moerouters_bip import BipConfig, BipRouter
from moerouters_bip.plugin import moerouters_routers


def skewed_logits(T: int, E: int, generator: torch.Generator, popularity_E: torch.Tensor | None = None) -> torch.Tensor:
    popularity_E = torch.linspace(-1.5, 1.5, E) if popularity_E is None else popularity_E
    return torch.randn(T, E, generator=generator) + popularity_E


def route(router: BipRouter, logits_TE: torch.Tensor, **ctx: torch.Tensor) -> torch.Tensor:
    return router(logits_TE, RouteContext(**ctx)).validate().load_E  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [Gating.softmax, Gating.sigmoid, Gating.sqrtsoftplus, Gating.softmax_after_topk])
@pytest.mark.parametrize("T", [512, 509])
def test_balances_the_very_first_batch(make: object, T: int, generator: torch.Generator) -> None:
    gating = make(16, 4)  # type: ignore[operator]
    logits_TE = skewed_logits(T, 16, generator)
    greedy = BipRouter(gating).eval()
    assert max_violation(route(greedy, logits_TE)) > 0.9
    assert max_violation(route(BipRouter(gating, BipConfig(iterations=8)), logits_TE)) < 0.05


def test_weights_come_from_unadjusted_scores(generator: torch.Generator) -> None:
    router = BipRouter(Gating.sigmoid(8, 2, renormalize=False))
    logits_TE = skewed_logits(64, 8, generator)
    out = router(logits_TE)
    assert torch.equal(out.weights, logits_TE.sigmoid().gather(1, out.expert_ids_TK))


def test_update_takes_the_token_weighted_mean_of_the_solves(generator: torch.Generator) -> None:
    router = BipRouter(Gating.softmax(8, 2))
    parts = skewed_logits(96, 8, generator).split([64, 32])
    stats = [router(part).stats for part in parts]
    assert torch.equal(router.dual_E, torch.zeros(8)), "forward must not write"
    duals = [s["dual_times_tokens_E"] / s["tokens"] for s in stats]
    router.update({name: stats[0][name] + stats[1][name] for name in stats[0]})
    torch.testing.assert_close(router.dual_E, ((2 * duals[0] + duals[1]) / 3).float())
    assert [int(s["tokens"]) for s in stats] == [64, 32]


def test_update_without_tokens_keeps_the_dual() -> None:
    router = BipRouter(Gating.softmax(4, 2))
    router.dual_E.copy_(torch.tensor([0.1, -0.1, 0.2, -0.2]))
    before = router.dual_E.clone()
    router.update(router(torch.zeros(0, 4)).stats)
    assert torch.equal(router.dual_E, before)


def test_eval_uses_the_committed_dual_token_by_token(generator: torch.Generator) -> None:
    router = BipRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    router.update(router(logits_TE).stats)
    router.eval()
    whole = router(logits_TE).expert_ids_TK
    single = torch.cat([router(row).expert_ids_TK for row in logits_TE.split(1)])
    assert torch.equal(whole, single)
    assert router(logits_TE).stats == {}


def test_training_is_not_causal_and_eval_is(generator: torch.Generator) -> None:
    """The declaration must be true both ways: later tokens do move earlier choices in training."""
    router = BipRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    changed_TE = logits_TE.clone()
    changed_TE[32:] = skewed_logits(32, 8, generator, popularity_E=torch.linspace(2, -2, 8))
    moved = router(logits_TE).expert_ids_TK[:32] != router(changed_TE).expert_ids_TK[:32]
    assert moved.any() and not router.capabilities.causal
    router.eval()
    assert torch.equal(router(logits_TE).expert_ids_TK[:32], router(changed_TE).expert_ids_TK[:32])


def test_padding_changes_nothing(generator: torch.Generator) -> None:
    router = BipRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(48, 8, generator)
    garbage_TE = 100 * torch.randn(16, 8, generator=generator)
    valid_T = torch.arange(64) < 48
    padded = router(torch.cat([logits_TE, garbage_TE]), RouteContext(valid_T=valid_T)).validate()
    plain = router(logits_TE)
    assert torch.equal(padded.expert_ids_TK[:48], plain.expert_ids_TK)
    assert (padded.expert_ids_TK[48:] == 8).all()
    for name, value in plain.stats.items():
        torch.testing.assert_close(padded.stats[name], value)


def test_non_finite_tokens_do_not_poison_the_dual(generator: torch.Generator) -> None:
    router = BipRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    logits_TE[3, 1], logits_TE[9, 0] = float("nan"), float("inf")
    out = router(logits_TE)
    assert int(out.nonfinite) == 2 and int(out.stats["tokens"]) == 62
    assert torch.isfinite(out.stats["dual_times_tokens_E"]).all()


def test_groups_are_respected_and_balanced(generator: torch.Generator) -> None:
    gating = Gating.sigmoid(16, 4, num_groups=4, kept_groups=2, group_score="top2_sum")
    router = BipRouter(gating, BipConfig(iterations=14))
    out = router(skewed_logits(512, 16, generator)).validate()
    groups_TK = out.expert_ids_TK // 4
    assert max(len(set(row)) for row in groups_TK.tolist()) <= 2
    assert max_violation(out.load_E) < 0.25 and int(out.load_E.min()) > 64


@pytest.mark.parametrize(("T", "E", "K"), [(1, 8, 2), (3, 8, 2), (5, 4, 4), (7, 1, 1)])
def test_small_shapes(T: int, E: int, K: int, generator: torch.Generator) -> None:
    out = BipRouter(Gating.softmax(E, K))(torch.randn(T, E, generator=generator)).validate()
    assert int(out.load_E.sum()) == T * K


def test_compiles_whole_and_equals_eager(generator: torch.Generator) -> None:
    router = BipRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")(logits_TE)
    eager = router(logits_TE)
    assert torch.equal(compiled.expert_ids, eager.expert_ids)
    torch.testing.assert_close(compiled.stats["dual_times_tokens_E"], eager.stats["dual_times_tokens_E"])


def test_published_variant_drifts_on_softmax_scores_and_centred_does_not(generator: torch.Generator) -> None:
    """60 batches, E = 16, K = 4, strong skew: the mean MaxVio of the last ten (the README quotes this test)."""
    popularity_E = torch.randn(16, generator=generator)
    last: dict[str, float] = {}
    for variant in ("centred", "published"):
        router = BipRouter(Gating.softmax(16, 4), BipConfig(variant=variant))  # type: ignore[arg-type]
        drawn = torch.Generator().manual_seed(7)
        violations = []
        for _ in range(60):
            out = router(skewed_logits(2048, 16, drawn, popularity_E))
            router.update(out.stats)
            violations.append(float(max_violation(out.load_E)))
        last[variant] = sum(violations[-10:]) / 10
    assert last["centred"] < 0.02
    assert last["published"] > 5 * last["centred"]


def test_trains_inside_a_layer(generator: torch.Generator) -> None:
    layer = MoELayer(BipRouter(Gating.softmax(8, 2)), hidden_size=16, expert_size=8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = attach(optimizer, layer)
    for _ in range(2):
        x_TD = torch.randn(256, 16, generator=generator)
        layer(x_TD).hidden.pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert max_violation(handle.loads[""]) < 0.1
    assert layer.router.dual_E.abs().sum() > 0


def test_spec_and_config() -> None:
    spec, other = moerouters_routers()
    assert (spec.name, other.name) == ("bip", "quantile")
    assert spec.capabilities == spec.factory(Gating.softmax(4, 2)).capabilities
    assert isinstance(spec.factory(Gating.softmax(4, 2), spec.config()), BipRouter)
    with pytest.raises(ValidationError, match="iterations"):
        BipConfig(iterations=0)
    with pytest.raises(ValidationError, match="temperature"):
        BipConfig(temperature=1.0)  # type: ignore[call-arg]
