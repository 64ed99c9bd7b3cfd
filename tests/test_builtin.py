"""The built-in router: the K largest scores, and nothing else."""

import torch

from moerouters import Gating, RouteContext
from moerouters.builtin import TopKRouter, moerouters_routers
from support.oracles import top_ids


def test_topk_takes_the_largest_scores() -> None:
    logits_TE = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    assignment = TopKRouter(Gating.softmax(6, 2))(logits_TE, RouteContext()).validate()
    assert assignment.expert_ids.tolist() == [top_ids(row, 2) for row in logits_TE.tolist()]
    assert not assignment.losses
    assert not assignment.stats


def test_it_is_offered_through_the_hook_of_every_plugin() -> None:
    (spec,) = moerouters_routers()
    assert spec.name == "topk"
    router = spec.factory(Gating.softmax(6, 2), spec.config())
    assert isinstance(router, TopKRouter)
    assert router.capabilities == spec.capabilities
