"""How much further than its own length a dual step goes (plugins/moerouters-bip/SOLVERS.md has the measurements)."""

from __future__ import annotations

from torch import Tensor

FURTHER = 0.6
"""By which share of its length a step goes further where experts are equally wanted."""


def overshoot(wanted_E: Tensor, tokens: Tensor, top_k: int) -> Tensor:
    """float64 0-d in [0, FURTHER]: the share of its length by which a step goes further, from the bids above q.

    wanted_E: int64, tokens whose s - p exceeds q; tokens: int64 0-d, those that count. The more the one expert that is
    wanted most, or least, is off its n K / E, the less: far from balance a longer step lands anywhere.
    """
    whole = (tokens * top_k).clamp_min(1)
    off = (wanted_E.shape[0] * wanted_E - whole).abs().max()
    return (FURTHER - off.double() / whole.double()).clamp_min(0)
