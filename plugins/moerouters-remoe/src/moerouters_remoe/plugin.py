"""Entry point of the router `remoe`."""

from __future__ import annotations

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    # Imported here: whoever only looks at this module should not pay for the router.
    from moerouters_remoe.config import RemoeConfig
    from moerouters_remoe.router import RemoeRouter

    return (
        RouterSpec(
            name="remoe",
            api="0.1",
            summary="Every expert with a positive relu score; an adaptive L1 loss keeps K of them on average.",
            factory=RemoeRouter,
            config=RemoeConfig,
            capabilities=RemoeRouter.capabilities,
            reference="arXiv:2412.14711",
            equation="experts: all with R = relu(logit) > 0, weighed by R\n"
            "loss: lambda / T * sum over t, e of f_e R_te, f_e = E / (K T) * (tokens with R_te > 0)\n"
            "after a step: lambda *= alpha where a token has more than K experts on average, /= alpha where fewer",
            advice="Use it for training from scratch, where tokens shall have as many experts as they need. Not for a "
            "trained top-k model, nor where each step must fit a fixed budget: the first ones are dense.",
            gating={"score": "relu", "renormalize": False},
        ),
    )
