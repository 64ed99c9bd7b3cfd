"""From dense to sparse and back: in layers, and in Hugging Face models whose routers were swapped."""

from typing import Any

import pytest
import torch
from torch import nn

import moerouters
from moerouters import Gating, MoELayer, attach, record
from moerouters.errors import ConfigError
from moerouters_ds_moe import active_share, active_shares, sparse, train_dense
from moerouters_ds_moe.modes import routers_of

E, K, D = 8, 2, 16


def layers() -> nn.Sequential:
    """Two, whose gates prefer some experts of each token."""
    torch.manual_seed(0)
    made = []
    for _ in range(2):
        router = moerouters.build("ds-moe", Gating.softmax(E, K, renormalize=False))
        layer = MoELayer(router, hidden_size=D, expert_size=8)
        layer.gate.weight.data.mul_(4)
        made.append(layer)
    return nn.Sequential(*made)


def olmoe(experts_per_token: int = K, **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.OlmoeConfig(
        vocab_size=50,
        num_hidden_layers=2,
        num_experts=E,
        num_experts_per_tok=experts_per_token,
        norm_topk_prob=False,
        pad_token_id=0,
        **sizes,
        **changes,
    )
    return transformers.OlmoeForCausalLM(config).eval()  # type: ignore[no-any-return]


TOKENS = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def test_layers_change_sides() -> None:
    model, x_TD = layers(), torch.randn(64, D)
    train_dense(model)
    assert model.training
    dense = model[0].eval()(x_TD)
    assert active_share(dense.assignment) == 1
    assert model[0].router.eval()(torch.randn(3, E)).kind == "dense"
    sparse(model, eps=1.0)
    assert not model.training
    few = model[0](x_TD)
    assert 0.1 < active_share(few.assignment) < 0.6
    sparse(model, eps=0.0)
    torch.testing.assert_close(model[0](x_TD).hidden, dense.hidden)
    sparse(model, top_k=3)
    assert active_share(model[0](x_TD).assignment) == 3 / E
    assert [router.config.inference for router in routers_of(model).values()] == ["top_k", "top_k"]
    assert model[0].train()(x_TD).assignment.kind == "dense"


def test_what_is_left_out_stays() -> None:
    model = sparse(layers(), eps=0.7, top_k=2)
    (config,) = {router.config for router in routers_of(model).values()}
    assert (config.inference, config.eps, config.top_k) == ("top_k", 0.7, 2)
    (config,) = {router.config for router in routers_of(sparse(model, inference="threshold_top_k")).values()}
    assert (config.inference, config.eps, config.top_k) == ("threshold_top_k", 0.7, 2)


def test_some_layers_stay_as_they_are() -> None:
    model = sparse(train_dense(layers()), eps=0.7, layers="1.*")
    assert [router.config.inference for router in routers_of(model).values()] == ["dense", "threshold"]
    with pytest.raises(ConfigError, match=r"no router 'ds-moe' whose name matches 'x\.\*'"):
        sparse(model, layers="x.*")


def test_nothing_changes_where_something_is_wrong() -> None:
    model = layers()
    with pytest.raises(ConfigError, match="eps"):
        sparse(model, eps=-1.0)
    with pytest.raises(ConfigError, match="top_k=9, and there are 8"):
        sparse(model, top_k=9)
    narrow = moerouters.build("ds-moe", Gating.softmax(4, K, renormalize=False))
    both = nn.ModuleList([model, MoELayer(narrow, hidden_size=D, expert_size=8)])
    with pytest.raises(ConfigError, match="top_k=6, and there are 4"):
        sparse(both, top_k=6)
    assert both.training
    assert {router.config.inference for router in routers_of(both).values()} == {"threshold"}
    with pytest.raises(ConfigError, match="Linear has no router 'ds-moe'"):
        train_dense(nn.Linear(2, 2))


def test_shares_of_a_model_leave_padding_out() -> None:
    model = sparse(layers(), top_k=2)
    valid_T = torch.arange(10) < 7
    with record(model) as tape:
        model[0](torch.randn(10, D), moerouters.RouteContext(valid_T=valid_T))
        model[0](torch.randn(4, D))
    assert active_shares(tape) == {"0": 2 / E, "1": 0.0}


def test_active_share_of_nothing() -> None:
    assert active_share(sparse(layers())[0](torch.zeros(0, D)).assignment) == 0


@torch.no_grad()
def test_a_swapped_model_computes_every_expert_or_the_chosen_ones() -> None:
    model, dense = olmoe(), olmoe(experts_per_token=E)
    stock = model(TOKENS).logits
    moerouters.swap(model, "ds-moe")
    train_dense(model).eval()
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits)
    sparse(model, eps=0.0)
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits)
    sparse(model, top_k=K)
    torch.testing.assert_close(model(TOKENS).logits, stock)
    with record(model) as tape:
        model(TOKENS)
    assert set(active_shares(tape).values()) == {K / E}


def test_a_swapped_model_trains_densely() -> None:
    """Every expert learns from every token; the loss of the plug-in reaches the gate; padding counts nowhere."""
    model = olmoe()
    moerouters.swap(model, "ds-moe", config={"alpha": 1.0})
    train_dense(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = attach(optimizer, model)
    mask = torch.ones_like(TOKENS)
    mask[1, 8:] = 0
    model(TOKENS, attention_mask=mask, labels=TOKENS).loss.backward()
    experts = model.model.layers[0].mlp.experts
    assert bool((experts.gate_up_proj.grad.abs().amax(dim=(1, 2)) > 0).all())
    optimizer.step()
    assert {tuple(load.tolist()) for load in handle.loads.values()} == {(20,) * E}


@torch.no_grad()
def test_a_renormalising_model_is_taken() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=D, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    stock = model(TOKENS).logits
    moerouters.swap(model, "ds-moe", config={"inference": "top_k"})
    torch.testing.assert_close(model(TOKENS).logits, stock)
