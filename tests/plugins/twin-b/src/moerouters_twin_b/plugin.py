"""Fine by itself; beside the other twin nobody can know which one a run means."""

from moerouters import RouterSpec, hookimpl


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    return (
        RouterSpec(name="twin", summary="The twin B.", factory=dict, api="0.1"),
        RouterSpec(name="topk", summary="An impostor.", factory=dict, api="0.1"),
    )
