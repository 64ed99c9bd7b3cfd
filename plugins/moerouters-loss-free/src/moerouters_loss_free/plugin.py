"""Entry point of the router `loss-free`."""

from __future__ import annotations

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    # Imported here: whoever only looks at this module should not pay for the router.
    from moerouters_loss_free.config import LossFreeConfig
    from moerouters_loss_free.router import LossFreeRouter

    return (
        RouterSpec(
            name="loss-free",
            api="0.1",
            summary="A bias per expert follows the load and steers the choice, never the weights; no auxiliary loss.",
            factory=LossFreeRouter,
            config=LossFreeConfig,
            capabilities=LossFreeRouter.capabilities,
            reference="arXiv:2408.15664",
            equation=(
                "chosen   the K largest s_te + b_e\n"
                "update   b_e += rate * sign(mean load - load of e), once per optimizer step\n"
            ),
            advice=(
                "Use it for long trainings where routing has to stay causal and no loss may disturb the language "
                "loss. Not for short ones: at rate 0.001 the bias takes hundreds to thousands of steps."
            ),
        ),
    )
