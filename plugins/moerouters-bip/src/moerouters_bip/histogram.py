"""Order statistics from one histogram, summed over ranks or micro-batches (Algorithm 4 of arXiv:2502.15451).

Constant space, and one collective where the exact way takes five. The bins are fine near the value of the iteration
before, which the answer approaches, and wider further away, like the marks of a slide rule. Evenly spaced ones are of
little use for softmax scores, whose thresholds are about 1 / E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters.kernels.bin_rule import num_bins
from moerouters.kernels.bins import bin_counts, bin_edges
from moerouters_bip.columns import between
from moerouters_bip.ranks import Ranks

FINEST = -20
"""Within 2**FINEST of the centre there is one bin."""
WIDEST = 20
"""Beyond 2**WIDEST of the centre values are not told apart."""
BINS = num_bins(FINEST, WIDEST)


def counts_of(bids_ET: Tensor, centre_E: Tensor) -> Tensor:
    """int64 [E, BINS]: bids per bin around centre_E, smallest first. They add up, whoever counted them."""
    return bin_counts(bids_ET, centre_E, finest=FINEST, widest=WIDEST)


class BinnedValues:
    """Order statistics of the bids behind `counts_of`, each at most the width of its bin away from the true one.

    That is an eighth of the distance to centre_E, at least 2**-19; for values within 2**20 of centre_E. Counts are
    integers, so the same tokens give the same bits on any number of ranks.
    """

    def __init__(self, counts_EB: Tensor, tokens: Tensor, *, centre_E: Tensor) -> None:
        self.tokens = tokens
        self._centre_E = centre_E
        self._edges_B = bin_edges(FINEST, WIDEST, centre_E.dtype, centre_E.device)
        self._counts_EB = counts_EB.flip(1)  # largest values first
        self._up_to_EB = self._counts_EB.cumsum(1)
        self.places_E = self._up_to_EB[:, -1]

    def falling(self, index: Tensor, count: int) -> Tensor:
        if count == 1:
            bin_E, share_E = self._place(index)
            return self._value(bin_E, share_E).unsqueeze(0)
        upper_E, lower_E = self._place(index), self._place(index + 1)
        # Where the two stand in different bins, all that is known of the gap between them is where the one bin ends and
        # the other begins. Halfway between these the gap stays where it is when each token comes twice.
        apart_E = upper_E[0] != lower_E[0]
        ends_E, begins_E = torch.where(apart_E, 1.0, upper_E[1]), torch.where(apart_E, 0.0, lower_E[1])
        return torch.stack([self._value(upper_E[0], ends_E), self._value(lower_E[0], begins_E)])

    def _place(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Per expert the bin that holds a place, and which share of the bin lies above it."""
        at_E = between(torch.zeros_like(self.places_E), index, self.places_E)
        last = self._edges_B.numel()
        skipped_E1 = (self._up_to_EB <= at_E.unsqueeze(1)).sum(dim=1, keepdim=True).clamp_max(last)
        inside_E = self._counts_EB.gather(1, skipped_E1).squeeze(1)
        before_E = self._up_to_EB.gather(1, skipped_E1).squeeze(1) - inside_E
        # As if the bids of a bin were spread evenly over it.
        share_E = (at_E - before_E + 0.5).to(self._edges_B.dtype) / inside_E.clamp_min(1)
        return last - skipped_E1.squeeze(1), share_E

    def _value(self, bin_E: Tensor, share_E: Tensor) -> Tensor:
        # The two outermost bins have one edge; it stands for all they hold.
        high_E = self._edges_B[bin_E.clamp_max(self._edges_B.numel() - 1)]
        low_E = self._edges_B[(bin_E - 1).clamp_min(0)]
        value_E = self._centre_E + high_E + (low_E - high_E) * share_E
        return torch.where(self.places_E > 0, value_E, 0.0)


class HistogramColumns(BinnedValues):
    """Columns over the bids of all ranks. `most` does not matter."""

    def __init__(self, bids_ET: Tensor, tokens: Tensor, *, centre_E: Tensor, most: int = 0, ranks: Ranks) -> None:
        E, centre_E = bids_ET.shape[0], centre_E.to(bids_ET.dtype)
        wanted_E = (bids_ET > centre_E.unsqueeze(1)).sum(dim=1)  # exactly; the bin at the centre holds both kinds
        mine = torch.cat([counts_of(bids_ET, centre_E).reshape(-1), wanted_E, tokens.reshape(1)])
        counts, self.wanted_E, last = ranks.sum(mine).split_with_sizes([E * BINS, E, 1])
        super().__init__(counts.reshape(E, BINS), last.squeeze(0), centre_E=centre_E)
