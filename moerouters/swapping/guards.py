"""What keeps a router from being swapped although it was understood: forwards that are never called, tensors that are
no plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from torch import nn

from moerouters.errors import UnsupportedError
from moerouters.swapping.stock import Stock

EXPERT_PARALLEL_SINCE = (5, 23)
"""The first release with EPImplementationInterface."""


@contextmanager
def need_transformers() -> Iterator[None]:
    """Imports inside get an error that says what to install."""
    try:
        yield
    except ImportError as error:
        raise UnsupportedError(
            "this needs Hugging Face transformers.", why=str(error), fix="pip install 'moerouters[hf]'"
        ) from error


def expect_supported_transformers() -> None:
    """Raise UnsupportedError for transformers 4, whose routers have no common form."""
    with need_transformers():
        installed = version("transformers")  # PackageNotFoundError is an ImportError
    if int(installed.split(".")[0]) < 5:
        raise UnsupportedError(
            f"transformers {installed} is too old for swapping routers.",
            why="before 5.0 most of its models route inside the MoE block, without a router module",
            fix="pip install 'transformers>=5.21.1'",
        )


def knows_expert_parallel() -> bool:
    """Whether the installed transformers lets others implement its expert parallelism."""
    with need_transformers():
        major, minor = version("transformers").split(".")[:2]
    return (int(major), int(minor)) >= EXPERT_PARALLEL_SINCE


def expect_expert_parallel_transformers() -> None:
    """Raise UnsupportedError for a release whose expert parallelism nobody else can implement."""
    if not knows_expert_parallel():
        since = ".".join(map(str, EXPERT_PARALLEL_SINCE))
        raise UnsupportedError(
            f"transformers {version('transformers')} cannot bring tokens to experts by moerouters.",
            why=f"EPImplementationInterface, where expert parallelism is registered, exists from {since} on",
            fix=f"pip install 'transformers>={since}'",
        )


def obstacle(model: nn.Module, stock: Stock) -> str | None:
    """Why this router must not be swapped, or None."""
    module = stock.module
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (accelerate's device_map does that); load without device_map"
    if _wrapped_by_peft(model, module):
        return "it is wrapped by PEFT; leave the router out of target_modules and target_parameters, or swap first"
    if getattr(model, "use_kernels", False) and _names_a_kernel(module, stock.block):
        return "use_kernels=True replaces its forward, or that of the block around it, by a kernel; load without it"
    for name in stock.own_names():
        tensor = stock(name)
        if tensor.is_meta:
            return f"`{name}` is on the meta device, so nothing can be proven; load the weights first"
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            return f"`{name}` is a {type(tensor).__name__}; swap before sharding or quantising"
        if tensor.dim() == 2 and not tensor.is_floating_point():
            return f"`{name}` is quantised to {tensor.dtype}; leave the router out of quantisation"
    return None


def _wrapped_by_peft(model: nn.Module, module: nn.Module) -> bool:
    """Whether the module is, or is inside, a layer of PEFT's, which holds what it wraps by one of two names."""
    wrappers = (each for each in model.modules() if each._modules.keys() & {"base_layer", "original_module"})
    return any(inner is module for wrapper in wrappers for inner in wrapper.modules())


def _names_a_kernel(*modules: nn.Module) -> bool:
    return any(hasattr(type(module), "kernel_layer_name") for module in modules)
