"""Stand-ins with the declared signatures of other frameworks (signatures/NAME.json)."""

from __future__ import annotations

import ast
import inspect
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

from .signatures import RELIED_ON, read

ROOT = Path(__file__).resolve().parents[2]
FACTORY = "vllm.model_executor.layers.fused_moe.layer:FusedMoEFactory"
CUSTOM = "vllm.model_executor.layers.fused_moe.router.custom_routing_router:CustomRoutingRouter"
TOPK = "sglang.srt.layers.moe.topk:TopK.__init__"


def symbol(path: str) -> Any:
    """What is known of it."""
    return next(read(name)["symbols"][path] for name, paths in RELIED_ON.items() if path in paths)


def signature(path: str) -> inspect.Signature:
    """A declared function's, without self; a default that is no literal becomes None."""
    parameters = []
    for name, default in symbol(path).items():
        if name not in ("self", "cls"):
            kind = inspect.Parameter.KEYWORD_ONLY if name[0] == "*" else inspect.Parameter.POSITIONAL_OR_KEYWORD
            value = inspect.Parameter.empty if default is None else _literal(default)
            parameters.append(inspect.Parameter(name.lstrip("*"), kind, default=value))
    return inspect.Signature(parameters)


def declared(path: str, called: list[dict[str, Any]]) -> Callable[..., str]:
    """A function with a declared signature, which notes its arguments."""
    how = signature(path)

    def function(*args: Any, **kwargs: Any) -> str:
        call = how.bind(*args, **kwargs)
        call.apply_defaults()
        called.append(dict(call.arguments))
        return "built"

    function.__signature__ = how  # type: ignore[attr-defined]
    return function


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:
        return None


def registered_as(group: str) -> EntryPoints:
    """The entry points of core's pyproject.toml in a group, as if it were just installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = project["entry-points"].get(group, {})
    return EntryPoints(EntryPoint(name=name, value=value, group=group) for name, value in found.items())
