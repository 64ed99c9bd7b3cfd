"""Tiny checkpoints in folders, as people hand them to the commands."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
TEXT = b"It was the best of times, it was the worst of times; " * 8
"""424 bytes: six windows of 64 and a remainder."""


def qwen() -> Qwen3MoeConfig:
    """Four layers of eight experts."""
    return Qwen3MoeConfig(
        **SIZES, num_hidden_layers=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2
    )


def deepseek() -> DeepseekV3Config:
    """A dense layer and two of sixteen experts in groups, with a correction bias, in bfloat16."""
    return DeepseekV3Config(
        **SIZES,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        dtype="bfloat16",
    )


def build(config: Qwen3MoeConfig | DeepseekV3Config) -> PreTrainedModel:
    """A model with this config, in eval mode; the correction bias is not zero."""
    torch.manual_seed(0)
    made = Qwen3MoeForCausalLM if isinstance(config, Qwen3MoeConfig) else DeepseekV3ForCausalLM
    model: PreTrainedModel = made(config).to(torch.bfloat16 if config.dtype == torch.bfloat16 else torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.05)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def saved(config: Qwen3MoeConfig | DeepseekV3Config, folder: Path) -> Path:
    """The folder, with config and weights."""
    build(config).save_pretrained(folder)
    return folder


def windows() -> list[Tensor]:
    """TEXT as the commands cut it for a model with bytes as tokens and 64 positions."""
    ids_T = torch.tensor(list(TEXT), dtype=torch.int64) % 128
    whole = ids_T[: 6 * 64].reshape(6, 64)
    return [whole[:4], whole[4:], ids_T[6 * 64 :].unsqueeze(0)]
