"""Named studies: a ladder of dense models, and at each rung MoE models that are to have its step time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moerouters.lab.named import named
from moerouters.lab.settings import Settings
from moerouters.study.plan import Budget, ModelSpec, Plan

_BASE = Settings(
    hidden_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    dense_size=256,
    num_experts=8,
    top_k=2,
    expert_size=64,
    sequence_length=128,
    micro_batch_size=16,
    steps=1,
    learning_rate=4e-3,
    warmup_steps=20,
    validation_sequences=512,
    checkpoint_every=100,
)


def _dense(name: str, **settings: Any) -> ModelSpec:
    return ModelSpec(name=name, settings=settings)


def _moe(name: str, partner: str, router: str, *, shared: int = 0, **settings: Any) -> ModelSpec:
    return ModelSpec(name=name, partner=partner, router=router, shared_experts=shared, settings=settings)


def _rung(size: str, shape: Mapping[str, Any]) -> tuple[ModelSpec, ...]:
    """A dense model and its MoE models: router, granularity, a shared expert, dense training with sparse inference."""
    dense = f"dense-{size}"
    return (
        _dense(dense, **shape),
        _moe(f"topk-{size}", dense, "topk"),
        _moe(f"loss-free-{size}", dense, "loss-free"),
        _moe(f"bip-{size}", dense, "bip"),
        _moe(f"many-{size}", dense, "loss-free", num_experts=16),
        _moe(f"fine-{size}", dense, "loss-free", num_experts=32, top_k=8),
        _moe(f"shared-{size}", dense, "loss-free", shared=1),
        _moe(f"ds-moe-{size}", dense, "ds-moe", renormalize=False),
    )


def _small() -> Plan:
    base = _BASE.override({"validation_sequences": 1024, "learning_rate": 3e-3, "num_heads": 4, "num_kv_heads": 4})
    rungs = (
        ("s", {"hidden_size": 128, "num_layers": 3, "dense_size": 448}),
        ("m", {"hidden_size": 144, "num_layers": 4, "dense_size": 448}),
    )
    lowest = _dense("dense-xs", hidden_size=96, num_layers=3, dense_size=336)
    models = (lowest, *(model for size, shape in rungs for model in _rung(size, shape)))
    return Plan(preset="small", settings=base, models=models, budget=Budget(amount=20), seeds=(0, 1, 2), rounds=31)


def _gpu() -> Plan:
    base = _BASE.override(
        {"sequence_length": 512, "micro_batch_size": 64, "learning_rate": 1e-3, "validation_sequences": 1024}
    )
    rungs = (
        ("s", {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 8, "dense_size": 1408}),
        ("m", {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 12, "dense_size": 2048}),
    )
    models = tuple(model for size, shape in rungs for model in _rung(size, shape))
    return Plan(
        preset="gpu", settings=base, models=models, budget=Budget(amount=20), seeds=(0, 1, 2), rounds=31, multiple=64
    )


PRESETS = {
    "tiny": Plan(
        preset="tiny",
        settings=_BASE,
        models=(
            # Wide MLPs for their depth: in narrower ones the experts' fixed cost is all of the dense MLP's time.
            _dense("dense-s"),
            _dense("dense-m", hidden_size=96, dense_size=512),
            _moe("topk-m", "dense-m", "topk"),
            _moe("loss-free-m", "dense-m", "loss-free"),
        ),
        budget=Budget(amount=20),
        seeds=(0,),
        rounds=31,
    ),
    "small": _small(),
    "gpu": _gpu(),
}
"""tiny: a demonstration, minutes on two cores. small: 0.4M to 1.1M active parameters, hours for a row. gpu: one GPU."""


def preset(name: str) -> Plan:
    """The study of that name. Raises ConfigError with the nearest one."""
    fix = "pick one of these, and change its numbers with --set name=value"
    return named(name, PRESETS, what="study", where="--preset", fix=fix)
