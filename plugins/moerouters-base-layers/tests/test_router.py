"""The router around the assignment: what it hands out in training and in eval, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from moerouters import Gating, MoELayer, RouteContext, attach
from moerouters.errors import ConfigError
from moerouters.metrics import max_violation
from moerouters_base_layers import BaseLayersConfig, BaseLayersRouter
from moerouters_base_layers.plugin import moerouters_routers

MAKERS = [Gating.softmax, Gating.sigmoid, Gating.sqrtsoftplus, Gating.softmax_after_topk]


def skewed_logits(T: int, E: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(T, E, generator=generator) + torch.linspace(-1.5, 1.5, E)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("T", "E", "top_k"), [(256, 8, 2), (61, 16, 3), (7, 5, 1)])
def test_loads_are_the_floor_or_the_ceiling(
    make: object, T: int, E: int, top_k: int, generator: torch.Generator
) -> None:
    router = BaseLayersRouter(make(E, top_k))  # type: ignore[operator]
    load_E = router(skewed_logits(T, E, generator)).validate().load_E
    assert int(load_E.sum()) == T * top_k
    assert set(load_E.tolist()) <= {T * top_k // E, -(-T * top_k // E)}


def test_weights_come_from_unadjusted_scores_and_slots_fall(generator: torch.Generator) -> None:
    logits_TE = skewed_logits(64, 8, generator)
    out = BaseLayersRouter(Gating.sigmoid(8, 3, renormalize=False))(logits_TE)
    assert torch.equal(out.weights, logits_TE.sigmoid().gather(1, out.expert_ids_TK))
    assert bool((out.weights.diff(dim=1) <= 0).all())


def test_the_objective_is_the_sum_of_logits_or_of_scores(generator: torch.Generator) -> None:
    gating, logits_TE = Gating.sigmoid(8, 2), skewed_logits(64, 8, generator)
    totals = {}
    for objective in ("logits", "scores"):
        router = BaseLayersRouter(gating, BaseLayersConfig(objective=objective, rounds=100))
        ids_TK = router(logits_TE).expert_ids_TK
        totals[objective] = [float(values_TE.gather(1, ids_TK).sum()) for values_TE in (logits_TE, logits_TE.sigmoid())]
    assert totals["logits"][0] > totals["scores"][0]
    assert totals["scores"][1] > totals["logits"][1]


def test_a_correction_bias_takes_part_in_the_assignment(generator: torch.Generator) -> None:
    gating, logits_TE = Gating.sigmoid(8, 2, correction_bias=True), torch.randn(64, 8, generator=generator)
    router = BaseLayersRouter(gating)
    before = router(logits_TE).expert_ids_TK
    gating.correction_bias_E.copy_(torch.linspace(1, -1, 8))
    out = router(logits_TE).validate()
    # What is added to an expert for every token alike moves nothing as long as all have to be full, and does in eval.
    assert torch.equal(out.expert_ids_TK.sort(dim=1).values, before.sort(dim=1).values)
    assert max_violation(router.eval()(logits_TE).load_E) > 1


def test_eval_is_greedy_and_looks_at_one_token(generator: torch.Generator) -> None:
    router = BaseLayersRouter(Gating.softmax(8, 2)).eval()
    logits_TE = skewed_logits(64, 8, generator)
    whole = router(logits_TE)
    assert torch.equal(whole.expert_ids_TK, logits_TE.topk(2, dim=1).indices)
    assert torch.equal(whole.expert_ids_TK, torch.cat([router(row).expert_ids_TK for row in logits_TE.split(1)]))
    assert max_violation(whole.load_E) > 1 and whole.stats == {}


def test_training_is_not_causal(generator: torch.Generator) -> None:
    """The declaration must be true: later tokens do move earlier choices."""
    router = BaseLayersRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    changed_TE = torch.cat([logits_TE[:32], logits_TE[32:].flip(1)])
    assert not router.capabilities.causal
    assert not torch.equal(router(logits_TE).expert_ids_TK[:32], router(changed_TE).expert_ids_TK[:32])


def test_padding_and_broken_tokens_take_no_place(generator: torch.Generator) -> None:
    router = BaseLayersRouter(Gating.sigmoid(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    logits_TE[3], logits_TE[9, 1] = float("inf"), float("nan")
    valid_T = torch.arange(64) < 50
    out = router(logits_TE, RouteContext(valid_T=valid_T))
    counted_T = valid_T & torch.isfinite(logits_TE).all(dim=1)
    alone = router(logits_TE[counted_T])
    assert torch.equal(out.expert_ids_TK[counted_T], alone.expert_ids_TK)
    assert (out.expert_ids_TK[~counted_T] == 8).all() and torch.equal(out.load_E, alone.load_E)
    assert (int(out.tokens), int(out.nonfinite)) == (48, 2)


@pytest.mark.parametrize(("T", "E", "top_k"), [(0, 4, 2), (1, 8, 2), (3, 8, 2), (5, 4, 4), (7, 1, 1)])
def test_small_shapes(T: int, E: int, top_k: int, generator: torch.Generator) -> None:
    out = BaseLayersRouter(Gating.softmax(E, top_k))(torch.randn(T, E, generator=generator)).validate()
    assert int(out.load_E.sum()) == T * top_k and int(out.load_E.max() - out.load_E.min()) <= 1


def test_compiles_whole_and_equals_eager(generator: torch.Generator) -> None:
    router = BaseLayersRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")(logits_TE)
    assert torch.equal(compiled.expert_ids, router(logits_TE).expert_ids)


def test_trains_inside_a_layer_and_balances_every_step(generator: torch.Generator) -> None:
    layer = MoELayer(BaseLayersRouter(Gating.sigmoid(8, 2)), hidden_size=16, expert_size=8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = attach(optimizer, layer)
    for _ in range(2):
        layer(torch.randn(128, 16, generator=generator) + 0.5).hidden.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert handle.loads[""].tolist() == [32] * 8


def test_expert_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot keep to expert groups"):
        BaseLayersRouter(Gating.sigmoid(8, 2, num_groups=4, kept_groups=2))
    BaseLayersRouter(Gating.sigmoid(8, 2, num_groups=4, kept_groups=4))


def test_spec_and_config() -> None:
    (spec,) = moerouters_routers()
    assert spec.name == "base-layers" and spec.capabilities == spec.factory(Gating.softmax(4, 2)).capabilities
    assert isinstance(spec.factory(Gating.softmax(4, 2), spec.config()), BaseLayersRouter)
    with pytest.raises(ValidationError, match="rounds"):
        BaseLayersConfig(rounds=-1)
