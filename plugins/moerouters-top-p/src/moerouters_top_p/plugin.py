"""Entry point of the router `top-p`."""

from __future__ import annotations

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    # Imported here: whoever only looks at this module should not pay for the router.
    from moerouters_top_p.config import TopPConfig
    from moerouters_top_p.router import TopPRouter, capabilities_of

    return (
        RouterSpec(
            name="top-p",
            api="0.1",
            summary="The fewest experts that hold a share p of a token's probability: hard tokens get more.",
            factory=TopPRouter,
            config=TopPConfig,
            capabilities=capabilities_of(TopPConfig()),
            reference="arXiv:2403.07652",
            equation="experts: the fewest by falling score whose probabilities P sum to p\n"
            "loss: alpha * E * sum over e of share_e mean(P_e) + beta * mean entropy of P",
            advice="Use it for training where compute shall follow difficulty, or with max_experts=K to prune a "
            "trained top-k model. Not where each step must fit a fixed budget.",
        ),
    )
