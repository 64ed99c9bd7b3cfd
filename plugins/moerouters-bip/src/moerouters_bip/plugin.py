"""The entry point of moerouters-bip. Importing it is cheap; the routers are imported when they are asked for."""

from __future__ import annotations

from moerouters.registry import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    from moerouters_bip import quantile, router
    from moerouters_bip.config import BipConfig, QuantileConfig
    from moerouters_bip.online_router import bip_router

    return (
        RouterSpec(
            name="bip",
            api="0.1",
            summary="Balances every batch as it routes it, by a few dual steps of the assignment problem.",
            factory=bip_router,
            config=BipConfig,
            capabilities=router.capabilities_of(BipConfig()),
            reference="arXiv:2502.15451",
            equation="q_e = the nK/E-th largest of s_e - p over n tokens, p_t = the K-th largest of s_t - q; "
            "experts: the K largest s - q.",
            advice="For balance from the first batch on, without an auxiliary loss. Not where training must be causal: "
            "there use quantile or loss-free.",
        ),
        RouterSpec(
            name="quantile",
            api="0.1",
            summary="Learns from each step the prices that would have balanced it; causal, without an auxiliary loss.",
            factory=quantile.QuantileRouter,
            config=QuantileConfig,
            capabilities=quantile.capabilities_of(QuantileConfig()),
            reference="arXiv:2502.15451 (one lagged step; Megatron-LM's and Kimi K3's quantile balancing)",
            equation="After a step q_e = the nK/E-th largest of s_e - p over its tokens; experts: the K largest s - q.",
            advice="For balance after a few steps in a causal model. Not for the first batch, nor for batches of few "
            "tokens per expert.",
        ),
    )
