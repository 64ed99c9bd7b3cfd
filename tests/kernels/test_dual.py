"""Dual steps with capacities: every path against the reference, to the bit; the reference is held against loops and a
linear programme by the tests of the plug-in that uses it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moerouters.kernels.dual import dual_update, dual_update_torch

SHAPES = [(1, 4, 2), (7, 5, 2), (33, 8, 2), (100, 16, 4), (257, 60, 4), (20, 64, 1), (64, 12, 11), (64, 4, 4)]
KINDS = ["normal", "softmax", "ties", "holes", "huge", "one hot expert"]


def scores(kind: str, T: int, E: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """scores_TE, q_E."""
    random = torch.Generator().manual_seed(T + E)
    noise_TE = torch.randn(T, E, generator=random, dtype=torch.float64)
    match kind:
        case "softmax":
            noise_TE = (2 * noise_TE).softmax(dim=-1)
        case "ties":
            noise_TE = noise_TE.round() / 4
        case "holes":  # some tokens keep too few experts, and expert 0 no token
            noise_TE = torch.where(torch.rand(T, E, generator=random) < 0.4, -math.inf, noise_TE)
            noise_TE[:, 0] = -math.inf
        case "huge":
            noise_TE = noise_TE * 10.0 ** torch.randint(-20, 20, (T, E), generator=random)
        case "one hot expert":
            noise_TE[:, 0] += 100
    return noise_TE.to(dtype), torch.randn(E, generator=random) / 8


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "published"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_the_reference(kind: str, dtype: torch.dtype, centred: bool) -> None:
    for T, E, K in SHAPES:
        scores_TE, q_E = scores(kind, T, E, dtype)
        some_T = torch.arange(T) % 3 != 0
        for valid_T in (None, torch.ones_like(some_T), some_T, torch.zeros_like(some_T)):
            hidden_TE = scores_TE if valid_T is None else torch.where(valid_T.unsqueeze(1), scores_TE, math.nan)
            for iterations in (1, 3):
                settings = {"top_k": K, "iterations": iterations, "centred": centred, "valid_T": valid_T}
                found_E = dual_update(hidden_TE, q_E, **settings)  # type: ignore[arg-type]
                expected_E = dual_update_torch(scores_TE, q_E, **settings)  # type: ignore[arg-type]
                assert torch.equal(found_E, expected_E), (T, E, K, valid_T, found_E, expected_E)


@pytest.mark.parametrize("way", [dual_update, dual_update_torch])
@pytest.mark.parametrize(("T", "K"), [(0, 2), (5, 4)])
def test_nothing_to_decide(way: object, T: int, K: int) -> None:
    q_E = torch.tensor([0.3, -0.3, 0.1, -0.1])
    assert torch.equal(way(torch.ones(T, 4), q_E, top_k=K, iterations=4, centred=True), q_E)  # type: ignore[operator]


def test_many_tokens_in_blocks_give_the_same_bits() -> None:
    """Larger than what is worked on at a time, in tokens and in experts."""
    scores_TE, q_E = scores("softmax", 9000, 40)
    settings = {"top_k": 4, "iterations": 2, "centred": True}
    found_E = dual_update(scores_TE, q_E, **settings)  # type: ignore[arg-type]
    assert torch.equal(found_E, dual_update_torch(scores_TE, q_E, **settings))  # type: ignore[arg-type]


def test_experts_end_up_equally_loaded() -> None:
    scores_TE, _ = scores("softmax", 4096, 16)
    scores_TE = scores_TE + torch.linspace(0, 1, 16)
    q_E = dual_update(scores_TE, torch.zeros(16), top_k=2, iterations=30, centred=True)
    load_E = torch.bincount((scores_TE - q_E).topk(2, dim=1).indices.reshape(-1), minlength=16)
    assert load_E.min() >= 505 and load_E.max() <= 519, load_E


def test_leaves_its_inputs_alone_and_gives_no_gradient() -> None:
    scores_TE, q_E = scores("normal", 50, 6)
    kept = scores_TE.clone(), q_E.clone()
    found_E = dual_update(scores_TE.requires_grad_(), q_E, top_k=2, iterations=2, centred=True)
    assert not found_E.requires_grad
    assert torch.equal(scores_TE, kept[0]) and torch.equal(q_E, kept[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes_take_the_reference(dtype: torch.dtype) -> None:
    scores_TE, q_E = scores("softmax", 50, 6, dtype)
    settings = {"top_k": 2, "iterations": 2, "centred": False}
    found_E = dual_update(scores_TE, q_E, **settings)  # type: ignore[arg-type]
    assert found_E.dtype == dtype and torch.equal(found_E, dual_update_torch(scores_TE, q_E, **settings))  # type: ignore[arg-type]


def test_is_a_well_formed_operator() -> None:
    scores_TE, q_E = scores("normal", 30, 6)
    operator = torch.ops.moerouters.dual_update.default
    torch.library.opcheck(operator, (scores_TE, q_E, None, 2, 2, True))
    torch.library.opcheck(operator, (scores_TE, q_E, torch.arange(30) > 4, 2, 2, False))
