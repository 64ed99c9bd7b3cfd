"""The entry point of moerouters-bip. Importing it is cheap; the router is imported when it is asked for."""

from __future__ import annotations

from moerouters.registry import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    from moerouters_bip.config import BipConfig
    from moerouters_bip.router import BipRouter, capabilities_of

    return (
        RouterSpec(
            name="bip",
            api="0.1",
            summary="Balances every batch as it routes it, by a few dual steps of the assignment problem.",
            factory=BipRouter,
            config=BipConfig,
            capabilities=capabilities_of(BipConfig()),
            reference="arXiv:2502.15451",
        ),
    )
