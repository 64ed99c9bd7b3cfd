"""Mixture of attention heads: against a loop over experts, in a model, and under a trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moerouters import AssignmentKind, Capabilities, RouteContext, Router, Selection
from moerouters.builtin import TopKRouter
from moerouters.errors import ConfigError
from moerouters.lab.attention import Attention, MixtureOfAttention, rotary_table, rotate
from moerouters.lab.model import LanguageModel
from support.balanced import Balanced
from support.lab import SMALL, small_corpus, trainer

EXPERTS, KV, HEADS, D = 3, 2, 12, 24
PARTS = SMALL.override(
    {"hidden_size": D, "num_heads": HEADS, "num_kv_heads": KV, "attention_experts": EXPERTS, "attention_top_k": 2}
)


class Everything(Router):
    """Every expert for every token."""

    capabilities = Capabilities(assignment=AssignmentKind.DENSE)

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        T, E = adjusted_TE.shape
        return Selection.dense(num_tokens=T, num_experts=E, device=adjusted_TE.device)


def model(settings: Any, router: type[Router] = TopKRouter) -> LanguageModel:
    torch.manual_seed(0)
    layers = range(settings.num_layers)
    of_attention = [router(settings.attention_gating()) for _ in layers if settings.attention_experts > 1]
    return LanguageModel(settings, [router(settings.gating()) for _ in layers], of_attention)


def tokens(batch: int = 2, length: int = 8) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))


def by_loop(layer: MixtureOfAttention, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], weights: Any) -> Tensor:
    """O = sum over experts of weight * sum over its heads of softmax(Q K^T) V W_o, an expert and a head at a time."""
    attention, size, own = layer.attention, D // HEADS, HEADS // EXPERTS
    projected = (x_BSD @ attention.qkv.weight.t()).unflatten(-1, (-1, size))
    query, key, value = projected.split([HEADS, KV, KV], dim=2)
    out = torch.zeros_like(x_BSD)
    for expert in range(EXPERTS):
        for head in range(own):
            q = rotate(query[:, :, expert * own + head].unsqueeze(1), rotary)
            k = rotate(key[:, :, head // (own // KV)].unsqueeze(1), rotary)
            v = value[:, :, head // (own // KV)].unsqueeze(1)
            y_BSd = F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
            columns = slice((expert * own + head) * size, (expert * own + head + 1) * size)
            out = out + weights[..., expert, None] * (y_BSd @ attention.out.weight[:, columns].t())
    return out


@pytest.mark.parametrize("router", [TopKRouter, Everything])
def test_equals_the_loop_over_experts(router: type[Router]) -> None:
    torch.manual_seed(0)
    layer = MixtureOfAttention(PARTS, router(PARTS.attention_gating()))
    x_BSD, rotary = torch.randn(2, 5, D), rotary_table(5, D // HEADS, torch.device("cpu"))
    y_BSD, assignment = layer(x_BSD, rotary, RouteContext())
    scores_TE = F.linear(x_BSD.flatten(0, 1), layer.gate.weight).softmax(dim=-1)
    if router is TopKRouter:
        kept = scores_TE.topk(2, dim=-1)
        scores_TE = torch.zeros_like(scores_TE).scatter(1, kept.indices, kept.values / kept.values.sum(-1, True))
    expected = by_loop(layer, x_BSD, rotary, scores_TE.reshape(2, 5, EXPERTS))
    torch.testing.assert_close(y_BSD, expected, rtol=1e-4, atol=1e-5)
    assert assignment.num_experts == EXPERTS
    y_BSD.square().sum().backward()
    assert layer.gate.weight.grad.abs().sum() > 0


def test_padding_weighs_nothing() -> None:
    torch.manual_seed(0)
    layer = MixtureOfAttention(PARTS, TopKRouter(PARTS.attention_gating()))
    valid_T = torch.arange(5) != 3
    rotary = rotary_table(5, D // HEADS, torch.device("cpu"))
    y_BSD, assignment = layer(torch.randn(1, 5, D), rotary, RouteContext(valid_T=valid_T))
    assert int(assignment.load_E.sum()) == 8
    assert not y_BSD[0, 3].any()


def test_attention_is_plain_unless_asked_for() -> None:
    net = model(SMALL)
    assert all(type(block.attention) is Attention for block in net.blocks)
    assert not net(tokens()).of_attention
    assert {"blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight"} <= net.state_dict().keys()


def test_every_layer_routes_its_attention() -> None:
    output = model(PARTS)(tokens())
    assert [int(a.load_E.sum()) for a in output.of_attention] == [2 * 8 * 2] * PARTS.num_layers
    assert len(output.assignments) == PARTS.num_layers
    everyone = PARTS.override({"attention_top_k": None})
    assert {tuple(a.load_E.tolist()) for a in model(everyone)(tokens()).of_attention} == {(16,) * EXPERTS}


def test_losses_of_the_attention_have_a_factor_of_their_own() -> None:
    whole, less = (model(PARTS.override({"attention_loss": f}), Balanced)(tokens()) for f in (1.0, 0.25))
    attended = sum(a.losses["switch"].item() for a in whole.of_attention)
    assert attended > 0
    assert whole.aux_loss().item() - less.aux_loss().item() == pytest.approx(0.75 * attended)


def test_a_token_sees_no_later_one() -> None:
    net, before = model(PARTS, Everything).eval(), tokens()
    after = before.clone()
    after[:, 5] = (after[:, 5] + 1) % 256
    first, second = net(before).logits_BSV, net(after).logits_BSV
    torch.testing.assert_close(first[:, :5], second[:, :5], rtol=0, atol=0)
    assert not torch.allclose(first[:, 5:], second[:, 5:])


def test_trains_and_resumes(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    run = trainer(corpus, settings=PARTS)
    for _ in range(3):
        run.train_step()
    assert run.history.tensors()["loads"].shape == (3, PARTS.num_layers, PARTS.num_experts)
    assert len(run.handle.loads) == 2 * PARTS.num_layers
    again = trainer(corpus, settings=PARTS)
    again.load_state(run.state())
    assert again.validation_loss() == run.validation_loss()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_experts": 4}, "a multiple of num_kv_heads 2"),
        ({"attention_top_k": 4}, "attention_top_k 4 exceeds"),
        ({"attention_loss": 0}, "attention_loss"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PARTS.override(changes)
