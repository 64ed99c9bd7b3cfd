"""Entry point of the router `device-limited`."""

from __future__ import annotations

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    # Imported here: whoever only looks at this module should not pay for the router.
    from moerouters_device_limited.config import DeviceLimitedConfig
    from moerouters_device_limited.router import capabilities_of, make_router

    return (
        RouterSpec(
            name="device-limited",
            api="0.1",
            summary="A token's experts lie on at most M devices; losses balance experts, devices and their traffic.",
            factory=make_router,
            config=DeviceLimitedConfig,
            capabilities=capabilities_of(DeviceLimitedConfig()),
            reference="arXiv:2405.04434, sections 2.2.2 and 2.2.3; arXiv:2412.19437, section 2.1.2",
            equation=(
                "kept     the M devices with the highest affinity\n"
                "chosen   the K largest scores on kept devices\n"
                "loss     over experts, devices, and tokens sent to devices: alpha_1..3 * sum f P\n"
            ),
            advice=(
                "Use it where experts are spread over devices or nodes and the exchange of tokens is what a step "
                "waits for. On one device take `loss-controlled` or `loss-free`."
            ),
        ),
    )
