"""Named settings. Any of their numbers can be overridden."""

from __future__ import annotations

from moerouters.lab.named import named
from moerouters.lab.settings import Settings

# A minute per router on one CPU core, and most of the way down the loss curve: higher up it is chance which router is
# ahead at the last step.
_TINY = Settings(
    hidden_size=96,
    num_layers=3,
    num_heads=3,
    num_kv_heads=3,
    num_experts=16,
    top_k=4,
    expert_size=64,
    sequence_length=128,
    micro_batch_size=8,
    accumulation_steps=2,
    steps=240,
    learning_rate=4e-3,
    warmup_steps=20,
    validation_sequences=512,
    checkpoint_every=40,
)

# The model of arXiv:2502.15451, after the defaults of jingyaogong/minimind of February 2025; bytes instead of its
# 6400 tokens. 0.3B parameters with 16 experts, 1.1B with 64.
_MINIMIND_16 = Settings(
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=2,
    num_experts=16,
    top_k=4,
    expert_size=1408,
    shared_size=1408,
    sequence_length=512,
    micro_batch_size=32,
    accumulation_steps=8,
    steps=2000,
    learning_rate=5e-4,
    warmup_steps=100,
    validation_sequences=1024,
    checkpoint_every=250,
)

# The shape of the 1B model of arXiv:2408.15664: 64 routed experts, K = 6, two shared ones, sigmoid scores. As many
# active parameters as tiny.
_DEEPSEEK = _TINY.override(
    {"num_experts": 64, "top_k": 6, "expert_size": 32, "shared_size": 64, "score": "sigmoid", "renormalize": False}
)

PRESETS = {
    "tiny": _TINY,
    "tiny-64": _TINY.override({"num_experts": 64, "top_k": 8, "expert_size": 32}),
    "tiny-deepseek": _DEEPSEEK,
    "minimind-16": _MINIMIND_16,
    "minimind-64": _MINIMIND_16.override({"num_experts": 64, "top_k": 8}),
}


def preset(name: str) -> Settings:
    """The settings of that name. Raises ConfigError with the nearest one."""
    fix = "pick one of these, and change its numbers with --set name=value"
    return named(name, PRESETS, what="preset", where="--preset", fix=fix)
