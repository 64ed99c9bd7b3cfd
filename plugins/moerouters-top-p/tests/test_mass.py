"""Who is needed for a share p, against a loop over one token's experts in exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moerouters_top_p.mass import UNIT, needed


def slow_needed(masses: list[int], ranked: list[int], p: float) -> list[bool]:
    """The fewest of the ranked experts whose masses sum to p of all, one at least; exact."""
    wanted = Fraction(p) * sum(masses)
    answer, held = [], 0
    for place, expert in enumerate(ranked):
        answer.append(place == 0 or held < wanted)
        held += masses[expert]
    return answer


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], list[int], float]:
    # Sixteenths, so that sums meet p exactly; and numbers near nothing.
    masses = draw(st.lists(st.integers(0, 8).map(lambda n: n * UNIT // 16) | st.sampled_from([1, 3]), min_size=1))
    ranked = sorted(range(len(masses)), key=lambda e: (-masses[e], e))
    p = draw(st.integers(1, 16).map(lambda n: n / 16) | st.floats(1e-6, 1.0))
    return masses, ranked[: draw(st.integers(1, len(masses)))], p


@settings(max_examples=120, deadline=None)
@given(row=rows())
def test_the_fewest_that_hold_the_share(row: tuple[list[int], list[int], float]) -> None:
    masses, ranked, p = row
    probabilities_TE = torch.tensor([masses], dtype=torch.float64) / UNIT
    got_TK = needed(probabilities_TE, torch.tensor([ranked]), p)
    assert got_TK.tolist() == [slow_needed(masses, ranked, p)]


@pytest.mark.parametrize(
    ("probabilities", "p", "count"),
    [
        ([0.5, 0.25, 0.25], 0.5, 1),  # the sum that reaches p exactly is enough
        ([0.5, 0.25, 0.25], 0.5000001, 2),
        ([0.25, 0.25, 0.25, 0.25], 0.4, 2),
        ([0.25, 0.25, 0.25, 0.25], 1.0, 4),
        ([1.0, 0.0, 0.0, 0.0], 1.0, 1),  # nothing is left to hold
        ([0.0, 0.0, 0.0, 0.0], 0.4, 1),
        ([0.9, 0.05, 0.05, 0.0], 0.99, 3),
    ],
)
def test_by_hand(probabilities: list[float], p: float, count: int) -> None:
    ranked_TK = torch.arange(len(probabilities)).unsqueeze(0)
    assert int(needed(torch.tensor([probabilities]), ranked_TK, p).sum()) == count


def test_order_of_experts_moves_no_bit() -> None:
    """In floats the running sum of 1e-8s behind a large number depends on the order of additions."""
    random = torch.Generator().manual_seed(0)
    probabilities_TE = torch.randn(500, 64, generator=random).mul(3).softmax(dim=1)
    order_E = torch.randperm(64, generator=random)
    counts = []
    for given_TE in (probabilities_TE, probabilities_TE[:, order_E]):
        ranked_TE = given_TE.sort(dim=1, descending=True, stable=True).indices
        counts.append(needed(given_TE, ranked_TE, 0.7).sum(dim=1))
    assert torch.equal(counts[0], counts[1])
