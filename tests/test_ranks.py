"""Two data-parallel ranks: one balancer state, the load of both."""

from typing import Any

import pytest
import torch

from moerouters.reduce import reduce_sums
from support.balanced import RATE
from support.rank_jobs import Model, everything, tokens_of
from support.ranks import on_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(everything)


@pytest.mark.dist
@pytest.mark.parametrize("loss_mode", ["collect", "inject"])
def test_ranks_agree(ranks: list[dict[str, Any]], loss_mode: str) -> None:
    first, second = (rank["training"][loss_mode] for rank in ranks)
    assert first["loads"] == second["loads"]
    assert first["biases"] == second["biases"]
    assert all(map(torch.equal, first["weights"], second["weights"]))


@pytest.mark.dist
def test_loss_modes_agree(ranks: list[dict[str, Any]]) -> None:
    collect, inject = (ranks[0]["training"][mode] for mode in ("collect", "inject"))
    assert collect["loads"] == inject["loads"]
    for mine, theirs in zip(collect["weights"], inject["weights"], strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.dist
def test_the_load_is_that_of_both_ranks(ranks: list[dict[str, Any]]) -> None:
    model = Model("collect")
    for rank in range(2):
        model(tokens_of(rank, 0))
    expected = [layer.running.sums["load_E"] for layer in model.layers]
    steps = ranks[0]["training"]["collect"]["loads"]
    assert list(steps[0].values()) == [load_E.tolist() for load_E in expected]
    assert [sum(load) for load in steps[1].values()] == [10, 10]  # rank 1 had no tokens
    rule = [RATE * torch.sign(load_E.double().mean() - load_E) for load_E in expected]
    for bias, expected_E in zip(ranks[0]["training"]["collect"]["biases"][0], rule, strict=True):
        assert bias == pytest.approx(expected_E.tolist())


@pytest.mark.dist
def test_a_broken_rank_stops_all(ranks: list[dict[str, Any]]) -> None:
    """Raised on one rank alone, the others would wait in the next collective for ever."""
    expected = "the gate of layer 'layers.0' gave NaN or infinite logits for 1 token in this step."
    assert [rank["training"]["collect"]["error"] for rank in ranks] == [expected] * 2


@pytest.mark.dist
def test_a_token_group_bounds_the_sum(ranks: list[dict[str, Any]]) -> None:
    assert [sum(rank["own"]) for rank in ranks] == [10, 12]


@pytest.mark.dist
def test_sums_over_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["reduced"]["found"]
        assert found["a"]["load"].tolist() == [3, 5]
        assert found["b"]["load"].tolist() == [[2**54 + 2]]  # float64 would have rounded
        assert found["a"]["mean"].item() == 1.0
        assert found["b"]["mean"].tolist() == [1.0, 2.0]
        assert rank["reduced"]["calls"] == ["torch.float32", "torch.int64"]
    assert ranks[0]["reduced"]["given"]["a"]["load"].tolist() == [1, 2]


def test_alone_sums_are_copies() -> None:
    sums = {"a": {"load": torch.tensor([1, 2])}}
    found = reduce_sums(sums, None)
    found["a"]["load"].zero_()
    assert sums["a"]["load"].tolist() == [1, 2]
