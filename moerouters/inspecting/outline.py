"""An outline of a model: built from its config in seconds, whatever its size. Only routers get memory.

The model is made on the meta device. Of decoder layers that are built alike one stays, and of what stays only routers
are given tensors, as the model initialises them. So 61 layers of 256 experts need some megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from moerouters.swapping.find import Found, are_experts, find

Alike = Mapping[str, tuple[str, ...]]
"""Name of a layer that stayed, to the names of those that are built like it."""


def outline(model_class: Any, config: Any) -> tuple[nn.Module, Alike]:
    """A model whose routers can be examined and that cannot be run, and which layers it stands for."""
    with torch.device("meta"):
        model: nn.Module = model_class._from_config(config)
    model.eval()
    alike = _keep_one_of_each(model)
    routers = find(model)
    for found in routers:
        _give_memory(model, found)
    model.initialize_weights()  # type: ignore[operator]
    return model, alike


def _keep_one_of_each(model: nn.Module) -> Alike:
    """Put empty modules in the place of layers with experts that are built like an earlier one."""
    alike: dict[str, list[str]] = {}
    for list_name, layers in list(model.named_modules()):
        if not isinstance(layers, nn.ModuleList) or not any(are_experts(module) for module in layers.modules()):
            continue
        first: dict[Any, str] = {}
        for number, layer in enumerate(layers):
            name = f"{list_name}.{number}"
            kept = first.setdefault(_built(layer), name)
            if kept != name:
                alike.setdefault(kept, []).append(name)
                layers[number] = nn.Module()
    return {kept: tuple(names) for kept, names in alike.items()}


def _built(layer: nn.Module) -> tuple[Any, ...]:
    """How a layer is built: classes, plain attributes and shapes of all its modules; not its number."""
    return tuple(
        (name, type(module), *_plain(module), *((key, tensor.shape, tensor.dtype) for key, tensor in _tensors(module)))
        for name, module in layer.named_modules()
    )


def _plain(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        number = "layer" in name and type(value) is int
        if isinstance(value, int | float | str | bool | None) and not number and not name.startswith("_"):
            yield name, value


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _give_memory(model: nn.Module, found: Found) -> None:
    """Zeros for the tensors of a router and for those that its block hands in; `initialize_weights` comes after."""
    owners = dict.fromkeys(found.module.modules())
    wanted = [(owner, name) for owner in owners for name, _ in _tensors(owner)]
    try:
        handed_in = [name.removeprefix("block.") for name in found.stock.handed_in()]
    except TypeError:  # it needs something else beside hidden states, and will be refused for that
        handed_in = []
    wanted += [(found.stock.block, name) for name in handed_in]
    for owner, name in wanted:
        tensor = getattr(owner, name)
        if not tensor.is_meta:
            continue
        dtype = torch.float32 if _kept_in_float32(model, f"{found.name}.{name}", tensor) else tensor.dtype
        made = torch.zeros(tensor.shape, dtype=dtype)
        setattr(owner, name, nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made)
        for module in (owner, found.stock.block):
            module._is_hf_initialized = False  # type: ignore[assignment]


def _kept_in_float32(model: nn.Module, name: str, tensor: torch.Tensor) -> bool:
    """Whether loading keeps the tensor in float32 though the model has 16 bits; building does not."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if tensor.dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return tensor.is_floating_point() and any(re.search(key.replace("*", "[^.]+"), name) for key in kept)
