"""A decoder-only language model: RMSNorm, rotary attention, and a MoE layer (or a dense SwiGLU MLP) in every block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerouters.lab.attention import Attention, MixtureOfAttention, rotary_table
from moerouters.lab.cache import KeyValueCache
from moerouters.lab.corpus import VOCABULARY
from moerouters.lab.settings import Settings
from moerouters.layer import MoELayer, MoEOutput
from moerouters.router import Router
from moerouters.types import Assignment, RouteContext

_INIT_VARIANCE = 0.2  # over the width: a standard deviation of 0.02 at width 512, as usual there


class ModelOutput(NamedTuple):
    """What a LanguageModel returns; the aux losses travel in the assignments."""

    logits_BSV: Tensor
    assignments: tuple[Assignment, ...]
    """Of the MoE layers, in order."""
    of_attention: tuple[Assignment, ...] = ()
    """Of the attention, where its heads are routed."""
    attention_loss: float = 1.0

    def aux_loss(self) -> Tensor:
        """0-d: the routers' own losses, summed over layers (the attention's times its factor); 0 where none has one."""
        losses = [loss for assignment in self.assignments for loss in assignment.losses.values()]
        losses += [self.attention_loss * loss for each in self.of_attention for loss in each.losses.values()]
        return torch.stack(losses).sum() if losses else self.logits_BSV.new_zeros(())


class LanguageModel(nn.Module):
    """routers: one per layer, none in a dense model; of_attention: one per layer where `attention_experts` is above 1.

    Parameters depend on torch's generator, and on nothing that a router draws.
    """

    def __init__(self, settings: Settings, routers: Sequence[Router], of_attention: Sequence[Router] = ()) -> None:
        super().__init__()
        self.attention_loss, self.tied_head = settings.attention_loss, settings.tied_head
        self.embedding = nn.Embedding(VOCABULARY, settings.hidden_size)
        nothing = [None] * settings.num_layers
        pairs = zip(routers or nothing, of_attention or nothing, strict=True)
        self.blocks = nn.ModuleList([_Block(settings, router, attention) for router, attention in pairs])
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
            if name.endswith(("attention.out.weight", "experts.down_eDF", "shared.down_eDF", "mlp.down.weight")):
                parameter.data.div_(math.sqrt(2 * settings.num_layers))

    def forward(
        self, tokens_BS: Tensor, noise_key: Tensor | None = None, caches: Sequence[KeyValueCache] | None = None
    ) -> ModelOutput:
        """tokens_BS int64; noise_key int64 [n], to which the layer's number is added for its router.

        caches: one per layer, of earlier tokens of the same sequences, which tokens_BS follow.
        """
        x_BSD, assignments, of_attention = through_blocks(
            enumerate(self.blocks),
            self.embedding(tokens_BS),
            tokens_BS,
            noise_key,
            head_size=self.head_size,
            caches=caches,
        )
        logits_BSV = self.head(self.norm(x_BSD))
        return ModelOutput(logits_BSV, assignments, of_attention, self.attention_loss)


def through_blocks(
    blocks: Iterable[tuple[int, nn.Module]],
    x_BSD: Tensor,
    tokens_BS: Tensor,
    noise_key: Tensor | None,
    *,
    head_size: int,
    caches: Sequence[KeyValueCache] | None = None,
) -> tuple[Tensor, tuple[Assignment, ...], tuple[Assignment, ...]]:
    """Hidden states through (number of the layer, block) in turn: them, and the assignments of MoE and of attention."""
    B, S = tokens_BS.shape
    sequence_ids_T = torch.arange(B, device=tokens_BS.device).repeat_interleave(S)
    rotary = rotary_table(S, head_size, tokens_BS.device, first=caches[0].length if caches else 0)
    assignments, of_attention = [], []
    for layer, block in blocks:
        ctx = RouteContext(
            token_ids_T=tokens_BS.reshape(-1),
            sequence_ids_T=sequence_ids_T,
            num_sequences=B,
            noise_key=None if noise_key is None else torch.cat([noise_key, noise_key.new_tensor([layer])]),
        )
        x_BSD, assignment, attended = block(x_BSD, rotary, ctx, None if caches is None else caches[layer])
        assignments += [] if assignment is None else [assignment]
        of_attention += [] if attended is None else [attended]
    return x_BSD, tuple(assignments), tuple(of_attention)


class DenseMLP(nn.Module):
    """down(silu(gate x) * (up x)). Gate and up in one product take 1.01 to 1.09 of the time (D 64 to 512, 1 thread)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class _Block(nn.Module):
    def __init__(self, settings: Settings, router: Router | None, of_attention: Router | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.hidden_size, eps=1e-6)
        self.attention = Attention(settings) if of_attention is None else MixtureOfAttention(settings, of_attention)
        if router is None:
            self.mlp_norm = nn.RMSNorm(settings.hidden_size, eps=1e-6)
            self.mlp = DenseMLP(settings.hidden_size, settings.dense_size)
            return
        self.moe_norm = nn.RMSNorm(settings.hidden_size, eps=1e-6)
        self.moe = MoELayer(
            router,
            hidden_size=settings.hidden_size,
            expert_size=settings.expert_size,
            shared_size=settings.shared_size,
            capacity_factor=settings.capacity_factor,
        )

    def forward(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], ctx: RouteContext, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, Assignment | None, Assignment | None]:
        normed_BSD, attended = self.attention_norm(x_BSD), None
        if isinstance(self.attention, Attention):
            y_BSD = self.attention(normed_BSD, rotary, cache=cache)
        else:
            y_BSD, attended = self.attention(normed_BSD, rotary, ctx, cache)
        x_BSD = x_BSD + y_BSD
        if hasattr(self, "mlp"):
            return x_BSD + self.mlp(self.mlp_norm(x_BSD)), None, attended
        routed: MoEOutput = self.moe(self.moe_norm(x_BSD), ctx)
        return x_BSD + routed.hidden, routed.assignment, attended
