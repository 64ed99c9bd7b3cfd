"""The short way through a router in eval mode gives the bits of the long one."""

import pytest
import torch
from torch import Tensor

from moerouters import API_VERSION, Gating, RouteContext, Router, RouterConfig, RouterSpec, registry, swap

from .life import MODELS, in_dtype, routers, tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("chosen_by", ["topk", "loss-free"])
def test_serving_straight_changes_no_bit(name: str, dtype: torch.dtype, chosen_by: str) -> None:
    model = tiny(name)
    swap(model, chosen_by)
    in_dtype(model, dtype)
    for router in routers(model).values():
        assert router._straight, "the short way is not taken, so this would compare the long one with itself"
        if chosen_by == "loss-free":
            router.router.get_buffer("expert_bias_E").uniform_(-0.3, 0.3)
            router.learned()
        weight = router.gating.tensors(router.gating.reading.projection.weight)
        hidden = torch.randn(1, 33, weight.shape[1]).to(weight.dtype)
        with torch.no_grad():
            short = router(hidden)
            router._straight = False
            long = router(hidden)
        for have, want in zip(short, long, strict=True):
            assert have.dtype == want.dtype
            assert torch.equal(have, want)


class Slope(Router):
    """A bias that depends on the number of experts, which it reads from the scores."""

    def __init__(self, gating: Gating, config: RouterConfig) -> None:
        super().__init__(gating)

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        return torch.linspace(0, 0.3, scores_TE.shape[1])


def test_a_bias_sees_the_scores_in_serving_too() -> None:
    model = tiny("qwen")
    spec = RouterSpec(name="slope", api=API_VERSION, summary="Prefers late experts.", factory=Slope)
    with registry.temporary(spec):
        swap(model, "slope")
    for router in routers(model).values():
        assert router._straight
        hidden = torch.randn(1, 33, router.weight.shape[1])
        with torch.no_grad():
            short = router(hidden)
            router._straight = False
            long = router(hidden)
        for have, want in zip(short, long, strict=True):
            assert torch.equal(have, want)


class Late(Router):
    """Adds to the scores what it makes of the logits."""

    def __init__(self, gating: Gating, config: RouterConfig) -> None:
        super().__init__(gating)

    def adjust(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor:
        assert ctx.logits_TE is not None
        assert ctx.logits_TE.dtype == torch.float32
        return scores_TE + 0.5 * ctx.logits_TE.sigmoid()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_see_the_logits_in_serving_too(dtype: torch.dtype) -> None:
    model = tiny("qwen")
    spec = RouterSpec(name="late", api=API_VERSION, summary="Looks at logits.", factory=Late)
    with registry.temporary(spec):
        swap(model, "late")
    in_dtype(model, dtype)
    for router in routers(model).values():
        hidden = torch.randn(1, 33, router.weight.shape[1]).to(router.weight.dtype)
        with torch.no_grad():
            short = router(hidden)
            router._lean = False
            long = router(hidden)
        for have, want in zip(short, long, strict=True):
            assert torch.equal(have, want)
