"""Every probe's assignment can be recorded, saved, and forced again: same experts, same weights, nothing learned."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moerouters import AssignmentKind, MoELayer, RouteContext, Router, RoutingTrace, record, replay
from support.assignments import weights_by_pair

from .probes import HIDDEN_SIZE, PROBES
from .test_contract import T, full_context, random_logits, trained


@pytest.fixture(params=PROBES.values(), ids=PROBES.keys())
def router(request: pytest.FixtureRequest) -> Router:
    return trained(request.param())


def test_forced_ids_give_the_same_experts_and_weights(router: Router, tmp_path: Path) -> None:
    logits_TE, ctx = random_logits(), replace(full_context(), valid_T=torch.arange(T) % 5 != 4)
    first = router(logits_TE, ctx)
    record({"layer": first}).save(tmp_path / "trace.safetensors")
    forced = replay(RoutingTrace.load(tmp_path / "trace.safetensors"), "layer", ctx=ctx)
    again = router(logits_TE, forced).validate()
    assert again.kind is AssignmentKind.SLOTS
    assert not again.stats
    assert weights_by_pair(again) == weights_by_pair(first)
    assert torch.equal(again.load_E, first.load_E)
    assert again.losses.keys() == first.losses.keys()
    for name, loss in first.losses.items():
        torch.testing.assert_close(again.losses[name], loss, rtol=1e-6, atol=1e-8)


def test_a_recompute_with_forced_ids_gives_the_bits_of_the_first_pass(router: Router) -> None:
    """Hidden states, and the gradient of gate and experts: what a framework with its own recompute needs."""
    torch.manual_seed(0)
    layer = MoELayer(router, hidden_size=HIDDEN_SIZE, expert_size=4)
    x_TD = torch.randn(T, HIDDEN_SIZE)
    ctx = replace(full_context(), hidden_TD=None)

    def run(context: RouteContext) -> tuple[list[torch.Tensor], torch.Tensor]:
        hidden, assignment = layer(x_TD, context)
        ids_TK = assignment.with_slots()[0]
        trained_parameters = [layer.gate.weight, *layer.experts.parameters()]
        return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), trained_parameters)], ids_TK

    first, ids_TK = run(ctx)
    again, _ = run(replace(ctx, forced_ids_TK=ids_TK))
    if router.capabilities.assignment is not AssignmentKind.SLOTS:  # summed in another order
        for recomputed, original in zip(again, first, strict=True):
            torch.testing.assert_close(recomputed, original)
    else:
        assert all(map(torch.equal, again, first))


def test_weights_follow_the_logits_of_today(router: Router) -> None:
    """Only the ids are forced: the gate still learns."""
    ids_TK = router(random_logits(), full_context()).with_slots()[0]
    logits_TE = random_logits(seed=50).requires_grad_()
    assignment = router(logits_TE, replace(full_context(), forced_ids_TK=ids_TK))
    expected_TK = router.gating.weigh(router.gating.score(logits_TE), ids_TK)
    torch.testing.assert_close(assignment.weights, expected_TK)
    (gradient_TE,) = torch.autograd.grad(assignment.weights.square().sum(), logits_TE)
    assert bool((gradient_TE != 0).any())
