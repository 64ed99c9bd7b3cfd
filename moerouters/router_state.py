"""Save and load what balancers have learned, apart from the model's weights: a safetensors file, never a pickle."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moerouters.errors import TraceError
from moerouters.router import Router

_SCHEMA = "moerouters.router_state/1"


def save_router_state(model: nn.Module, path: str | Path) -> None:
    """Write the state buffers of every Router in `model`, under their module names."""
    state = {name: value.detach().cpu().contiguous() for name, value in _state(model).items()}
    save_file(state, path, metadata={"schema": _SCHEMA})


def load_router_state(model: nn.Module, path: str | Path) -> None:
    """Copy saved state into the routers of `model`, in place.

    Raises TraceError, before anything is written, if the file is no router state or names and shapes do not match
    exactly: a router that silently starts from zero is a different experiment.
    """
    try:
        with safe_open(path, framework="pt") as file:
            schema = (file.metadata() or {}).get("schema")
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no iterator)
    except (OSError, SafetensorError) as error:
        raise TraceError(f"cannot read router state from '{path}'.", why=str(error), fix="pass a saved file") from error
    if schema != _SCHEMA:
        raise TraceError(f"'{path}' is no router state.", why=f"its schema is {schema!r}", fix="see save_router_state")
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


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: module.get_buffer(name)
        for prefix, module in model.named_modules()
        if isinstance(module, Router)
        for name in module.state_names()
    }
