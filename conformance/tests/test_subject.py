"""What is measured of a router."""

import torch

from moerouters import RouteContext, Selection
from moerouters_conformance.mutants.healthy import Plain
from moerouters_conformance.subject import Subject


class AsManyAsPass(Plain):
    """Every token's K best experts, K the mean number of scores above an even share: 2 of 4 in an ordinary batch."""

    def select(self, adjusted_TE: torch.Tensor, ctx: RouteContext) -> Selection:
        T, E = adjusted_TE.shape
        K = (adjusted_TE > 1 / E).sum() // max(T, 1)
        ids_TE = adjusted_TE.argsort(dim=1, descending=True, stable=True)
        return Selection.slots(torch.where(torch.arange(E) < K.clamp_min(1), ids_TE, E))


def test_slots_are_fixed_if_they_are_in_every_batch() -> None:
    assert Subject.of(Plain).fixed_slots
    assert not Subject.of(AsManyAsPass).fixed_slots
