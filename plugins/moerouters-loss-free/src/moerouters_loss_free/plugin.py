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
        ),
    )
