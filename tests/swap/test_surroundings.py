"""What a swapped router is told of the batch, and whose hooks they are."""

import torch
from torch import Tensor

from moerouters import Capabilities, Gating, RouteContext, Router, RouterConfig, RouterSpec, swap, unswap
from moerouters.registry import API_VERSION, temporary

from .life import batch, gates, hooks, logits, routers, tiny


class ByToken(Router):
    """Prefers an expert that the first token of the batch names: a bias that looks at the batch, in eval too."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating)
        self.config = config

    def bias_E(self, scores_TE: Tensor, ctx: RouteContext) -> Tensor | None:
        token_ids_T = ctx.need("token_ids_T", router="by-token")
        bias_E = torch.zeros(self.gating.num_experts)
        bias_E[int(token_ids_T[:1].sum()) % self.gating.num_experts] = 9.0
        return bias_E


SPEC = RouterSpec(
    name="by-token", api=API_VERSION, summary="Follows a token.", factory=ByToken, capabilities=Capabilities()
)


def test_a_bias_may_look_at_the_batch_in_eval() -> None:
    model = tiny("qwen")
    with temporary(SPEC):
        swap(model, "by-token")
    seen: list[Tensor] = []
    for gate in gates(model).values():
        gate.register_forward_hook(lambda _, args, out: seen.append(out[2]))
    inputs = batch()
    logits(model, inputs)
    favourite = int(inputs["input_ids"][0, 0]) % 8
    assert len(seen) == len(gates(model))
    assert all((ids_TK == favourite).any(dim=1).all() for ids_TK in seen)


def test_a_part_swapped_first_makes_way_for_the_whole() -> None:
    """The hooks after both are those of the whole alone, and none are left after its unswap."""
    model, whole = tiny("qwen", train=True), tiny("qwen", train=True)
    untouched = hooks(model)
    swap(model.model, "topk")
    swap(model, "loss-free")
    swap(whole, "loss-free")
    assert {each.router_name for each in routers(model).values()} == {"loss-free"}
    assert hooks(model) == hooks(whole)
    unswap(model)
    assert hooks(model) == untouched
