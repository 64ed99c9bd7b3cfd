"""Declares an API version that this host does not speak; its factory would fail in some other way."""

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    return (RouterSpec(name="future", summary="From the future.", factory=dict, api="9.0"),)
