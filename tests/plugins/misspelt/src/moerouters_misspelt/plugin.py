"""The hook is called moerouters_routers; without a check this plugin would silently offer nothing."""

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_router() -> tuple[RouterSpec, ...]:
    return (RouterSpec(name="misspelt", summary="Never seen.", factory=dict, api="0.1"),)
