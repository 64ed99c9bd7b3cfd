"""Entry point of the router `noisy-topk`."""

from __future__ import annotations

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    # Imported here: whoever only looks at this module should not pay for the router.
    from moerouters_noisy_topk.config import NoisyTopkConfig
    from moerouters_noisy_topk.router import NoisyTopkRouter, capabilities_of

    return (
        RouterSpec(
            name="noisy-topk",
            api="0.1",
            summary="Top-k of logits with noise in training, fixed or learned, and importance and load losses.",
            factory=NoisyTopkRouter,
            config=NoisyTopkConfig,
            capabilities=capabilities_of(NoisyTopkConfig(), learns_noise=False),
            reference="arXiv:1701.06538",
            equation="training: experts are the K largest l + n * s, n normal, s = std or softplus(W_noise x)\n"
            "loss: w * CV(summed weights)^2 + w * CV(expected load)^2, per expert",
            advice="Use it where experts must be explored, or to reproduce models of its time. For balance alone "
            "loss-controlled and loss-free do without noise.",
        ),
    )
