"""Entry point of the router `loss-controlled`."""

from __future__ import annotations

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    # Imported here: whoever only looks at this module should not pay for the router.
    from moerouters_loss_controlled.config import LossControlledConfig
    from moerouters_loss_controlled.router import LossControlledRouter, capabilities_of

    return (
        RouterSpec(
            name="loss-controlled",
            api="0.1",
            summary="Top-k with auxiliary losses over micro-batch, sequence or global batch, and a z-loss.",
            factory=LossControlledRouter,
            config=LossControlledConfig,
            capabilities=capabilities_of(LossControlledConfig()),
            reference="arXiv:2101.03961 (Switch), arXiv:2006.16668 (GShard), arXiv:2202.08906 (z-loss)",
            equation=(
                "chosen   the K largest scores\n"
                "loss     alpha * sum_e f_e P_e,  f_e = E / (K T) * (tokens of e),  P_e = mean probability of e\n"
            ),
            advice=(
                "Use it where a paper's or a model's recipe has it, and alpha is tuned: a small one balances late, a "
                "large one costs quality. Not where every batch has to be balanced."
            ),
            baselines=({"alpha": 0.1},),
        ),
    )
