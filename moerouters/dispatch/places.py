"""Places: from expert ids to the places where these experts live, between a router and its plan."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerouters.dispatch.placement import LayerPlacement
from moerouters.kernels.counting_sort import counting_sort


class Places(nn.Module):
    """The numbering of a LayerPlacement, on the device of its layer. Nothing of it is in a state dict.

    The pairs of an expert with replicas take turns: the q-th of them, in order of tokens, goes to replica
    (q + turn) mod copies, so the replicas' loads differ by one at most. turn: of a rank its number, where ranks hold
    different tokens, so that odd pairs of many ranks do not all meet at the first replica; the same on all ranks where
    they hold the same tokens.
    """

    places_EC: Tensor
    """int64 [E + 1, C]: the places of every expert, repeated up to the most that any has; E is an empty pair."""
    copies_E: Tensor
    """int64 [E + 1]"""
    by_place: Tensor
    """int64, the expert of every place."""

    def __init__(self, placement: LayerPlacement, *, turn: int = 0) -> None:
        super().__init__()
        self.num_places, self.replicated, self.turn = placement.num_places, placement.replicated, turn
        self._placement = placement
        for name, values in self._tables().items():
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def _tables(self) -> dict[str, list[Any]]:
        found: list[list[int]] = [[] for _ in self._placement.copies]
        for place, expert in enumerate(self._placement.by_place):
            found[expert].append(place)
        found.append([self.num_places])
        widest = max(map(len, found))
        return {
            "places_EC": [list(islice(cycle(places), widest)) for places in found],
            "copies_E": [len(places) for places in found],
            "by_place": list(self._placement.by_place),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in self._tables().items():  # a layer that leaves the meta device has lost them
            getattr(self, name).copy_(torch.tensor(values))
        return self

    def forward(self, expert_ids_N: Tensor) -> Tensor:
        """int64 [N]: the place of every pair; `num_places` for an empty one, whose id is the number of experts."""
        if not self.replicated:
            return self.places_EC[:, 0].index_select(0, expert_ids_N)
        E, C = len(self.copies_E) - 1, self.places_EC.shape[1]
        pairs = counting_sort(expert_ids_N, E)
        first_E = F.pad(pairs.load_E.cumsum(0), (1, 0))  # [E + 1]: empty pairs come last
        queue_N = pairs.inverse_N - first_E.index_select(0, expert_ids_N)
        replica_N = (queue_N + self.turn) % self.copies_E.index_select(0, expert_ids_N)
        return self.places_EC.reshape(-1).index_select(0, expert_ids_N * C + replica_N)
