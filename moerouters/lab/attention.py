"""Causal self-attention with rotary positions; as a mixture of attention heads where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerouters.autocast import no_autocast
from moerouters.lab.cache import KeyValueCache
from moerouters.lab.settings import Settings
from moerouters.routed import RoutedModule
from moerouters.router import Router
from moerouters.types import Assignment, RouteContext

_ROTARY_BASE = 10_000.0


class Attention(nn.Module):
    """Grouped key and value heads. With several experts they share them: each has an equal part of the query heads."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.heads, self.kv_heads = settings.num_heads, settings.num_kv_heads
        self.experts = settings.attention_experts
        self.head_size = settings.hidden_size // settings.num_heads
        self.qkv = nn.Linear(settings.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_size, bias=False)
        self.out = nn.Linear(settings.hidden_size, settings.hidden_size, bias=False)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        weights_BSE: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """weights_BSE: what each expert's heads weigh at each token. cache: of earlier tokens; these ones are added."""
        heads = self.qkv(x_BSD).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        key, seen, earlier = rotate(key, rotary), None, 0
        if cache is not None:
            seen, earlier = cache.visible(x_BSD.shape[1], x_BSD.device), cache.length
            key, value = cache.extended(key, value)
        key, value = self._for_queries(key), self._for_queries(value)
        query = rotate(query, rotary)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=earlier == 0)
        y_BSHd = y.transpose(1, 2)
        if weights_BSE is not None:
            weights_BSH = weights_BSE.repeat_interleave(self.heads // self.experts, dim=-1)
            y_BSHd = (y_BSHd * weights_BSH.unsqueeze(-1)).to(y.dtype)
        out: Tensor = self.out(y_BSHd.flatten(2))
        return out

    def _for_queries(self, x_BHSd: Tensor) -> Tensor:
        """Keys or values, one head for every query head."""
        # Repeated instead of enable_gqa: which attention kernel takes grouped heads differs between devices.
        own = x_BHSd.repeat_interleave(self.heads // self.experts // self.kv_heads, dim=1)
        return own if self.experts == 1 else own.repeat(1, self.experts, 1, 1)


class MixtureOfAttention(RoutedModule):
    """Attention experts, each with query heads and an output projection of its own; keys and values are shared.

    arXiv:2404.05567, Eq. 7 and 8, after Zhang et al., arXiv:2210.05144: what an expert's heads give is weighed before
    the output projection. All experts are computed, an inactive one with weight 0; in the paper, too, attention runs
    dense at inference, since more than 60% of it stays active.
    """

    def __init__(self, settings: Settings, router: Router) -> None:
        super().__init__()
        self.attention = Attention(settings)
        self.gate = nn.Linear(settings.hidden_size, settings.attention_experts, bias=False)
        self._set_router(router, hidden_size=settings.hidden_size, loss_mode="collect")

    def forward(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], ctx: RouteContext, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, Assignment]:
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        with no_autocast(x_BSD.device):
            logits_TE = F.linear(x_BSD.flatten(0, 1).to(dtype), self.gate.weight.to(dtype))
        assignment = self._account(self._assign(logits_TE, ctx))
        weights_BSE = _weights_of_all(assignment).reshape(*x_BSD.shape[:2], -1)
        return self.attention(x_BSD, rotary, weights_BSE, cache), assignment

    def _router_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.gate.parameters()
        yield from self.router.parameters()


def _weights_of_all(assignment: Assignment) -> Tensor:
    """[T, E]: each expert's weight at each token, 0 where it is not active."""
    ids_TK, weights_TK = assignment.with_slots()
    # One more column takes the empty slots.
    padded = weights_TK.new_zeros(assignment.num_tokens, assignment.num_experts + 1)
    return padded.scatter(1, ids_TK, weights_TK)[:, :-1]


def rotary_table(length: int, head_size: int, device: torch.device, *, first: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin of `length` positions from `first` on, float32 [S, head_size / 2] (arXiv:2104.09864)."""
    exponents = torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size
    positions = torch.arange(first, first + length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, _ROTARY_BASE**-exponents)
    return angles.cos(), angles.sin()


def rotate(x_BHSd: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every pair of features by its position's angle; in the dtype of x."""
    cos, sin = rotary
    first, second = x_BHSd.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHSd.dtype)
