"""The router around the choice: what it hands out, what it learns, and what it does in eval."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from moerouters import Assignment, AssignmentKind, Gating, MoELayer, RouteContext, StateAlgebra, attach
from moerouters.metrics import max_violation
from moerouters_expert_choice import ExpertChoiceConfig, ExpertChoiceRouter
from moerouters_expert_choice.plugin import moerouters_routers

MAKERS = [Gating.softmax, Gating.sigmoid, Gating.sqrtsoftplus, Gating.softmax_after_topk]


def skewed_logits(T: int, E: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(T, E, generator=generator) + torch.linspace(-1.5, 1.5, E)


def chosen_TE(assignment: Assignment) -> torch.Tensor:
    """bool [T, E]."""
    ids_TK, _ = assignment.with_slots()
    T, E = assignment.num_tokens, assignment.num_experts
    return torch.zeros(T, E + 1, dtype=torch.bool).scatter(1, ids_TK, True)[:, :E]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("T", "E", "top_k", "capacity"), [(256, 8, 2, 1.0), (61, 16, 3, 1.25), (40, 5, 1, 2.0)])
def test_every_expert_takes_the_same_number(
    make: object, T: int, E: int, top_k: int, capacity: float, generator: torch.Generator
) -> None:
    router = ExpertChoiceRouter(make(E, top_k), ExpertChoiceConfig(capacity=capacity))  # type: ignore[operator]
    out = router(skewed_logits(T, E, generator)).validate()
    assert out.load_E.tolist() == [int(T * top_k * capacity) // E] * E
    assert out.kind is AssignmentKind.PAIRS and out.expert_ids.shape == (int(out.load_E.sum()),)


def test_places_past_what_padding_leaves_are_empty(generator: torch.Generator) -> None:
    """The host knows T and makes room for it; how many tokens count is known on the device alone."""
    router = ExpertChoiceRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    valid_T = torch.arange(64) % 2 == 0
    padded = router(logits_TE, RouteContext(valid_T=valid_T)).validate()
    assert padded.expert_ids.shape == (8 * 16,) and padded.load_E.tolist() == [8] * 8
    assert torch.equal(chosen_TE(padded)[valid_T], chosen_TE(router(logits_TE[valid_T])))
    assert not bool(chosen_TE(padded)[~valid_T].any())


def test_paper_weights_are_the_plain_scores(generator: torch.Generator) -> None:
    logits_TE = skewed_logits(64, 8, generator)
    out = ExpertChoiceRouter(Gating.softmax(8, 2, renormalize=False))(logits_TE)
    assert out.token_ids_N is not None
    torch.testing.assert_close(out.weights, logits_TE.softmax(dim=1)[out.token_ids_N, out.expert_ids])


def test_a_renormalised_token_with_one_expert_trains_no_gate(generator: torch.Generator) -> None:
    """Why the README says renormalize=False."""
    logits_TE = skewed_logits(64, 8, generator)
    lonely_T = chosen_TE(ExpertChoiceRouter(Gating.softmax(8, 2))(logits_TE)).sum(dim=1) == 1
    assert int(lonely_T.sum()) > 5
    for renormalize in (True, False):
        router = ExpertChoiceRouter(Gating.softmax(8, 2, renormalize=renormalize))
        leaf_TE = logits_TE.clone().requires_grad_()
        _, weights_TK = router(leaf_TE).with_slots()
        (weights_TK.sum(dim=1)[lonely_T]).sum().backward()
        assert leaf_TE.grad is not None
        assert bool((leaf_TE.grad[lonely_T].abs() < 1e-6).all()) is renormalize


def test_eval_is_top_k_before_anything_was_learned(generator: torch.Generator) -> None:
    router = ExpertChoiceRouter(Gating.softmax(8, 2)).eval()
    logits_TE = skewed_logits(64, 8, generator)
    out = router(logits_TE).validate()
    assert out.kind is AssignmentKind.SLOTS and out.expert_ids.shape == (64, 6)
    assert torch.equal(out.expert_ids[:, :2], logits_TE.topk(2, dim=1).indices)
    assert bool((out.expert_ids[:, 2:] == 8).all())


def test_thresholds_take_what_experts_would(generator: torch.Generator) -> None:
    router = ExpertChoiceRouter(Gating.softmax(8, 2))
    for _ in range(20):
        router.update(router(skewed_logits(512, 8, generator)).stats)
    logits_TE = skewed_logits(2048, 8, generator)
    choice_TE, threshold_TE = chosen_TE(router(logits_TE)), chosen_TE(router.eval()(logits_TE).validate())
    assert float((choice_TE & threshold_TE).sum() / choice_TE.sum()) > 0.95
    assert max_violation(router(logits_TE).load_E) < 0.1
    # One token at a time it goes the same way.
    assert torch.equal(torch.cat([chosen_TE(router(row)) for row in logits_TE[:32].split(1)]), threshold_TE[:32])


def test_update_is_a_moving_mean_weighted_by_tokens(generator: torch.Generator) -> None:
    router = ExpertChoiceRouter(Gating.sigmoid(8, 2), ExpertChoiceConfig(memory=0.75))
    parts = skewed_logits(96, 8, generator).split([64, 32])
    stats = [router(part).stats for part in parts]
    assert torch.equal(router.threshold_E, torch.zeros(8)), "forward must not write"
    first, second = (s["threshold_times_tokens_E"] / s["tokens"] for s in stats)
    router.update({name: stats[0][name] + stats[1][name] for name in stats[0]})
    mean_E = (2 * first + second) / 3
    torch.testing.assert_close(router.threshold_E / router.learned, mean_E.float())
    router.update(stats[1])
    torch.testing.assert_close(
        router.threshold_E / router.learned, ((0.75 * mean_E + second) / 1.75).float(), rtol=1e-5, atol=1e-6
    )
    before = {name: value.clone() for name, value in router.state_dict().items()}
    router.update(router(torch.zeros(0, 8)).stats)
    assert all(torch.equal(router.state_dict()[name], value) for name, value in before.items())


def test_most_bounds_the_experts_of_a_token(generator: torch.Generator) -> None:
    router = ExpertChoiceRouter(Gating.sigmoid(8, 1), ExpertChoiceConfig(most=2))
    router.update(router(skewed_logits(64, 8, generator)).stats)
    out = router.eval()(torch.full((1, 8), 9.0) + torch.arange(8) / 8).validate()
    assert out.expert_ids.tolist() == [[7, 6]]


def test_everybody_takes_everything_where_the_share_is_one(generator: torch.Generator) -> None:
    for gating, capacity in ((Gating.softmax(4, 4), 1.0), (Gating.softmax(4, 2), 5.0), (Gating.softmax(1, 1), 1.0)):
        router = ExpertChoiceRouter(gating, ExpertChoiceConfig(capacity=capacity))
        logits_TE = torch.randn(9, gating.num_experts, generator=generator)
        out = router(logits_TE).validate()
        assert bool(chosen_TE(out).all())
        router.update(out.stats)
        assert bool(chosen_TE(router.eval()(logits_TE - 3)).all())


def test_expert_groups_are_kept_and_bound_nothing(generator: torch.Generator) -> None:
    router = ExpertChoiceRouter(Gating.sigmoid(16, 4, num_groups=4, kept_groups=2, group_score="top2_sum"))
    assert router.capabilities.balance is None
    out = router(skewed_logits(512, 16, generator)).validate()
    groups_TG = chosen_TE(out).reshape(512, 4, 4).any(dim=2)
    assert int(groups_TG.sum(dim=1).max()) <= 2
    assert int(out.load_E.max()) <= 128 and all(torch.isfinite(s).all() for s in out.stats.values())


def test_broken_tokens_go_nowhere(generator: torch.Generator) -> None:
    router = ExpertChoiceRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    logits_TE[3, 1], logits_TE[9, 0] = float("nan"), float("inf")
    out = router(logits_TE).validate()
    assert int(out.nonfinite) == 2 and int(out.stats["tokens"]) == 62
    assert not bool(chosen_TE(out)[[3, 9]].any())
    assert bool(torch.isfinite(out.stats["threshold_times_tokens_E"]).all())


def test_choice_in_eval_keeps_no_state(generator: torch.Generator) -> None:
    router = ExpertChoiceRouter(Gating.softmax(8, 2), ExpertChoiceConfig(eval="choice"))
    assert router.capabilities.state is StateAlgebra.STATELESS and not router.state_names()
    assert not router.capabilities.eval_batch_invariant
    logits_TE = skewed_logits(64, 8, generator)
    training = router(logits_TE)
    assert training.stats == {} and torch.equal(router.eval()(logits_TE).expert_ids, training.expert_ids)


def test_compiles_whole_and_equals_eager(generator: torch.Generator) -> None:
    router = ExpertChoiceRouter(Gating.softmax(8, 2))
    logits_TE = skewed_logits(64, 8, generator)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")(logits_TE)
    eager = router(logits_TE)
    assert torch.equal(compiled.expert_ids, eager.expert_ids) and torch.equal(compiled.token_ids_N, eager.token_ids_N)


def test_trains_inside_a_layer_and_serves_token_by_token(generator: torch.Generator) -> None:
    layer = MoELayer(ExpertChoiceRouter(Gating.softmax(8, 2, renormalize=False)), hidden_size=16, expert_size=8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    handle = attach(optimizer, layer)
    for _ in range(3):
        layer(torch.randn(128, 16, generator=generator) + 0.5).hidden.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert handle.loads[""].tolist() == [32] * 8
    layer.eval()
    with torch.no_grad():
        x_TD = torch.randn(16, 16, generator=generator) + 0.5
        whole_TD = layer(x_TD).hidden
        torch.testing.assert_close(torch.cat([layer(row).hidden for row in x_TD.split(1)]), whole_TD)
    assert bool(whole_TD.any())


def test_spec_and_config() -> None:
    (spec,) = moerouters_routers()
    assert spec.name == "expert-choice" and spec.capabilities == spec.factory(Gating.softmax(4, 2)).capabilities
    assert isinstance(spec.factory(Gating.softmax(4, 2), spec.config()), ExpertChoiceRouter)
    for wrong in ({"capacity": 0}, {"memory": 1}, {"most": 0}, {"eval": "greedy"}, {"k": 2}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            ExpertChoiceConfig(**wrong)
