"""Top-k of every row with a defined order of ties."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_lowest_id(values_TE: Tensor, k: int) -> Tensor:
    """int64 [T, k]: the columns of the k largest values of each row, falling; among equal values the lowest column.

    torch.topk leaves the order of ties open, and it differs between devices; ties are common in routing (equal logits
    of a fresh gate, saturated sigmoids, bf16). NaN ranks below every number except -inf; -0.0 equals 0.0.

    A stable sort of the row costs three times a torch.topk on a CPU (48 against 15 ms at T = 16384, E = 64, K = 8).
    """
    lowest = torch.finfo(values_TE.dtype).min
    ranked_TE = torch.nan_to_num(values_TE, nan=lowest, posinf=float("inf"), neginf=-float("inf"))
    return ranked_TE.sort(dim=-1, descending=True, stable=True).indices[..., :k]
