"""Fine by itself; beside the other twin nobody can know which one a run means."""

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    return (RouterSpec(name="twin", summary="The twin A.", factory=dict, api="0.1"),)
