"""The probe routers, one per file of at most 40 lines; each has `make(top_k)`, a router over 8 experts, width 6."""

from collections.abc import Callable

from moerouters import Router

from . import (
    bip,
    ds_moe_dense,
    ds_moe_threshold,
    expert_choice,
    hash_tokens,
    lagged_quantile,
    noisy_topk,
    relu_routing,
    sinkhorn,
)

NUM_EXPERTS = 8
HIDDEN_SIZE = 6

PROBES: dict[str, Callable[..., Router]] = {
    "bip": bip.make,
    "ds-moe-dense": ds_moe_dense.make,
    "ds-moe-threshold": ds_moe_threshold.make,
    "expert-choice": expert_choice.make,
    "hash": hash_tokens.make,
    "lagged-quantile": lagged_quantile.make,
    "noisy-topk": noisy_topk.make,
    "relu": relu_routing.make,
    "sinkhorn": sinkhorn.make,
}
