"""Exact order statistics over the tokens of all ranks, by counting: the bids themselves never travel.

A float's bits, read as an integer, sort like the float. So the bid at a place is found digit by digit: all ranks count
how many of their bids have which next digit, the counts are summed, and the digit in which the place lies is kept.
Four rounds of [E, 256] counts for float32 (eight for float64), and one of [E] maxima for the next smaller bid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters.kernels.bins import DIGIT_BITS, DIGITS, digit_counts, sortable, unsortable
from moerouters_bip.columns import LOWEST, between
from moerouters_bip.ranks import Ranks


class ShardedColumns:
    """Columns over the bids of all ranks; `most` does not matter to it. Same bits on every rank."""

    def __init__(self, bids_ET: Tensor, tokens: Tensor, *, centre_E: Tensor, most: int = 0, ranks: Ranks) -> None:
        self._ranks, self._dtype = ranks, bids_ET.dtype
        self._keys_ET, self._counted_ET = sortable(bids_ET), bids_ET > LOWEST
        E = bids_ET.shape[0]
        first_EB = digit_counts(self._keys_ET, self._keys_ET.new_zeros(E), depth=0)
        # How many tokens count, and want each expert, travels along.
        wanted_E = (bids_ET > centre_E.unsqueeze(1)).sum(dim=1)
        counts = ranks.sum(torch.cat([first_EB.reshape(-1), wanted_E, tokens.reshape(1)]))
        first, self.wanted_E, last = counts.split_with_sizes([E * DIGITS, E, 1])
        self._first_EB, self.tokens = first.reshape(E, DIGITS), last.squeeze(0)
        self.places_E = self._first_EB.sum(dim=1)

    def falling(self, index: Tensor, count: int) -> Tensor:
        zero = torch.zeros_like(self.places_E)
        at_E = between(zero, index, self.places_E)
        key_E, before_E, equal_E = self._key_at(at_E)
        found = [self._value(key_E)]
        if count == 2:
            next_E = between(zero, index + 1, self.places_E)
            found.append(self._value(torch.where(next_E < before_E + equal_E, key_E, self._key_below(key_E))))
        return torch.stack(found)

    def _key_at(self, at_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The key at a place, how many bids come before the first of its kind, and how many are of its kind."""
        key_E = torch.zeros_like(at_E, dtype=self._keys_ET.dtype)
        before_E = torch.zeros_like(at_E)
        counts_EB = self._first_EB
        for depth in range(self._keys_ET.element_size()):
            if depth:
                counts_EB = self._ranks.sum(digit_counts(self._keys_ET, key_E, depth=depth))
            # Largest digits first: the place lies in the first digit up to which more than that many bids stand.
            up_to_EB = before_E.unsqueeze(1) + counts_EB.flip(1).cumsum(1)
            skipped_E1 = (up_to_EB <= at_E.unsqueeze(1)).sum(dim=1, keepdim=True).clamp_max(DIGITS - 1)
            equal_E = counts_EB.flip(1).gather(1, skipped_E1).squeeze(1)
            before_E = up_to_EB.gather(1, skipped_E1).squeeze(1) - equal_E
            digit_E = (DIGITS - 1 - skipped_E1.squeeze(1)).to(key_E.dtype)
            key_E = (key_E << DIGIT_BITS) + digit_E if depth else digit_E - DIGITS // 2
        return key_E, before_E, equal_E

    def _key_below(self, key_E: Tensor) -> Tensor:
        """The largest key that is smaller; a column of bids without one gives anything."""
        smaller_ET = self._counted_ET & (self._keys_ET < key_E.unsqueeze(1))
        least = torch.iinfo(self._keys_ET.dtype).min
        candidates_ET = torch.where(smaller_ET, self._keys_ET, least)
        # A column more, so that a rank without tokens has a maximum too.
        none_E1 = torch.full_like(key_E, least).unsqueeze(1)
        return self._ranks.max(torch.cat([candidates_ET, none_E1], dim=1).amax(dim=1))

    def _value(self, key_E: Tensor) -> Tensor:
        value_E = unsortable(key_E, self._dtype)
        return torch.where(self.places_E > 0, value_E, 0.0)
