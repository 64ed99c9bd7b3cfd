"""A stand-in for DeepEP's `deep_ep.Buffer` on CPUs: its signatures, layouts and refusals, over torch.distributed.

Written after DeepEP's deep_ep/buffers/legacy.py at 189df34 and the checks of its kernels. Rows that come stand by
source rank, but within a rank in reverse order of tokens: DeepEP promises no order, so nobody may rely on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64


@dataclass(frozen=True)
class Config:
    num_sms: int

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 1024 * hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0


@dataclass(frozen=True)
class _Handle:
    num_tokens: int
    sent: tuple[Tensor, ...]
    """For each rank, which tokens went there, in the order in which they went."""
    came: tuple[int, ...]


class Buffer:
    num_sms: int = 20
    made = 0
    """How many there have been in this process; not of DeepEP."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0, **_: Any) -> None:
        self.group, self.group_size = group, group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        Buffer.made += 1

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8, 16), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        assert topk_idx.dtype == topk_idx_t and topk_idx.dim() == 2 and topk_idx.is_contiguous()
        assert bool(((topk_idx >= -1) & (topk_idx < num_experts)).all())
        per_rank = num_experts // self.group_size
        ranks_TK = torch.where(topk_idx < 0, -1, topk_idx // per_rank)
        in_rank_TW = torch.stack([(ranks_TK == rank).any(dim=1) for rank in range(self.group_size)], dim=1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return in_rank_TW.sum(dim=0).int(), None, per_expert.int(), in_rank_TW, None

    def dispatch(
        self,
        x: Tensor,
        handle: _Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[int] | None, _Handle | None, None]:
        self._expect_rows(x)
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            return torch.cat(self._there(x, handle)), None, None, None, None, None
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert is_token_in_rank.shape == (len(x), self.group_size) and is_token_in_rank.dtype == torch.bool
        assert topk_idx is not None and topk_weights is not None and topk_weights.is_contiguous()
        assert topk_weights.dtype == torch.float32 and topk_weights.shape == topk_idx.shape and topk_idx.shape[1] <= 32
        sent = tuple(torch.nonzero(column_T).flatten().flip(0) for column_T in is_token_in_rank.unbind(dim=1))
        assert [len(tokens) for tokens in sent] == num_tokens_per_rank.tolist()
        handle = _Handle(len(x), sent, self._counts([len(tokens) for tokens in sent]))
        ids_MK, weights_MK = (torch.cat(self._there(table, handle)) for table in (topk_idx, topk_weights))
        experts = len(num_tokens_per_expert) // self.group_size
        first = self.group.rank() * experts
        here_MK = (ids_MK >= first) & (ids_MK < first + experts)
        ids_MK = torch.where(here_MK, ids_MK - first, -1)
        loads = torch.bincount(ids_MK[here_MK], minlength=experts).tolist()
        return torch.cat(self._there(x, handle)), ids_MK, weights_MK.where(here_MK, 0), loads, handle, None

    def combine(
        self,
        x: Tensor,
        handle: _Handle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, None]:
        self._expect_rows(x)
        assert len(x) == sum(handle.came)
        sums_TK = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.is_contiguous()
            sums_TK = self._back(topk_weights, handle)
        return self._back(x, handle), sums_TK, None

    def _expect_rows(self, x: Tensor) -> None:
        assert x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16
        assert x.shape[1] * x.element_size() % 16 == 0
        assert self.num_nvl_bytes >= Config(1).get_nvl_buffer_size_hint(x.shape[1] * x.element_size(), self.group_size)

    def _counts(self, sent: list[int]) -> tuple[int, ...]:
        came = torch.empty(self.group_size, dtype=torch.int64)
        dist.all_to_all_single(came, torch.tensor(sent), group=self.group)
        return tuple(came.tolist())

    def _there(self, rows: Tensor, handle: _Handle) -> tuple[Tensor, ...]:
        sent, came = torch.cat(handle.sent), rows.new_empty(sum(handle.came), *rows.shape[1:])
        counts = [len(tokens) for tokens in handle.sent]
        dist.all_to_all_single(came, rows[sent], list(handle.came), counts, group=self.group)
        return came.split(list(handle.came))

    def _back(self, rows: Tensor, handle: _Handle) -> Tensor:
        """Sums in float32 over the ranks that a token went to."""
        counts = [len(tokens) for tokens in handle.sent]
        home = rows.new_empty(sum(counts), rows.shape[1])
        dist.all_to_all_single(home, rows, counts, list(handle.came), group=self.group)
        sums = torch.zeros(handle.num_tokens, rows.shape[1])
        return sums.index_add(0, torch.cat(handle.sent), home.float()).to(rows.dtype)
