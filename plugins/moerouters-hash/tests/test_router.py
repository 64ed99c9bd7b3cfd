"""What the router makes of the hash: missing context, weights, the table, meta devices."""

import pytest
import torch

import moerouters
from moerouters import Gating, MoELayer, RouteContext
from moerouters.errors import ConfigError, ContextError
from moerouters_hash.balanced import UNSEEN, balanced_table
from moerouters_hash.config import HashConfig
from moerouters_hash.mixing import hashed_experts
from moerouters_hash.router import HashRouter

COUNTS = (90, 0, 40, 30, 20, 10, 0, 5)


def context(*token_ids: int) -> RouteContext:
    return RouteContext(token_ids_T=torch.tensor(token_ids, dtype=torch.int64))


def test_the_gate_does_not_choose() -> None:
    router = moerouters.build("hash", Gating.softmax(8, 2), config={"seed": 5})
    ctx = context(17, 4, 17, 99)
    torch.manual_seed(0)
    assignments = [router(torch.randn(4, 8) * scale, ctx).validate() for scale in (0.0, 1.0, 30.0)]
    expected_TK = hashed_experts(ctx.token_ids_T, num_experts=8, top_k=2, seed=5)
    for assignment in assignments:
        assert torch.equal(assignment.expert_ids_TK, expected_TK)
    assert torch.equal(expected_TK[0], expected_TK[2])
    assert not assignments[0].losses
    assert not assignments[0].stats


def test_training_and_eval_choose_alike() -> None:
    router = HashRouter(Gating.sigmoid(6, 3))
    ctx = context(*range(20))
    logits_TE = torch.randn(20, 6)
    assert torch.equal(router(logits_TE, ctx).expert_ids, router.eval()(logits_TE, ctx).expert_ids)


def test_it_says_that_token_ids_are_missing() -> None:
    with pytest.raises(ContextError, match="router 'hash' needs token_ids_T, and the RouteContext has none"):
        HashRouter(Gating.softmax(4, 1))(torch.zeros(3, 4))


def test_one_expert_of_a_renormalised_gating_weighs_one() -> None:
    """The paper's layer: no gate."""
    logits_TE = torch.randn(5, 4, requires_grad=True)
    assignment = HashRouter(Gating.softmax(4, 1))(logits_TE, context(1, 2, 3, 4, 5))
    torch.testing.assert_close(assignment.weights, torch.ones(5, 1))
    (gradient_TE,) = torch.autograd.grad(assignment.weights.sum(), logits_TE)
    torch.testing.assert_close(gradient_TE, torch.zeros(5, 4), atol=1e-6, rtol=0)


def test_a_frozen_gate_of_zeros_weighs_all_alike() -> None:
    layer = MoELayer(HashRouter(Gating.softmax(8, 4)), hidden_size=6, expert_size=4)
    layer.gate.weight.requires_grad_(False).zero_()
    assignment = layer(torch.randn(7, 6), context(*range(7))).assignment
    torch.testing.assert_close(assignment.weights, torch.full((7, 4), 0.25))


def test_a_gate_learns_what_the_chosen_weigh() -> None:
    gating = Gating.sigmoid(5, 2, renormalize=False)
    logits_TE = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assignment = HashRouter(gating)(logits_TE, context(*range(6)))
    torch.testing.assert_close(assignment.weights, logits_TE.sigmoid().gather(1, assignment.expert_ids))


def test_ids_stay_in_the_groups_of_the_gating() -> None:
    gating = Gating.sigmoid(16, 3, num_groups=4, kept_groups=2)
    ids_TK = HashRouter(gating)(torch.zeros(200, 16), context(*range(200))).validate().expert_ids_TK
    groups = [{expert // 4 for expert in row} for row in ids_TK.tolist()]
    assert max(map(len, groups)) == 2
    assert set().union(*groups) == {0, 1, 2, 3}


def test_the_table_serves_what_it_has_seen_and_the_hash_the_rest() -> None:
    router = HashRouter(Gating.softmax(4, 2), HashConfig(frequencies=COUNTS, seed=3))
    ids_T = torch.tensor([0, 1, 2, 7, 6, 8, 5000, -100])
    rows = router(torch.zeros(8, 4), RouteContext(token_ids_T=ids_T)).validate().expert_ids_TK.tolist()
    table_VK = balanced_table(COUNTS, num_experts=4, top_k=2, seed=3).tolist()
    hashed = hashed_experts(ids_T, num_experts=4, top_k=2, seed=3).tolist()
    for token, row, by_hash in zip(ids_T.tolist(), rows, hashed, strict=True):
        in_table = 0 <= token < len(COUNTS) and COUNTS[token] > 0
        assert row == (table_VK[token] if in_table else by_hash)
    assert table_VK[1] == table_VK[6] == [UNSEEN, UNSEEN]


def test_the_table_comes_back_after_a_meta_device() -> None:
    config, ctx = HashConfig(frequencies=COUNTS), context(*range(10))
    expected = HashRouter(Gating.softmax(4, 2), config)(torch.zeros(10, 4), ctx).expert_ids
    with torch.device("meta"):
        router = HashRouter(Gating.softmax(4, 2), config)
    router = router.to_empty(device="cpu")
    assert router.table_VK is not None
    router.table_VK.fill_(3)
    router.reset_state()
    assert torch.equal(router(torch.zeros(10, 4), ctx).expert_ids, expected)


def test_what_follows_from_the_config_is_not_saved() -> None:
    assert not HashRouter(Gating.softmax(4, 2), HashConfig(frequencies=COUNTS)).state_dict()


def test_counts_do_not_flood_a_log() -> None:
    router = HashRouter(Gating.softmax(4, 2), HashConfig(frequencies=(1,) * 1000))
    assert len(repr(router)) < 300


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
        ({"seed": 2**32}, "seed: input should be less than 4294967296"),
        ({"frequencies": [3, -1]}, "frequencies.1: input should be greater than or equal to 0"),
        ({"frequency": [3, 1]}, "did you mean 'frequencies'"),
    ],
)
def test_wrong_settings_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moerouters.build("hash", Gating.softmax(4, 2), config=config)


def test_a_table_knows_no_groups() -> None:
    gating = Gating.sigmoid(8, 2, num_groups=4, kept_groups=2)
    with pytest.raises(ConfigError, match="leave frequencies out"):
        moerouters.build("hash", gating, config={"frequencies": COUNTS})
