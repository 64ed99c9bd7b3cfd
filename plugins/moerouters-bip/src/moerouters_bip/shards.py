"""Exact order statistics over the tokens of all ranks, by counting: the bids themselves never travel.

A float's bits, read as an integer, sort like the float. So the bid at a place is found digit by digit: all ranks count
how many of their bids have which next digit, the counts are summed, and the digit in which the place lies is kept.
Four rounds of [E, 256] counts for float32 (eight for float64), and one of [E] maxima for the next smaller bid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters.kernels.counts import count_experts
from moerouters_bip.columns import LOWEST, between
from moerouters_bip.ranks import Ranks

DIGIT_BITS = 8
DIGITS = 1 << DIGIT_BITS


class ShardedColumns:
    """Columns over the bids of all ranks; `most` and `centre_E` do not matter to it. Same bits on every rank."""

    def __init__(
        self, bids_ET: Tensor, tokens: Tensor, *, centre_E: Tensor | None = None, most: int = 0, ranks: Ranks
    ) -> None:
        self._ranks, self._dtype = ranks, bids_ET.dtype
        self._keys_ET, self._counted_ET = _sortable(bids_ET), bids_ET > LOWEST
        self._bits = 8 * self._keys_ET.element_size()
        E = bids_ET.shape[0]
        first_EB = self._count(self._counted_ET, self._bits - DIGIT_BITS)
        # How many tokens count travels along: every place that is asked for depends on it.
        counts = ranks.sum(torch.cat([first_EB.reshape(-1), tokens.reshape(1)]))
        self._first_EB, self.tokens = counts[:-1].reshape(E, DIGITS), counts[-1]
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
        for shift in range(self._bits - DIGIT_BITS, -1, -DIGIT_BITS):
            if shift < self._bits - DIGIT_BITS:
                same_ET = (self._keys_ET >> (shift + DIGIT_BITS)) == key_E.unsqueeze(1)
                counts_EB = self._ranks.sum(self._count(self._counted_ET & same_ET, shift))
            # Largest digits first: the place lies in the first digit up to which more than that many bids stand.
            up_to_EB = before_E.unsqueeze(1) + counts_EB.flip(1).cumsum(1)
            skipped_E1 = (up_to_EB <= at_E.unsqueeze(1)).sum(dim=1, keepdim=True).clamp_max(DIGITS - 1)
            equal_E = counts_EB.flip(1).gather(1, skipped_E1).squeeze(1)
            before_E = up_to_EB.gather(1, skipped_E1).squeeze(1) - equal_E
            digit_E = (DIGITS - 1 - skipped_E1.squeeze(1)).to(key_E.dtype)
            top = shift == self._bits - DIGIT_BITS
            key_E = digit_E - DIGITS // 2 if top else (key_E << DIGIT_BITS) + digit_E
        return key_E, before_E, equal_E

    def _key_below(self, key_E: Tensor) -> Tensor:
        """The largest key that is smaller; a column of bids without one gives anything."""
        smaller_ET = self._counted_ET & (self._keys_ET < key_E.unsqueeze(1))
        least = torch.iinfo(self._keys_ET.dtype).min
        candidates_ET = torch.where(smaller_ET, self._keys_ET, least)
        # A column more, so that a rank without tokens has a maximum too.
        none_E1 = torch.full_like(key_E, least).unsqueeze(1)
        return self._ranks.max(torch.cat([candidates_ET, none_E1], dim=1).amax(dim=1))

    def _count(self, chosen_ET: Tensor, shift: int) -> Tensor:
        """int64 [E, 256]: how many of this rank's chosen bids have which digit."""
        E = chosen_ET.shape[0]
        digits_ET = ((self._keys_ET >> shift) & (DIGITS - 1)).long()
        if shift == self._bits - DIGIT_BITS:
            digits_ET = digits_ET ^ (DIGITS // 2)  # the sign bit: negative keys come first
        ids_ET = torch.arange(E, device=digits_ET.device).unsqueeze(1) * DIGITS + digits_ET
        return count_experts(torch.where(chosen_ET, ids_ET, E * DIGITS), E * DIGITS).reshape(E, DIGITS)

    def _value(self, key_E: Tensor) -> Tensor:
        value_E = _flipped(key_E).view(self._dtype)
        return torch.where(self.places_E > 0, value_E, 0.0)


def _sortable(values_ET: Tensor) -> Tensor:
    """Signed integers of the same size that sort as the values do. 0.0 sorts after -0.0, which equals it."""
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}[values_ET.dtype]
    return _flipped(values_ET.view(whole))


def _flipped(bits: Tensor) -> Tensor:
    """Floats are a sign and a magnitude, integers are not: turn the order of the negative ones. Its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)
