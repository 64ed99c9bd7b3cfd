"""The built-in router: plain top-k, no balancing. It goes through the same hook as every plugin."""

from __future__ import annotations

from typing import ClassVar

from moerouters.capabilities import Capabilities
from moerouters.gating import Gating
from moerouters.registry import API_VERSION, RouterConfig, RouterSpec, hookimpl
from moerouters.router import Router


class TopKRouter(Router):
    """The K largest scores of each token; learns nothing, adds no loss."""

    capabilities = Capabilities()
    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating)
        self.config = config


@hookimpl
def moerouters_routers() -> tuple[RouterSpec, ...]:
    return (
        RouterSpec(
            name="topk",
            api=API_VERSION,
            summary="The K best experts of each token, without balancing.",
            factory=TopKRouter,
            capabilities=TopKRouter.capabilities,
            reference="arXiv:1701.06538 (without noise)",
            equation=("chosen   the K largest scores\nweight   the gating's\n"),
            advice=(
                "The baseline of every comparison, and the router of a trained model whose balance is settled. Not "
                "for training from scratch: without a balancer experts starve."
            ),
        ),
    )
