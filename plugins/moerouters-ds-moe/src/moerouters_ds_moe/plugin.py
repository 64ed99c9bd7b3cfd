"""Entry point of the router `ds-moe`."""

from __future__ import annotations

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    # Imported here: whoever only looks at this module should not pay for the router.
    from moerouters_ds_moe.config import DsMoeConfig
    from moerouters_ds_moe.router import DsMoeRouter, capabilities_of

    return (
        RouterSpec(
            name="ds-moe",
            api="0.1",
            summary="Every expert in training, with a mutual-information loss; those above a threshold at inference.",
            factory=DsMoeRouter,
            config=DsMoeConfig,
            capabilities=capabilities_of(DsMoeConfig()),
            reference="arXiv:2404.05567 (DS-MoE)",
            equation="training: y = sum over all E experts of S_i e_i(x)\n"
            "loss: alpha * (mean over tokens of H(S) - H(mean over tokens of S))\n"
            "inference: y = sum over experts with E * S_i > eps",
            gating={"score": "softmax", "renormalize": False},
            advice="Use it where training compute is there and inference is short of memory or bandwidth. Not to save "
            "training compute: it costs that of a dense model of all experts.",
        ),
    )
