"""A decoder-only language model with a MoE layer in every block: RMSNorm, rotary attention, SwiGLU experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerouters.lab.corpus import VOCABULARY
from moerouters.lab.settings import Settings
from moerouters.layer import MoELayer, MoEOutput
from moerouters.router import Router
from moerouters.types import Assignment, RouteContext

_INIT_VARIANCE = 0.2  # over the width: a standard deviation of 0.02 at width 512, as usual there
_ROTARY_BASE = 10_000.0


class ModelOutput(NamedTuple):
    """What a LanguageModel returns; the aux losses travel in the assignments."""

    logits_BSV: Tensor
    assignments: tuple[Assignment, ...]
    """One per layer, in order."""

    def aux_loss(self) -> Tensor:
        """0-d: the routers' own losses, summed over layers; 0 where no router has one."""
        losses = [loss for assignment in self.assignments for loss in assignment.losses.values()]
        return torch.stack(losses).sum() if losses else self.logits_BSV.new_zeros(())


class LanguageModel(nn.Module):
    """routers: one per layer. Parameters depend on torch's generator, and on nothing that a router draws."""

    def __init__(self, settings: Settings, routers: Sequence[Router]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, settings.hidden_size)
        self.blocks = nn.ModuleList([_Block(settings, router) for router in routers])
        self.head_size = settings.hidden_size // settings.num_heads
        self.norm = nn.RMSNorm(settings.hidden_size, eps=1e-6)
        self.head = nn.Linear(settings.hidden_size, VOCABULARY, bias=False)
        if settings.tied_head:
            self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if "moe" not in name and parameter.dim() > 1:
                nn.init.normal_(parameter, std=math.sqrt(_INIT_VARIANCE / settings.hidden_size))
        # The residual stream is a sum of 2L branches; with smaller last projections its size does not grow with L.
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "experts.down_eDF", "shared.down_eDF")):
                parameter.data.div_(math.sqrt(2 * settings.num_layers))

    def forward(self, tokens_BS: Tensor, noise_key: Tensor | None = None) -> ModelOutput:
        """tokens_BS int64; noise_key int64 [n], to which the layer's number is added for its router."""
        B, S = tokens_BS.shape
        sequence_ids_T = torch.arange(B, device=tokens_BS.device).repeat_interleave(S)
        x_BSD = self.embedding(tokens_BS)
        rotary = _rotary(S, self.head_size, tokens_BS.device)
        assignments = []
        for layer, block in enumerate(self.blocks):
            ctx = RouteContext(
                token_ids_T=tokens_BS.reshape(-1),
                sequence_ids_T=sequence_ids_T,
                num_sequences=B,
                noise_key=None if noise_key is None else torch.cat([noise_key, noise_key.new_tensor([layer])]),
            )
            x_BSD, assignment = block(x_BSD, rotary, ctx)
            assignments.append(assignment)
        return ModelOutput(self.head(self.norm(x_BSD)), tuple(assignments))


class _Block(nn.Module):
    def __init__(self, settings: Settings, router: Router) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.hidden_size, eps=1e-6)
        self.attention = _Attention(settings)
        self.moe_norm = nn.RMSNorm(settings.hidden_size, eps=1e-6)
        self.moe = MoELayer(
            router,
            hidden_size=settings.hidden_size,
            expert_size=settings.expert_size,
            shared_size=settings.shared_size,
            capacity_factor=settings.capacity_factor,
        )

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], ctx: RouteContext) -> tuple[Tensor, Assignment]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotary)
        routed: MoEOutput = self.moe(self.moe_norm(x_BSD), ctx)
        return x_BSD + routed.hidden, routed.assignment


class _Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key and value heads."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.heads, self.kv_heads = settings.num_heads, settings.num_kv_heads
        self.head_size = settings.hidden_size // settings.num_heads
        self.qkv = nn.Linear(settings.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_size, bias=False)
        self.out = nn.Linear(settings.hidden_size, settings.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        heads = self.qkv(x_BSD).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        # Repeated instead of enable_gqa: which attention kernel takes grouped heads differs between devices.
        key, value = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (_rotate(key, rotary), value))
        y = F.scaled_dot_product_attention(_rotate(query, rotary), key, value, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def _rotary(length: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [S, head_size / 2] (arXiv:2104.09864)."""
    exponents = torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), _ROTARY_BASE**-exponents)
    return angles.cos(), angles.sin()


def _rotate(x_BHSd: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotary
    first, second = x_BHSd.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHSd.dtype)
