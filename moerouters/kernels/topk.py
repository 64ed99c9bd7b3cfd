"""Top-k of every row with a defined order of ties."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_lowest_id(values_TE: Tensor, k: int) -> Tensor:
    """int64 [T, k]: the columns of the k largest values of each row, falling; among equal values the lowest column.

    torch.topk leaves the order of ties open, and it differs between devices; ties are common in routing (equal logits
    of a fresh gate, saturated sigmoids, bf16). NaN ranks below every number except -inf; -0.0 equals 0.0.
    """
    ranked_TE = torch.nan_to_num(
        values_TE, nan=torch.finfo(values_TE.dtype).min, posinf=float("inf"), neginf=-float("inf")
    )
    if values_TE.dtype == torch.float64:
        return topk_lowest_id_torch(ranked_TE, k)
    # A float's bits order like an int once the negatives are flipped. With the column in the low half every key is
    # unique, and one topk of int64 gives the stable order: 2-3x faster than a stable sort at E = 64, K = 8.
    ranked_TE = ranked_TE.to(torch.float32)
    ranked_TE = torch.where(ranked_TE == 0, 0.0, ranked_TE)
    bits_TE = ranked_TE.view(torch.int32)
    ordered_TE = torch.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE).to(torch.int64)
    columns_E = torch.arange(values_TE.shape[-1], device=values_TE.device)
    keys_TE = (ordered_TE << 32) | (0xFFFFFFFF - columns_E)
    top_Tk = keys_TE.topk(k, dim=-1).values
    return 0xFFFFFFFF - (top_Tk & 0xFFFFFFFF)


def topk_lowest_id_torch(values_TE: Tensor, k: int) -> Tensor:
    """Reference of `topk_lowest_id`: a stable sort of the whole row (values without NaN)."""
    return values_TE.sort(dim=-1, descending=True, stable=True).indices[..., :k]
