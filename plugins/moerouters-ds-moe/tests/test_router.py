"""The router's settings, losses and state; what it refuses."""

import pytest
import torch

import moerouters
from moerouters import Gating, LoadScope, RouteContext
from moerouters.errors import ConfigError
from moerouters_ds_moe.config import DsMoeConfig
from moerouters_ds_moe.router import DsMoeRouter, capabilities_of


def make(**config: object) -> DsMoeRouter:
    gating = Gating.softmax(4, 2, renormalize=False)
    router = moerouters.build("ds-moe", gating, config=config)
    assert isinstance(router, DsMoeRouter)
    return router


def test_training_is_dense_with_weights_that_are_scores() -> None:
    logits_TE = torch.randn(5, 4)
    valid_T = torch.tensor([True, False, True, True, True])
    assignment = make()(logits_TE, RouteContext(valid_T=valid_T)).validate()
    assert torch.equal(assignment.weights[valid_T], logits_TE.softmax(dim=-1)[valid_T])
    assert assignment.load_E.tolist() == [4] * 4


def test_renormalised_weights_are_the_same_in_training_and_shared_out_at_inference() -> None:
    logits_TE = torch.randn(5, 4, dtype=torch.float64)
    plain, renormalised = make(), DsMoeRouter(Gating.softmax(4, 2))
    torch.testing.assert_close(renormalised(logits_TE).weights, plain(logits_TE).weights, rtol=1e-14, atol=0)
    few, shared = plain.eval()(logits_TE).weights, renormalised.eval()(logits_TE).weights
    torch.testing.assert_close(shared, few / few.sum(dim=1, keepdim=True), rtol=1e-14, atol=0)


def test_the_loss_is_scaled_and_may_be_left_out() -> None:
    logits_TE = torch.randn(5, 4, dtype=torch.float64)
    one, two = (make(alpha=alpha)(logits_TE).losses["mutual_information"] for alpha in (0.5, 1.0))
    torch.testing.assert_close(two, 2 * one)
    assert not make(alpha=0)(logits_TE).losses
    assert not make().eval()(logits_TE).losses


def test_the_share_that_passes_is_counted() -> None:
    router = make(eps=1.0)
    assert router.passing_share.item() == 1
    logits_TE = torch.tensor([[5.0, 0, 0, 0], [5.0, 5.0, 0, 0], [9.0, 9.0, 9.0, 9.0]])
    valid_T = torch.tensor([True, True, False])
    router.update(router(logits_TE, RouteContext(valid_T=valid_T)).stats)
    assert router.passing_share.item() == pytest.approx(3 / 8)
    router.update(router(logits_TE[:0]).stats)  # a step without tokens
    assert router.passing_share.item() == pytest.approx(3 / 8)


def test_capabilities_follow_the_settings() -> None:
    assert capabilities_of(DsMoeConfig()).forward_collective
    assert not capabilities_of(DsMoeConfig(marginal="local")).forward_collective
    scopes = [capabilities_of(DsMoeConfig(alpha=a, marginal=m)).load_scope for a, m in ((0, "local"), (1, "local"))]
    assert scopes == [LoadScope.NONE, LoadScope.LOCAL]
    assert not capabilities_of(DsMoeConfig(alpha=0)).forward_collective
    assert not capabilities_of(DsMoeConfig(inference="threshold_top_k")).eval_batch_invariant
    assert moerouters.info("ds-moe").spec.capabilities == make().capabilities


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"alpha": -1}, "alpha"),
        ({"eps": float("nan")}, "eps"),
        ({"inference": "topk"}, "'threshold'"),
        ({"top_k": 5}, "got top_k=5, and there are 4 experts"),
        ({"epsilon": 0.4}, "did you mean 'eps'"),
    ],
)
def test_a_bad_config_is_named(config: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(**config)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_weights_without_a_common_sum_are_refused(score: str) -> None:
    gating = getattr(Gating, score)(4, 2, renormalize=False)
    with pytest.raises(ConfigError, match=r"cannot train densely with .* not renormalised") as error:
        moerouters.build("ds-moe", gating)
    assert "Gating.softmax(..., renormalize=False)" in str(error.value)


@pytest.mark.parametrize("inference", ["threshold", "threshold_top_k"])
def test_compiles_whole(inference: str) -> None:
    torch._dynamo.reset()
    router = make(inference=inference).eval()
    logits_TE = torch.randn(9, 4)
    eager = router(logits_TE)
    traced = torch.compile(router, backend="eager", fullgraph=True)(logits_TE)
    assert torch.equal(traced.expert_ids, eager.expert_ids)
    assert torch.equal(traced.weights, eager.weights)
