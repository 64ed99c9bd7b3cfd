"""Entry point of the router `hash`."""

from __future__ import annotations

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    # Imported here: whoever only looks at this module should not pay for the router.
    from moerouters_hash.config import HashConfig
    from moerouters_hash.router import HashRouter

    return (
        RouterSpec(
            name="hash",
            api="0.1",
            summary="Experts by a hash of the token id, plain or balanced by token frequency; nothing is learned.",
            factory=HashRouter,
            config=HashConfig,
            capabilities=HashRouter.capabilities,
            reference="arXiv:2106.04426",
            equation="experts: K different ones by a hash of the vocabulary id\n"
            "balanced: ids by falling frequency, each to the K experts with the least so far",
            advice="Use it as a baseline, or where a learned router is too fragile. Not where context decides what a "
            "token means, nor where token ids are not at hand.",
        ),
    )
