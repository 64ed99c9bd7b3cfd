"""What gating is told, and what it gives: the records that its reference and its Triton kernel share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rule(NamedTuple):
    """The part of `GatingSettings` that turns prepared logits into weights; fields as there."""

    score: str
    top_k: int
    num_groups: int = 1
    kept_groups: int = 1
    group_score: str = "max"
    softmax_after_topk: bool = False
    renormalize: bool = True
    eps: float = 1e-20
    scale: float = 1.0


class Gated(NamedTuple):
    """What gating one batch gives."""

    weights_TK: Tensor
    """float32 (float64 of float64); 0 in empty slots, NaN in taken ones of a row that is not finite."""
    expert_ids_TK: Tensor
    """int64, slots by falling adjusted score, ties to the lowest id; E marks an empty slot (padding, score -inf)."""
    cutoff_T: Tensor
    """The (K+1)-th adjusted score, -inf where there is none; of length 0 if it was not wanted."""
    load_E: Tensor
    """int64, tokens per expert."""
    finite_T: Tensor
    """bool, whether all logits of the row are finite; padding is."""
