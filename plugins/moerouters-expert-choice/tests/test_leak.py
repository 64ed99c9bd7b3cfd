"""How much of the future routes tell: the bound of the paper, and what is measured of routers that leak and others."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moerouters import Gating, Router
from moerouters_expert_choice import ExpertChoiceConfig, ExpertChoiceRouter, largest_leak, measured_leak

E, K = 8, 2


def futures(count: int, tokens: int = 64) -> Iterator[Tensor]:
    """Texts of other topics: each future has favourite experts of its own."""
    random = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(tokens, E, generator=random) + torch.randn(E, generator=random)


@pytest.fixture
def past_TE(generator: torch.Generator) -> Tensor:
    return torch.randn(32, E, generator=generator)


@pytest.mark.parametrize(("top_k", "num_experts"), [(2, 16), (1, 8), (8, 64), (6, 160)])
def test_the_largest_leak_exceeds_the_bound_of_the_paper(top_k: int, num_experts: int) -> None:
    R = top_k / num_experts
    assert largest_leak(top_k=top_k, num_experts=num_experts) > top_k * math.log2((1 - R) / R)


def test_the_example_of_the_paper() -> None:
    """9 layers, 2 of 16 experts: more than 50 bits per token."""
    assert 9 * 2 * math.log2(14 / 2) > 50
    assert 9 * largest_leak(top_k=2, num_experts=16) == pytest.approx(78.3, abs=0.1)
    assert largest_leak(top_k=4, num_experts=4) == 0


def test_the_largest_leak_is_the_count_of_choices() -> None:
    """log2 of the number of ways in which E experts pick T K / E of T tokens, per token, for many tokens."""
    tokens = 4096
    ways = math.comb(tokens, tokens * K // E)
    assert E * math.log2(ways) / tokens == pytest.approx(largest_leak(top_k=K, num_experts=E), rel=0.01)


def test_training_tells_of_the_future(past_TE: Tensor) -> None:
    router = ExpertChoiceRouter(Gating.softmax(E, K))
    assert 1 < measured_leak(router, past_TE, futures(64)) < 6  # log2(64) is the most that 64 futures can show


def test_choice_in_eval_tells_of_it_too(past_TE: Tensor) -> None:
    router = ExpertChoiceRouter(Gating.softmax(E, K), ExpertChoiceConfig(eval="choice")).eval()
    assert measured_leak(router, past_TE, futures(16)) > 1


def test_thresholds_tell_nothing(past_TE: Tensor) -> None:
    router = ExpertChoiceRouter(Gating.softmax(E, K))
    router.update(router(past_TE).stats)
    assert measured_leak(router.eval(), past_TE, futures(8)) == 0


def test_a_causal_router_tells_nothing(past_TE: Tensor) -> None:
    assert measured_leak(Router(Gating.softmax(E, K)), past_TE, futures(8)) == 0
    assert measured_leak(Router(Gating.softmax(E, K)), past_TE[:0], futures(2)) == 0
