"""What each adapter computes on its own: weights for any choice, capacities, skipped tokens, what it refuses."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from moerouters.errors import UnsupportedError
from moerouters.swapping import swap, unswap
from moerouters.swapping.adapters import REFUSED
from moerouters.swapping.adapters.base import linear, parts, setting
from moerouters.swapping.adapters.dbrx import DbrxGating
from moerouters.swapping.adapters.inkling import InklingGating
from moerouters.swapping.adapters.jetmoe import JetMoeAdapter
from moerouters.swapping.adapters.llama4 import Llama4Adapter
from moerouters.swapping.adapters.phimoe import PhimoeAdapter
from moerouters.swapping.adapters.switch import SwitchAdapter
from moerouters.swapping.find import find
from moerouters.swapping.stock import Stock
from moerouters.swapping.understand import NotARouter, NotUnderstood

from .test_adapters import CLASSES, outputs, same, swapped_routers
from .zoo import tiny_inputs, tiny_model
from .zoo_configs import EXPERTS


def swapped(name: str, router: str = "topk", **changes: Any) -> tuple[PreTrainedModel, Any]:
    """A tiny model and its first router, swapped; `changes` are attributes that its stock routers get before."""
    model = tiny_model(CLASSES[name])
    for found in find(model):
        for key, value in changes.items():
            setattr(found.module, key, value)
    swap(model, router)
    return model, swapped_routers(model)[0]


def by_hand(logits: list[float], ids: list[int], jitter: float) -> list[float]:
    """Sparsemixer weights of one token, expert by expert."""
    weights = []
    for own in ids:
        c = logits[own]
        left = [e for e in range(len(logits)) if e == own or e not in ids or logits[e] < c]
        near = [e for e in left if (c - logits[e]) / max(abs(logits[e]), c) <= 2 * jitter]
        weights.append(math.exp(c) / sum(math.exp(logits[e]) for e in near))
    return weights


@pytest.fixture(scope="module")
def gating() -> Any:
    return swapped("PhimoeTopKRouter")[1].gating


class TestSparsemixer:
    @staticmethod
    def logits() -> Tensor:
        return 3 * torch.randn(40, EXPERTS, generator=torch.Generator().manual_seed(3)) - 1

    def test_stock_ids(self, gating: Any) -> None:
        weights_TK, ids_TK = sparsemixer(self.logits(), gating.reading.jitter, training=False)  # type: ignore[no-untyped-call]
        assert torch.equal(gating.weigh(self.logits(), ids_TK), weights_TK)

    def test_any_ids(self, gating: Any) -> None:
        ids_TK = torch.rand(40, EXPERTS, generator=torch.Generator().manual_seed(4)).argsort(dim=-1)[:, :3]
        weights_TK = gating.weigh(self.logits(), ids_TK)
        rows = zip(self.logits().tolist(), ids_TK.tolist(), strict=True)
        torch.testing.assert_close(weights_TK, torch.tensor([by_hand(*row, gating.reading.jitter) for row in rows]))
        assert (weights_TK > 0).all()
        assert torch.equal(gating.weigh(self.logits(), ids_TK.flip(1)), weights_TK.flip(1))

    def test_empty_slots(self, gating: Any) -> None:
        logits_TE = self.logits()[:2].requires_grad_()
        weights_TK = gating.weigh(logits_TE, torch.tensor([[EXPERTS, 3], [EXPERTS, EXPERTS]]))
        assert torch.equal(weights_TK[0, 1:], gating.weigh(logits_TE, torch.tensor([[3], [3]]))[0])
        assert not weights_TK[0, 0] and not weights_TK[1].any()
        (grad_TE,) = torch.autograd.grad(weights_TK.sum(), logits_TE)
        assert grad_TE.isfinite().all() and not grad_TE[1].any()

    def test_is_told(self, gating: Any) -> None:
        assert str(gating.reading) == "top 2 of 8, sparsemixer weights with jitter 0.3"


def test_inkling_shares_one_sum_among_routed_and_shared() -> None:
    gating = swapped("InklingTopkRouter")[1].gating
    assert isinstance(gating, InklingGating) and "with 1 shared" in str(gating.reading)
    logits_TA = torch.randn(4, EXPERTS + 1, generator=torch.Generator().manual_seed(5))
    ids_TK = torch.tensor([[0, 1], [7, 2], [3, EXPERTS], [EXPERTS, EXPERTS]])
    empty_TK = ids_TK == EXPERTS
    weights_TK, gammas = gating.weigh_all(logits_TA, ids_TK, empty_TK)
    total_T = weights_TK.sum(dim=-1) + gammas.sum(dim=-1)
    scale = 1.5 * gating.tensors("global_scale").detach()
    torch.testing.assert_close(total_T, scale.expand(4))
    assert not weights_TK[empty_TK].any()
    # On its own a router knows no shared experts.
    alone_TK = gating.weigh(logits_TA[:, :EXPERTS].sigmoid(), ids_TK)
    torch.testing.assert_close(alone_TK[:3].sum(dim=-1), scale.expand(3))


class Fixed:
    """A swapped router in which somebody chose these weights and ids."""

    def __init__(self, module: Any, weights_TK: Tensor, ids_TK: Tensor) -> None:
        self.gating = module.gating
        self.chosen = weights_TK, ids_TK

    def route(self, logits_TE: Tensor, hidden_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.chosen


def test_llama4_keeps_a_score_beside_an_empty_slot_of_the_same_id() -> None:
    body = Fixed(swapped("Llama4Router")[1], torch.tensor([[0.7, 0.0]]), torch.tensor([[3, 3]]))
    scores_TE, _ = Llama4Adapter().forward(body, torch.zeros(1, 32))
    assert scores_TE[0].nonzero().tolist() == [[3]] and scores_TE[0, 3] == 0.7


def test_jetmoe_refuses_another_number_of_slots() -> None:
    body = Fixed(swapped("JetMoeTopKGating")[1], torch.ones(2, 3), torch.tensor([[0, 1, 2], [3, 4, 5]]))
    with pytest.raises(UnsupportedError, match="gives 3 slots per token, this block takes 2"):
        JetMoeAdapter().forward(body, torch.zeros(2, 32))


def test_switch_drops_what_exceeds_the_capacity() -> None:
    model = tiny_model(CLASSES["SwitchTransformersTop1Router"])
    for found in find(model):
        found.module.expert_capacity = 2  # type: ignore[assignment]
    inputs = tiny_inputs(model)
    stock = outputs(model, inputs)
    swap(model, "topk")
    assert same(outputs(model, inputs), stock)
    one_hot = swapped_routers(model)[0](torch.ones(1, 5, 32))[0]
    assert one_hot.sum(dim=-1).tolist() == [[1, 1, 0, 0, 0]]


def test_switch_knows_float32_routers_only() -> None:
    with pytest.raises(UnsupportedError, match=r"its router_dtype is torch.bfloat16"):
        swapped("SwitchTransformersTop1Router", dtype=torch.bfloat16)


def test_zaya_skips_as_the_stock_router_does() -> None:
    model = tiny_model(CLASSES["ZayaRouter"])
    for found in find(model):
        found.stock("balancing_biases")[-1] = 10.0
    stock = outputs(model, tiny_inputs(model))
    swap(model, "topk")
    assert same(outputs(model, tiny_inputs(model)), stock)
    _, weights_TK, ids_TK, _ = swapped_routers(model)[0](torch.randn(1, 5, 32))
    assert not weights_TK.any() and not ids_TK.any()


def test_dbrx_blocks_get_their_method_back() -> None:
    model, router = swapped("DbrxRouter")
    block = router.gating.tensors.block
    twin: Any = swapped_routers(copy.deepcopy(model))[0]
    assert block.route_tokens_to_experts.__self__ is router.gating
    assert twin.gating.tensors.block.route_tokens_to_experts.__self__ is twin.gating is not router.gating
    with pytest.raises(UnsupportedError, match="without the router before it"):
        block.route_tokens_to_experts(torch.zeros(1, EXPERTS))
    swap(model, "bip")
    assert isinstance(router.gating, DbrxGating) and block.route_tokens_to_experts.__self__ is router.gating
    unswap(model)
    assert "route_tokens_to_experts" not in block.__dict__


def test_nllb_is_refused_since_its_block_ignores_who_was_chosen() -> None:
    model = tiny_model(CLASSES["NllbMoeTop2Router"])
    before = outputs(model, tiny_inputs(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f"experts.expert_{i}." in name for i in range(2, EXPERTS)):
                parameter.zero_()
    assert same(outputs(model, tiny_inputs(model)), before)
    with pytest.raises(UnsupportedError, match="whichever experts were chosen"):
        swap(model, "topk")
    assert REFUSED.keys() <= CLASSES.keys()


@pytest.mark.parametrize("adapter", [PhimoeAdapter(), SwitchAdapter()])
def test_other_releases_are_not_understood(adapter: Any) -> None:
    stock = Stock(nn.Linear(3, 4), nn.Identity())
    with pytest.raises(NotUnderstood, match="as its class had in the releases that are known"):
        adapter.read(stock)
    assert setting(stock, "out_features") == 4 and linear(stock).bias == "bias"
    with pytest.raises(NotARouter, match="it returns 2 results, where its class returned 5"):
        parts((1, 2), 5)
    with pytest.raises(NotARouter, match="it returns a int"):
        parts(3, 5)
