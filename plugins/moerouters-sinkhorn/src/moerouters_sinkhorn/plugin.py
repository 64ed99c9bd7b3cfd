"""The entry point of moerouters-sinkhorn. Importing it is cheap; the router is imported when it is asked for."""

from __future__ import annotations

from moerouters.registry import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    from moerouters_sinkhorn.config import SinkhornConfig
    from moerouters_sinkhorn.router import SinkhornRouter, capabilities_of

    return (
        RouterSpec(
            name="sinkhorn",
            api="0.1",
            summary="Chooses by Sinkhorn-normalised logits, whose experts are balanced over every training batch.",
            factory=SinkhornRouter,
            config=SinkhornConfig,
            capabilities=capabilities_of(SinkhornConfig()),
            reference="arXiv:2202.01169",
            equation=(
                "plan     max sum_te P_te l_te + temperature * H(P),  rows sum to 1, columns to n / E\n"
                "chosen   the K largest l_te - b_e, b the potential of the columns\n"
            ),
            advice=(
                "Use it to repeat results of S-BASE or Megatron's Sinkhorn routing. For balance alone `bip` does "
                "better at less cost. Not causal in training."
            ),
        ),
    )
