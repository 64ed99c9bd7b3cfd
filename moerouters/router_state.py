"""Save and load what balancers have learned, apart from the model's weights: a safetensors file, never a pickle."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from moerouters.errors import TraceError
from moerouters.routed import RoutedModule
from moerouters.router import Router
from moerouters.trace import read_tensors

_SCHEMA = "moerouters.router_state/1"


def save_router_state(model: nn.Module, path: str | Path) -> None:
    """Write what every Router in `model` has learned, buffers and parameters, under their module names."""
    state = {name: value.detach().cpu().contiguous() for name, value in _state(model).items()}
    save_file(state, path, metadata={"schema": _SCHEMA})


def read_router_state(path: str | Path) -> dict[str, Tensor]:
    """What `save_router_state` wrote, by name. Raises TraceError for any other file."""
    saved, _ = read_tensors(path, schema=_SCHEMA, what="router state", fix="pass a file that save_router_state wrote")
    return saved


def load_router_state(model: nn.Module, path: str | Path) -> None:
    """Copy saved state into the routers of `model`, in place.

    Raises TraceError, before anything is written, if the file is no router state or names and shapes do not match
    exactly: a router that silently starts from zero is a different experiment.
    """
    saved = read_router_state(path)
    own = _state(model)
    differing = sorted(
        name for name in own.keys() | saved.keys()
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    )  # fmt: skip
    if differing:
        raise TraceError(
            "the saved router state does not fit this model.",
            where=str(path),
            why=f"these differ in name or shape: {', '.join(differing)}",
            fix="build the same routers, with the same number of experts, in the same layers",
        )
    for name, value in saved.items():
        own[name].copy_(value)
    for module in model.modules():
        if isinstance(module, RoutedModule):
            module.learned()


def _state(model: nn.Module) -> dict[str, Tensor]:
    """State buffers and parameters of all routers, and the gatings' correction biases."""
    found: dict[str, Tensor] = {}
    for prefix, router in model.named_modules():
        if isinstance(router, Router):
            start = f"{prefix}." if prefix else ""
            found |= {f"{start}{name}": router.get_buffer(name) for name in router.state_names()}
            found |= {f"{start}{name}": parameter.detach() for name, parameter in router.named_parameters()}
            gating = router.gating
            found |= {f"{start}gating.{name}": gating.get_buffer(name) for name in gating.state_names()}
    return found
