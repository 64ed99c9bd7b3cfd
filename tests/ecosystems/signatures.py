"""What adapters rely on in other frameworks, read from an unpacked package, without importing it.

    python -m tests.ecosystems.signatures FOLDER...     # writes tests/ecosystems/signatures/NAME.json for each package

FOLDER holds what `pip install --no-deps --target FOLDER NAME` puts there. Facts only: names of parameters, fields and
members, with their defaults.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "signatures"
RELIED_ON: dict[str, tuple[str, ...]] = {
    "megatron-core": (
        "megatron.core.transformer.moe.moe_layer:MoESubmodules",
        "megatron.core.transformer.moe.moe_layer:RouterBuilder.__call__",
        "megatron.core.transformer.moe.moe_layer:RouterInterface.set_layer_number",
        "megatron.core.transformer.moe.router:TopKRouter.forward",
        "megatron.core.transformer.moe.moe_utils:router_gating_linear",
        "megatron.core.transformer.moe.moe_utils:apply_router_token_dropping",
        "megatron.core.transformer.moe.moe_utils:MoEAuxLossAutoScaler.forward",
        "megatron.core.transformer.transformer_config:TransformerConfig",
        "megatron.core.model_parallel_config:ModelParallelConfig",
    ),
    "torchtitan": (
        "torchtitan.models.common.moe:TokenChoiceTopKRouter.Config",
        "torchtitan.models.common.moe:TokenChoiceTopKRouter.forward",
        "torchtitan.models.common.moe:MoE.Config",
        "torchtitan.config.override:override",
        "torchtitan.components.optimizer.optimizer:register_moe_load_balancing_hook",
        "torchtitan.distributed.parallel_dims:ParallelDims.get_optional_mesh",
        "torchtitan.protocols.model_spec:ModelSpec",
    ),
    "vllm": (
        "vllm.model_executor.layers.fused_moe.layer:FusedMoEFactory",
        "vllm.model_executor.layers.fused_moe.router.custom_routing_router:CustomRoutingRouter.__init__",
        "vllm.model_executor.layers.fused_moe.router.custom_routing_router:CustomRoutingRouter._compute_routing"
        ">custom_routing_function",
        "vllm.model_executor.layers.fused_moe.router.fused_moe_router:FusedMoERouter.supports_monolithic_kernels",
        "vllm.plugins:DEFAULT_PLUGINS_GROUP",
    ),
    "sglang": (
        "sglang.srt.layers.moe.topk:TopK.__init__",
        "sglang.srt.layers.moe.topk:TopKOutputFormat",
        "sglang.srt.layers.moe.topk:select_experts>custom_routing_function",
        "sglang.srt.plugins.hook_registry:HookRegistry.register",
        "sglang.srt.plugins.hook_registry:HookType",
        "sglang.srt.plugins:GENERAL_PLUGINS_GROUP",
    ),
}
"""By distribution: `module:name`; `function>name` is the call of `name` inside that function."""


def read(name: str) -> dict[str, Any]:
    """The committed facts of a distribution: its version, and symbols by what RELIED_ON calls them."""
    found: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return found


def extract(name: str, folder: Path) -> dict[str, Any]:
    """Read them from an unpacked package."""
    return {"version": version(name, folder), "symbols": {each: _symbol(each, folder) for each in RELIED_ON[name]}}


def version(name: str, folder: Path) -> str:
    """Of the distribution that lies in a folder; KeyError if it does not."""
    for path in folder.glob("*.dist-info/METADATA"):
        metadata = HeaderParser().parsestr(path.read_text(encoding="utf-8"))
        if metadata["Name"].replace("_", "-").lower() == name:
            return str(metadata["Version"])
    raise KeyError(name)


def _symbol(path: str, folder: Path) -> Any:
    module, _, rest = path.partition(":")
    qualname, _, called = rest.partition(">")
    base = folder.joinpath(*module.split("."))
    source = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
    node: Any = ast.parse(source.read_text(encoding="utf-8"))
    for part in qualname.split("."):
        node = next(each for each in node.body if part in _names(each))
    if called:
        calls = (n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func).split(".")[-1] == called)
        return [keyword.arg for keyword in next(calls).keywords]
    if isinstance(node, ast.FunctionDef):
        return dict(_parameters(node.args))
    if isinstance(node, ast.ClassDef):
        return {name: _text(each.value) for each in node.body for name in _names(each) if not _is_function(each)}
    return _text(node.value)


def _parameters(arguments: ast.arguments) -> Iterator[tuple[str, str | None]]:
    """(name, default); a keyword-only name carries a star."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    yield from ((each.arg, _text(default)) for each, default in zip(positional, defaults, strict=True))
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield f"*{each.arg}", _text(default)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []


def _is_function(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def _text(node: ast.expr | None) -> str | None:
    return None if node is None else ast.unparse(node)


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        for name in RELIED_ON:
            try:
                found = extract(name, folder)
            except KeyError:
                continue
            (HERE / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
