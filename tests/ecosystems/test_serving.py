"""What serving engines are given, without an engine: the choices of the trained model, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moerouters
from moerouters import Gating, MoELayer
from moerouters.ecosystems.serving import Request, ServedRouter, layer_number
from moerouters.errors import ConfigError, ContextError, TraceError, UnsupportedError

D, E, K, T = 8, 6, 2, 40


class Model(nn.Module):
    """Two MoE layers whose routers have learned something."""

    def __init__(self, router: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            MoELayer(moerouters.build(router, gating()), hidden_size=D, expert_size=4) for _ in range(2)
        )
        for layer in self.layers:
            for name in layer.router.state_names():
                layer.router.get_buffer(name).uniform_(-0.2, 0.2)


def gating(**settings: object) -> Gating:
    return Gating.softmax(E, K, **settings)


def logits() -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(1))


def saved(router: str, folder: Path) -> tuple[Model, Request]:
    model = Model(router).eval()
    moerouters.save_router_state(model, folder / "state.safetensors")
    return model, Request(router=router, state=str(folder / "state.safetensors"))


@pytest.mark.parametrize("router", ["topk", "loss-free", "bip", "quantile", "sinkhorn", "null-experts"])
def test_an_engine_chooses_what_the_trained_model_chooses(router: str, tmp_path: Path) -> None:
    model, request = saved(router, tmp_path)
    for number, layer in enumerate(model.layers):
        served = ServedRouter(request, gating(), layer=number, correction_E=None)
        weights_TK, ids_TK = served(torch.zeros(T, D), logits(), K, True)
        expected_ids_TK, expected_TK = layer.router(logits()).to_slots()
        assert torch.equal(ids_TK, expected_ids_TK.int()) and ids_TK.dtype == torch.int32
        assert torch.equal(weights_TK, expected_TK) and weights_TK.dtype == torch.float32
    other = Model(router).layers[0]
    if other.router.state_names() and router != "null-experts":
        other.router.reset_state()
        assert not torch.equal(other.router.eval()(logits()).expert_ids, model.layers[0].router(logits()).expert_ids)


def test_the_models_own_bias_is_the_engines_tensor_as_it_is_loaded() -> None:
    correction_E = torch.zeros(E, dtype=torch.bfloat16)
    served = ServedRouter(Request(router="topk"), gating(correction_bias=True), layer=0, correction_E=correction_E)
    correction_E[3] = 5.0  # weights arrive after the layer was built
    _, ids_TK = served(torch.zeros(T, D), logits(), K, True)
    assert (ids_TK == 3).any(1).all()


def test_a_bias_that_the_checkpoint_holds_is_not_added_twice(tmp_path: Path) -> None:
    """swap writes the sum of the model's bias and of the learned one into the model's tensor."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            vocab_size=32, hidden_size=D, intermediate_size=8, moe_intermediate_size=4, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
            topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=4, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=4, routed_scaling_factor=2.5,
        )
    )  # fmt: skip
    gate = model.model.layers[1].mlp.gate
    gate.weight.data.normal_()
    gate.e_score_correction_bias.uniform_(-0.3, 0.3)
    moerouters.swap(model, "loss-free")
    gate.router.expert_bias_E.uniform_(-0.3, 0.3)
    gate.learned()
    model.eval()
    moerouters.save_router_state(model, tmp_path / "state.safetensors")
    served = ServedRouter(
        Request(router="loss-free", state=str(tmp_path / "state.safetensors")),
        Gating.sigmoid(8, 2, scale=2.5, correction_bias=True),
        layer=1,
        correction_E=gate.e_score_correction_bias.clone(),
    )
    x_TD = torch.randn(T, D)
    with torch.no_grad():
        logits_TE, expected_TK, expected_ids_TK = gate(x_TD)
    weights_TK, ids_TK = served(x_TD, logits_TE, 2, True)
    assert torch.equal(ids_TK.sort(1).values, expected_ids_TK.int().sort(1).values)
    torch.testing.assert_close(weights_TK.sum(1), expected_TK.sum(1))


# Refusals.


@pytest.mark.parametrize(
    ("router", "error", "match"),
    [
        ("loss-free", UnsupportedError, "MOEROUTERS_SERVE_STATE"),
        ("top-p", UnsupportedError, "6 slots a token"),
        ("hash", ContextError, "token_ids_T"),
    ],
)
def test_a_router_that_an_engine_cannot_serve_is_refused(router: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ServedRouter(Request(router=router), gating(), layer=0, correction_E=None)


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    _, request = saved("loss-free", tmp_path)
    with pytest.raises(TraceError, match="layer 7"):
        ServedRouter(request, gating(), layer=7, correction_E=None)
    with pytest.raises(TraceError, match=r"of shape \[8\] it holds \[6\]"):
        ServedRouter(request, Gating.softmax(8, K), layer=0, correction_E=None)


def test_layers_are_told_by_their_number() -> None:
    assert layer_number("model.layers.12.mlp.experts") == layer_number("1.decoder.layers.12") == 12
    with pytest.raises(UnsupportedError, match="'encoder'"):
        layer_number("encoder")


def test_nothing_happens_unless_the_environment_asks() -> None:
    assert Request.read({}) is None and Request.read({"MOEROUTERS_SERVE": ""}) is None
    asked = {"MOEROUTERS_SERVE": "bip", "MOEROUTERS_SERVE_CONFIG": json.dumps({"iterations": 8})}
    assert Request.read(asked) == Request(router="bip", config={"iterations": 8})
    for text in ("{", "[]"):
        with pytest.raises(ConfigError, match="no JSON object"):
            Request.read(asked | {"MOEROUTERS_SERVE_CONFIG": text})
