"""The network of minima and maxima against a sort of every column."""

import numpy as np
import pytest

from moerouters.kernels import selection_network
from moerouters.kernels.selection_network import token_cutoffs, work_size
from support.threads import torch_threads


def cutoffs(scores_ET: np.ndarray, dual_E: np.ndarray, top_k: int, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
    E, T = scores_ET.shape
    work = np.full((threads, work_size(E, T, top_k, threads)), np.nan, scores_ET.dtype)
    return token_cutoffs(scores_ET, dual_E, top_k, list(work))


@pytest.mark.parametrize("num_experts", [2, 3, 5, 8, 15, 16, 17, 31, 33, 60, 64, 72, 130])
def test_every_size_and_place(num_experts: int) -> None:
    random = np.random.default_rng(num_experts)
    for top_k in sorted({1, 2, 3, 4, 7, 8, num_experts // 2, num_experts - 1} & set(range(1, num_experts))):
        for kind in ("normal", "ties"):
            scores_ET = random.standard_normal((num_experts, 41))
            scores_ET = np.round(scores_ET) if kind == "ties" else scores_ET
            scores_ET[random.random(scores_ET.shape) < 0.1] = -np.inf
            dual_E = np.round(random.standard_normal(num_experts))
            falling_ET = -np.sort(dual_E[:, None] - scores_ET, axis=0)
            upper_T, lower_T = cutoffs(scores_ET, dual_E, top_k)
            np.testing.assert_array_equal(upper_T, falling_ET[top_k - 1], err_msg=f"K={top_k}, {kind}")
            np.testing.assert_array_equal(lower_T, falling_ET[top_k], err_msg=f"K={top_k}, {kind}")


@pytest.mark.parametrize("num_experts", [12, 37])
def test_tokens_in_several_blocks(num_experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores_ET = np.random.default_rng(0).standard_normal((num_experts, 103)).astype(np.float32)
    whole = cutoffs(scores_ET, np.zeros(num_experts, np.float32), 3)
    monkeypatch.setattr(selection_network, "BLOCK", num_experts * 10)
    parts = cutoffs(scores_ET, np.zeros(num_experts, np.float32), 3)
    np.testing.assert_array_equal(whole, parts)
    assert whole[0].dtype == np.float32
    monkeypatch.setattr(selection_network, "SHARED_BLOCK", num_experts * 20)
    with torch_threads(2):
        np.testing.assert_array_equal(whole, cutoffs(scores_ET, np.zeros(num_experts, np.float32), 3, threads=2))


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_token(tokens: int) -> None:
    upper_T, lower_T = cutoffs(np.ones((9, tokens)), np.arange(9.0), 2)
    assert upper_T.tolist() == [0.0] * tokens and lower_T.tolist() == [-1.0] * tokens


def test_what_is_not_asked_for_is_not_compared() -> None:
    """Batcher's whole sorting network of 64 values has 543 comparators, each of two operations."""
    lists, levels = selection_network._plan(64, 8)
    operations = 0
    for n, level in enumerate(levels):
        operations += sum(c.needs_high + c.needs_low for c in level.comparators) * (lists >> n)
    assert operations < 600
