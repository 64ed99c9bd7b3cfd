"""Entry point of the router `null-experts`."""

from __future__ import annotations

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    # Imported here: whoever only looks at this module should not pay for the router.
    from moerouters_null_experts.config import NullExpertsConfig
    from moerouters_null_experts.router import NullExpertsRouter, capabilities_of

    return (
        RouterSpec(
            name="null-experts",
            api="0.1",
            summary="Experts that compute nothing compete for slots; a token takes fewer real ones if fewer do.",
            factory=NullExpertsRouter,
            config=NullExpertsConfig,
            capabilities=capabilities_of(NullExpertsConfig()),
            reference="arXiv:2406.13233; arXiv:2509.01322, section 2.1; arXiv:2410.07348",
            equation=(
                "chosen   the K largest of s_ti + b_i over real experts and n null ones, which compute nothing\n"
                "update   b_i += rate * (1 - T_i / (K_e T / N)),  K_e = (1 - null_share) K\n"
            ),
            advice=(
                "Use it to make a model cheaper by a share that you choose, with tokens that need less taking less. "
                "Not where every token has to cost the same: the number of pairs is held on average only."
            ),
        ),
    )
