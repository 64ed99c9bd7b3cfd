"""The router around the plan: what it keeps, what it reports, what it does in eval."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from moerouters import Gating, MoELayer, RouteContext, StateAlgebra, attach
from moerouters.metrics import max_violation
from moerouters_sinkhorn import SinkhornConfig, SinkhornRouter
from moerouters_sinkhorn.plugin import moerouters_routers

MAKERS = [Gating.softmax, Gating.sigmoid, Gating.sqrtsoftplus, Gating.softmax_after_topk]


def skewed_logits(T: int, E: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(T, E, generator=generator) + torch.linspace(-1.5, 1.5, E)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("T", [512, 509])
def test_balances_the_very_first_batch(make: object, T: int, generator: torch.Generator) -> None:
    gating = make(16, 4)  # type: ignore[operator]
    logits_TE = skewed_logits(T, 16, generator)
    assert max_violation(SinkhornRouter(gating).eval()(logits_TE).load_E) > 0.9
    out = SinkhornRouter(gating)(logits_TE).validate()
    assert max_violation(out.load_E) < 0.2
    # All of these gatings give the same order of experts, so Sinkhorn on logits chooses alike.
    assert torch.equal(out.load_E, SinkhornRouter(Gating.softmax(16, 4))(logits_TE).load_E)


def test_a_correction_bias_of_the_model_is_balanced_as_well(generator: torch.Generator) -> None:
    gating = Gating.sigmoid(16, 4, correction_bias=True)
    gating.correction_bias_E.copy_(torch.linspace(0.3, -0.3, 16))
    logits_TE = torch.randn(512, 16, generator=generator)
    assert max_violation(SinkhornRouter(gating).eval()(logits_TE).load_E) > 1
    out = SinkhornRouter(gating)(logits_TE).validate()
    assert max_violation(out.load_E) < 0.3
    scores_TE = logits_TE.sigmoid().gather(1, out.expert_ids_TK)
    torch.testing.assert_close(out.weights, scores_TE / scores_TE.sum(dim=1, keepdim=True))


def test_weights_come_from_unadjusted_scores(generator: torch.Generator) -> None:
    logits_TE = skewed_logits(64, 8, generator)
    out = SinkhornRouter(Gating.sigmoid(8, 2, renormalize=False))(logits_TE)
    assert torch.equal(out.weights, logits_TE.sigmoid().gather(1, out.expert_ids_TK))


def test_the_choice_is_top_k_of_logits_less_potentials(generator: torch.Generator) -> None:
    logits_TE = skewed_logits(64, 8, generator).double()
    router = SinkhornRouter(Gating.softmax(8, 2))
    out = router(logits_TE)
    potential_E = out.stats["potential_times_tokens_E"] / out.stats["tokens"]
    assert torch.equal(out.expert_ids_TK, (logits_TE - potential_E).topk(2, dim=1).indices)


def test_update_takes_the_token_weighted_mean_of_the_solves(generator: torch.Generator) -> None:
    router = SinkhornRouter(Gating.softmax(8, 2))
    parts = skewed_logits(96, 8, generator).split([64, 32])
    stats = [router(part).stats for part in parts]
    assert torch.equal(router.potential_E, torch.zeros(8)), "forward must not write"
    first, second = (s["potential_times_tokens_E"] / s["tokens"] for s in stats)
    router.update({name: stats[0][name] + stats[1][name] for name in stats[0]})
    torch.testing.assert_close(router.potential_E, ((2 * first + second) / 3).float())
    before = router.potential_E.clone()
    router.update(router(torch.zeros(0, 8)).stats)
    assert torch.equal(router.potential_E, before)


def share_alike(left_TK: torch.Tensor, right_TK: torch.Tensor) -> float:
    """Share of the pairs on the left that stand on the right as well."""
    return float((left_TK.unsqueeze(2) == right_TK.unsqueeze(1)).any(dim=2).double().mean())


def test_eval_by_potentials_chooses_as_training_and_stays_balanced(generator: torch.Generator) -> None:
    router = SinkhornRouter(Gating.softmax(16, 4))
    router.update(router(skewed_logits(2048, 16, generator)).stats)
    logits_TE = skewed_logits(2048, 16, generator)
    trained_TK, served = router(logits_TE).expert_ids_TK, router.eval()(logits_TE)
    assert share_alike(trained_TK, served.expert_ids_TK) > 0.95
    assert max_violation(served.load_E) < 0.2
    one_by_one = torch.cat([router(row).expert_ids_TK for row in logits_TE[:9].split(1)])
    assert torch.equal(one_by_one, served.expert_ids_TK[:9])


def test_plain_eval_does_neither(generator: torch.Generator) -> None:
    router = SinkhornRouter(Gating.softmax(16, 4), SinkhornConfig(eval="plain"))
    logits_TE = skewed_logits(2048, 16, generator)
    trained_TK, served = router(logits_TE).expert_ids_TK, router.eval()(logits_TE)
    assert torch.equal(served.expert_ids_TK, logits_TE.topk(4, dim=1).indices)
    assert share_alike(trained_TK, served.expert_ids_TK) < 0.75
    assert max_violation(served.load_E) > 0.9


def test_plain_eval_keeps_no_state() -> None:
    router = SinkhornRouter(Gating.softmax(8, 2), SinkhornConfig(eval="plain"))
    assert router.capabilities.state is StateAlgebra.STATELESS and not router.state_names()
    assert router(torch.zeros(4, 8)).stats == {}


def test_training_is_not_causal(generator: torch.Generator) -> None:
    router = SinkhornRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    changed_TE = torch.cat([logits_TE[:32], logits_TE[32:].flip(1)])
    assert not router.capabilities.causal
    assert not torch.equal(router(logits_TE).expert_ids_TK[:32], router(changed_TE).expert_ids_TK[:32])


def test_padding_and_broken_tokens_change_nothing(generator: torch.Generator) -> None:
    router = SinkhornRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    logits_TE[3, 1], logits_TE[9] = float("nan"), float("inf")
    valid_T = torch.arange(64) < 48
    counted_T = valid_T & torch.isfinite(logits_TE).all(dim=1)
    out, alone = router(logits_TE, RouteContext(valid_T=valid_T)), router(logits_TE[counted_T])
    assert torch.equal(out.expert_ids_TK[counted_T], alone.expert_ids_TK)
    assert (out.expert_ids_TK[~valid_T] == 8).all()
    for name, value in alone.stats.items():  # float64 sums of what was solved in float32, in another order
        torch.testing.assert_close(out.stats[name].float(), value.float(), rtol=1e-5, atol=1e-5)


def test_groups_are_kept(generator: torch.Generator) -> None:
    gating = Gating.sigmoid(16, 4, num_groups=4, kept_groups=2, group_score="top2_sum")
    out = SinkhornRouter(gating)(skewed_logits(512, 16, generator)).validate()
    assert max(len(set(row)) for row in (out.expert_ids_TK // 4).tolist()) <= 2
    assert max_violation(out.load_E) < 0.2  # 2.1 without Sinkhorn


@pytest.mark.parametrize(("T", "E", "top_k"), [(0, 4, 2), (1, 8, 2), (3, 8, 2), (5, 4, 4), (7, 1, 1)])
def test_small_shapes(T: int, E: int, top_k: int, generator: torch.Generator) -> None:
    out = SinkhornRouter(Gating.softmax(E, top_k))(torch.randn(T, E, generator=generator)).validate()
    assert int(out.load_E.sum()) == T * top_k


def test_compiles_whole_and_equals_eager(generator: torch.Generator) -> None:
    router = SinkhornRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")(logits_TE)
    eager = router(logits_TE)
    assert torch.equal(compiled.expert_ids, eager.expert_ids)
    torch.testing.assert_close(compiled.stats["potential_times_tokens_E"], eager.stats["potential_times_tokens_E"])


def test_trains_inside_a_layer(generator: torch.Generator) -> None:
    layer = MoELayer(SinkhornRouter(Gating.softmax(8, 2)), hidden_size=16, expert_size=8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = attach(optimizer, layer)
    for _ in range(2):
        layer(torch.randn(512, 16, generator=generator) + 0.5).hidden.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert max_violation(handle.loads[""]) < 0.3
    assert isinstance(layer.router, SinkhornRouter) and bool(layer.router.potential_E.any())


def test_a_bound_is_declared_where_it_was_measured() -> None:
    assert SinkhornRouter(Gating.softmax(8, 2)).capabilities.balance is not None
    for config in (SinkhornConfig(temperature=0.5), SinkhornConfig(iterations=3)):
        assert SinkhornRouter(Gating.softmax(8, 2), config).capabilities.balance is None


def test_spec_and_config() -> None:
    (spec,) = moerouters_routers()
    assert spec.name == "sinkhorn" and spec.capabilities == spec.factory(Gating.softmax(4, 2)).capabilities
    assert isinstance(spec.factory(Gating.softmax(4, 2), spec.config()), SinkhornRouter)
    for wrong in ({"iterations": 0}, {"temperature": 0.0}, {"eval": "greedy"}, {"epsilon": 1.0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            SinkhornConfig(**wrong)
