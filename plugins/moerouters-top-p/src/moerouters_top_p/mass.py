"""How many of a token's best experts it takes to hold a share p of its probability.

Summed in integers: a running sum of floats has another last bit in another order of additions, which a device is free
to choose, and where the sum comes close to p that bit would be an expert more or less.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2**40
"""One in fixed point: finer than float32 near 1 by 2**16, and far below where float64 stops counting."""


def needed(probabilities_TE: Tensor, ranked_ids_TK: Tensor, p: float) -> Tensor:
    """bool [T, K]: whether the experts ranked before hold less than a share p of the token's probability.

    probabilities_TE: not negative; experts that are no candidates are 0. ranked_ids_TK: ids by falling preference. The
    first expert is always needed, also where no probability is left to share.
    """
    mass_TE = (probabilities_TE.double() * UNIT).round().long()
    ranked_TK = mass_TE.gather(1, ranked_ids_TK)
    before_TK = ranked_TK.cumsum(dim=1) - ranked_TK
    wanted_T1 = p * mass_TE.sum(dim=1, keepdim=True).double()
    first_K = torch.arange(ranked_ids_TK.shape[1], device=ranked_ids_TK.device) == 0
    return (before_TK < wanted_T1) | first_K
