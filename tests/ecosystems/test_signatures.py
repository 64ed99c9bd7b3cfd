"""Adapters against what frameworks declare, as it was read from the packages (signatures/NAME.json)."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest

import moerouters
from moerouters.ecosystems import sglang
from moerouters.ecosystems.serving import ServedRouter
from moerouters.errors import UnsupportedError

from .declared import CUSTOM, signature, symbol
from .signatures import RELIED_ON, extract, read

CODE = Path(moerouters.__file__).parent / "ecosystems"


# Training frameworks: what their adapters name is declared.


def test_the_facts_are_of_the_versions_that_the_adapters_name() -> None:
    for name in RELIED_ON:
        found = read(name)
        assert set(found["symbols"]) == set(RELIED_ON[name])
        version = found["version"]
        text = (CODE / f"{name.removesuffix('-core')}.py").read_text(encoding="utf-8")
        assert version in text or version.removesuffix(".0") in text


def test_megatron_declares_what_the_adapter_reads() -> None:
    source = (CODE / "megatron.py").read_text(encoding="utf-8")
    prefix = "megatron.core.transformer"
    fields = symbol(f"{prefix}.transformer_config:TransformerConfig") | symbol(
        "megatron.core.model_parallel_config:ModelParallelConfig"
    )
    named = set(re.findall(r"\bconfig\.(\w+)", source)) | set(re.findall(r'"(moe_\w+)"', source))
    assert named - set(fields) == set()
    assert symbol(f"{prefix}.moe.moe_layer:MoESubmodules")["router"] == "TopKRouter"
    assert {"*config", "*pg_collection"} <= set(symbol(f"{prefix}.moe.moe_layer:RouterBuilder.__call__"))
    assert list(symbol(f"{prefix}.moe.router:TopKRouter.forward")) == ["self", "input", "padding_mask"]
    assert list(symbol(f"{prefix}.moe.moe_utils:router_gating_linear")) == ["inp", "weight", "bias", "router_dtype"]
    dropping = signature(f"{prefix}.moe.moe_utils:apply_router_token_dropping")
    dropping.bind(1, 2, router_topk=1, capacity_factor=1.0, drop_policy="probs", pad_to_capacity=False)
    assert list(symbol(f"{prefix}.moe.moe_utils:MoEAuxLossAutoScaler.forward")) == ["ctx", "output", "aux_loss"]


def test_torchtitan_declares_what_the_adapter_reads() -> None:
    source = (CODE / "torchtitan.py").read_text(encoding="utf-8")
    fields = symbol("torchtitan.models.common.moe:TokenChoiceTopKRouter.Config")
    named = set(re.findall(r"\bconfig\.(\w+)", source)) - {"models", "override"}
    assert named - set(fields) == {"plugin", "plugin_config"}
    assert {"router", "load_balance_coeff"} <= set(symbol("torchtitan.models.common.moe:MoE.Config"))
    assert list(symbol("torchtitan.models.common.moe:TokenChoiceTopKRouter.forward")) == [
        "self", "x_BLD", "expert_bias_E",
    ]  # fmt: skip
    assert "post_optimizer_build_fn" in symbol("torchtitan.protocols.model_spec:ModelSpec")
    assert list(symbol("torchtitan.components.optimizer.optimizer:register_moe_load_balancing_hook")) == [
        "optimizers", "model_parts", "parallel_dims",
    ]  # fmt: skip
    signature("torchtitan.distributed.parallel_dims:ParallelDims.get_optional_mesh").bind(
        "loss", include_singleton_axes=True
    )
    signature("torchtitan.config.override:override").bind(target=1, description="")


@pytest.mark.parametrize(
    "call", [f"{CUSTOM}._compute_routing>custom_routing_function",
             "sglang.srt.layers.moe.topk:select_experts>custom_routing_function"],
)  # fmt: skip
def test_a_served_router_is_called_by_the_names_that_it_has(call: str) -> None:
    for function in (ServedRouter.__call__, sglang.LayerRouter.__call__):
        assert list(inspect.signature(function).parameters)[1:] == symbol(call)


# The facts themselves.


def test_facts_are_read_without_importing(tmp_path: Path) -> None:
    module = tmp_path / "sglang" / "srt" / "plugins" / "hook_registry.py"
    module.parent.mkdir(parents=True)
    (module.parent / "__init__.py").write_text("GENERAL_PLUGINS_GROUP = 'here'\n", encoding="utf-8")
    module.write_text(
        "class HookType(Enum):\n    BEFORE = 'before'\n\n"
        "class HookRegistry:\n    def register(cls, target, hook=len, *, source=None): ...\n",
        encoding="utf-8",
    )
    topk = tmp_path / "sglang" / "srt" / "layers" / "moe" / "topk.py"
    topk.parent.mkdir(parents=True)
    topk.write_text(
        "class TopKOutputFormat:\n    STANDARD = auto()\n\n"
        "class TopK:\n    def __init__(self, top_k, *, layer_id): ...\n\n"
        "def select_experts(config):\n    return config.custom_routing_function(topk=1)\n",
        encoding="utf-8",
    )
    metadata = tmp_path / "sglang-9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.4\nName: sglang\nVersion: 9\n", encoding="utf-8")
    found = extract("sglang", tmp_path)
    assert found["version"] == "9"
    symbols = found["symbols"]
    assert symbols["sglang.srt.plugins:GENERAL_PLUGINS_GROUP"] == "'here'"
    assert symbols["sglang.srt.plugins.hook_registry:HookRegistry.register"] == {
        "cls": None, "target": None, "hook": "len", "*source": "None",
    }  # fmt: skip
    assert symbols["sglang.srt.layers.moe.topk:select_experts>custom_routing_function"] == ["topk"]
    with pytest.raises(KeyError):
        extract("vllm", tmp_path)


def test_a_framework_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.moe.moe_utils", None)
    monkeypatch.delitem(sys.modules, "moerouters.ecosystems.megatron", raising=False)
    with pytest.raises(UnsupportedError, match="pip install megatron-core"):
        __import__("moerouters.ecosystems.megatron")
