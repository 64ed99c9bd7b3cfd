"""Every hook, implemented as the plugin guide says."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from moerouters import RouterConfig, RouterSpec, hookimpl
from moerouters.registry import DispatcherSpec

HEARD: list[Mapping[str, Any]] = []


class GoodConfig(RouterConfig):
    """Settings of the two routers."""

    rate: float = Field(default=0.5, gt=0, description="How fast it learns.")


def good(gating: object, config: GoodConfig) -> tuple[object, GoodConfig]:
    """Stand in for a Router class; what the registry hands over is what the tests look at."""
    return gating, config


def pigeon(*, site: Any) -> Any:
    """Imported when a layer wants one: naming a router costs nothing of it."""
    from moerouters_good.dispatcher import Pigeon

    return Pigeon(site=site)


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    return (
        RouterSpec(name="good", summary="A well-behaved router.", factory=good, config=GoodConfig, api="0.1"),
        RouterSpec(name="good-louder", summary="Its variant.", factory=good, config=GoodConfig, api="0.1"),
    )


@hookimpl
def moerouters_dispatchers() -> tuple[DispatcherSpec, ...]:
    return (DispatcherSpec(name="pigeon", summary="Carries tokens there and back.", factory=pigeon),)


@hookimpl
def moerouters_step_metrics(metrics: Mapping[str, Any]) -> None:
    HEARD.append(metrics)
