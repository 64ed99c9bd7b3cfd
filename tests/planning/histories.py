"""Made-up loads: experts that are hot together in some steps, as topics of a text make them."""

from __future__ import annotations

import numpy as np

from moerouters.planning.loads import LoadHistory


def topics(*, steps: int = 24, experts: int = 16, layers: int = 2, seed: int = 0) -> LoadHistory:
    """Three topics in random mixtures, each with experts of its own beside lasting differences."""
    random = np.random.default_rng(seed)
    made = {}
    for layer in range(layers):
        lasting_E, liked_CE = random.lognormal(0, 0.5, experts), random.lognormal(0, 1, (3, experts))
        shares_SE = lasting_E * (random.dirichlet([0.5] * 3, steps) @ liked_CE)
        shares_SE /= shares_SE.sum(axis=1, keepdims=True)
        made[f"layers.{layer}"] = np.stack([random.multinomial(4096, shares_E) for shares_E in shares_SE])
    return LoadHistory(layers=made, source="topics")


def steady(weights: list[int], *, steps: int = 8) -> LoadHistory:
    """The same loads in every step."""
    return LoadHistory(layers={"only": np.tile(np.array(weights), (steps, 1))}, source="steady")
