"""Order statistics from one histogram per iteration, summed over ranks: one collective where the exact way takes five.

The bins are fine near the value of the iteration before, which the answer approaches, and wider further away, like the
marks of a slide rule. Evenly spaced ones are of little use for softmax scores, whose thresholds are about 1 / E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters.kernels.bins import bin_counts, bin_edges
from moerouters_bip.columns import between
from moerouters_bip.ranks import Ranks

FINEST = -20
"""Within 2**FINEST of the centre there is one bin."""
WIDEST = 20
"""Beyond 2**WIDEST of the centre values are not told apart."""


class HistogramColumns:
    """Columns over the bids of all ranks, each value at most the width of its bin away from the true one.

    That is an eighth of the distance to centre_E, at least 2**-19; for bids within 2**20 of centre_E. Counts are
    integers, so the same tokens give the same bits on any number of ranks. `most` does not matter.
    """

    def __init__(self, bids_ET: Tensor, tokens: Tensor, *, centre_E: Tensor, most: int = 0, ranks: Ranks) -> None:
        E = bids_ET.shape[0]
        self._centre_E = centre_E.to(bids_ET.dtype)
        self._edges_B = bin_edges(FINEST, WIDEST, bids_ET.dtype, bids_ET.device)
        bins = self._edges_B.numel() + 1
        counts = bin_counts(bids_ET, self._centre_E, finest=FINEST, widest=WIDEST).reshape(-1)
        summed = ranks.sum(torch.cat([counts, tokens.reshape(1)]))
        self.tokens = summed[-1]
        self._counts_EB = summed[:-1].reshape(E, bins).flip(1)  # largest bids first
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
