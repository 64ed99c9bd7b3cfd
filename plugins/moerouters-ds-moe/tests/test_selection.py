"""Who is active at inference, against loops over tokens and experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters import AssignmentKind, Gating, RouteContext
from moerouters_ds_moe.config import DsMoeConfig
from moerouters_ds_moe.router import DsMoeRouter
from moerouters_ds_moe.selection import most_passing

E = 5


def by_loop(rows: list[list[float]], config: DsMoeConfig, valid: list[bool], top_k: int) -> list[list[int]]:
    """Experts of each token, best first; rows are probabilities."""
    falling = [sorted(range(E), key=lambda e: (-row[e], e)) for row in rows]
    passing = [
        [e for e in order if row[e] * E > config.eps] or order[:1] for row, order in zip(rows, falling, strict=True)
    ]
    if config.inference == "threshold":
        chosen = passing
    elif config.inference == "top_k":
        chosen = [order[: config.top_k or top_k] for order in falling]
    else:
        counts = [len(experts) for experts, real in zip(passing, valid, strict=True) if real]
        average = int(sum(counts) / len(counts) + 0.5) if counts else 0
        chosen = [order[:average] for order in falling]
    return [experts if real else [] for experts, real in zip(chosen, valid, strict=True)]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_equals_the_loop(data: st.DataObject) -> None:
    T = data.draw(st.integers(0, 6))
    values = st.sampled_from([-6.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0])
    logits_TE = torch.tensor(data.draw(st.lists(values, min_size=T * E, max_size=T * E))).double().reshape(T, E)
    valid = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    config = DsMoeConfig(
        inference=data.draw(st.sampled_from(["threshold", "top_k", "threshold_top_k"])),
        eps=data.draw(st.sampled_from([0.0, 0.48, 1.1, 1.9, 7.0])),
        top_k=data.draw(st.none() | st.integers(1, E)),
    )
    router = DsMoeRouter(Gating.softmax(E, 2, renormalize=False), config).eval()
    assignment = router(logits_TE, RouteContext(valid_T=torch.tensor(valid, dtype=torch.bool))).validate()
    p_TE = logits_TE.softmax(dim=-1)
    expected = by_loop(p_TE.tolist(), config, valid, top_k=2)
    assert [[e for e in row if e < E] for row in assignment.expert_ids_TK.tolist()] == expected
    weights = [[w for w in row if w] for row in assignment.weights_TK.tolist()]
    assert weights == [[p_TE[t, e].item() for e in experts] for t, experts in enumerate(expected)]


@pytest.mark.parametrize(("eps", "width"), [(0.0, 5), (0.48, 5), (1.0, 5), (1.5, 3), (2.5, 2), (2.6, 1), (9.0, 1)])
def test_slots_are_as_many_as_can_be_filled(eps: float, width: int) -> None:
    """n experts above eps / E add up to more than n eps / E, and to 1 at most."""
    assert most_passing(eps, num_experts=E) == width
    router = DsMoeRouter(Gating.softmax(E, 2, renormalize=False), DsMoeConfig(eps=eps)).eval()
    assert router(torch.randn(7, E)).expert_ids_TK.shape == (7, width)


def test_a_token_that_no_expert_passes_gets_its_best() -> None:
    router = DsMoeRouter(Gating.softmax(E, 2, renormalize=False), DsMoeConfig(eps=4.0)).eval()
    assignment = router(torch.tensor([[0.0, 0.1, 0.0, 0.0, 0.0]]))
    assert assignment.expert_ids_TK.tolist() == [[1]]


@pytest.mark.parametrize("inference", ["threshold", "top_k", "threshold_top_k", "dense"])
def test_experts_of_other_groups_stay_empty(inference: str) -> None:
    gating = Gating.softmax(6, 2, num_groups=3, kept_groups=1, renormalize=False)
    router = DsMoeRouter(gating, DsMoeConfig(inference=inference, eps=0.0, top_k=4))
    for training in (True, False):
        assignment = router.train(training)(torch.tensor([[0.0, 0.0, 1.0, 0.5, 0.0, 0.0]])).validate()
        assert sorted(e for e in assignment.expert_ids.flatten().tolist() if e < 6) == [2, 3]


def test_kinds() -> None:
    logits_TE = torch.randn(3, E)
    for inference in ("threshold", "dense"):
        router = DsMoeRouter(Gating.softmax(E, 2), DsMoeConfig(inference=inference))
        assert router(logits_TE).kind is AssignmentKind.DENSE
        assert router.eval()(logits_TE).kind is (router.capabilities.eval_assignment or AssignmentKind.DENSE)


@pytest.mark.parametrize("gating", [Gating.softmax_after_topk(E, 2), Gating.sigmoid(E, 2, scale=2.5)])
def test_other_scores_are_shared_out(gating: Gating) -> None:
    """Thresholds look at probabilities, and the dense sum has the gating's weights for them."""
    logits_TE = torch.randn(8, E, generator=torch.Generator().manual_seed(0))
    router = DsMoeRouter(gating)
    dense = router(logits_TE)
    torch.testing.assert_close(dense.weights, gating.settings.scale * gating.probabilities(logits_TE))
    active = router.eval()(logits_TE).load_E
    assert torch.equal(active, (gating.probabilities(logits_TE) * E > 0.48).sum(dim=0))
