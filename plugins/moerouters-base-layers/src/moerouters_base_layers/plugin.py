"""The entry point of moerouters-base-layers. Importing it is cheap; the router is imported when it is asked for."""

from __future__ import annotations

from moerouters.registry import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    from moerouters_base_layers.config import BaseLayersConfig
    from moerouters_base_layers.router import BaseLayersRouter

    return (
        RouterSpec(
            name="base-layers",
            api="0.1",
            summary="Exactly balanced assignment of every training batch, by auction; greedy top-K in eval.",
            factory=BaseLayersRouter,
            config=BaseLayersConfig,
            capabilities=BaseLayersRouter.capabilities,
            reference="arXiv:2103.16716",
            equation=(
                "training   max sum_te s_te x_te,  sum_e x_te = K,  sum_t x_te = n K / E, rounded   (auction)\n"
                "eval       the K largest s_te\n"
            ),
            advice=(
                "Use it where every expert must get exactly its share of every training batch. Not for decoders that "
                "must not see later tokens, nor where the load in eval matters: it is then plain top-k."
            ),
        ),
    )
