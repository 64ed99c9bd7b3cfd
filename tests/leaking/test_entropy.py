"""Entropy against distributions whose entropy is known."""

import math

import pytest
import torch

from moerouters.leaking.entropy import entropy_bits, expert_choice_bits, interval_of_mean


def test_one_outcome_has_exactly_no_entropy() -> None:
    assert entropy_bits([128]) == 0.0


@pytest.mark.parametrize("outcomes", [2, 4, 16])
def test_equal_counts_have_the_logarithm_and_the_correction(outcomes: int) -> None:
    draws = 64 * outcomes
    expected = math.log2(outcomes) + (outcomes - 1) / (2 * draws * math.log(2))
    assert entropy_bits([64] * outcomes) == pytest.approx(expected)


def test_the_correction_takes_out_most_of_the_bias() -> None:
    """Mean of the estimate over many samples of 64 from a known distribution, corrected and not."""
    weights = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
    true = float(-(weights * weights.log2()).sum())
    drawn = torch.multinomial(weights, 64 * 500, replacement=True, generator=torch.Generator().manual_seed(0))
    counted = [[c for c in torch.bincount(row, minlength=7).tolist() if c] for row in drawn.reshape(500, 64)]
    corrected = sum(map(entropy_bits, counted)) / 500
    plain = sum(sum(c / 64 * math.log2(64 / c) for c in counts) for counts in counted) / 500
    assert plain < true - 0.05
    assert abs(corrected - true) < 0.015


def test_the_interval_covers_the_mean_and_shrinks_to_it() -> None:
    low, high = interval_of_mean([1.0, 2.0, 3.0, 4.0])
    assert 1.0 < low < 2.5 < high < 4.0
    assert interval_of_mean([1.0, 2.0, 3.0, 4.0]) == (low, high)
    assert interval_of_mean([0.5] * 8) == (0.5, 0.5)


def test_the_figure_of_the_paper() -> None:
    """2 of 16 experts in 9 layers: more than 50 bits."""
    figure = expert_choice_bits(16, 2)
    assert figure is not None and 50 < 9 * figure < 51
    assert expert_choice_bits(4, 2) is None
