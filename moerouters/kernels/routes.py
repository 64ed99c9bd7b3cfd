"""Routes: which row, in the order of experts, is which slot of which token; AllExperts: every token, every expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AllExperts:
    """Nothing to find: every expert gets every token."""

    weights_TE: Tensor
    """Column e is expert e's; 0 in an empty slot. In a record, since FSDP2 casts tensors that it is handed."""


@dataclass(frozen=True)
class Routes:
    """Which rows are whose. Rows past load_e.sum() stand for empty slots."""

    weights_TK: Tensor
    order_N: Tensor
    """int64, the pair (token * K + slot) that a row is."""
    inverse_N: Tensor
    """int64, the row that a pair is."""

    def token_ids_R(self, rows: int) -> Tensor:
        """int64, of the first so many rows."""
        return self.order_N[:rows] // max(self.weights_TK.shape[1], 1)

    def weights_R1(self, rows: int) -> Tensor:
        """The combine weights of the first so many rows."""
        return self.weights_TK.reshape(-1).index_select(0, self.order_N[:rows]).unsqueeze(1)

    def combine(self, y_RD: Tensor, weights_TK: Tensor | None) -> Tensor:
        """For every token the (weighted) sum over its slots. All empty ones may share the last row of y_RD.

        embedding_bag reads each row once and writes no products: 20 ms at 32768 rows of 512 floats on one core, where
        weighting and adding tile by tile took 26.
        """
        T, K = self.weights_TK.shape
        if y_RD.numel() == 0:
            return y_RD.new_zeros(T, y_RD.shape[1])
        inverse_N = self.inverse_N if y_RD.shape[0] == T * K else self.inverse_N.clamp(max=y_RD.shape[0] - 1)
        return F.embedding_bag(inverse_N.reshape(T, K), y_RD, mode="sum", per_sample_weights=weights_TK)
