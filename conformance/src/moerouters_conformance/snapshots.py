"""What surrounds a forward: everything that a module holds, torch's global switches, and a number to differentiate."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moerouters import Assignment
from moerouters_conformance.readings import shown
from moerouters_conformance.violation import Violation

Snapshot = dict[str, Tensor | str]


def snapshot(module: nn.Module) -> Snapshot:
    """Copies of all that is reachable from a module: buffers, parameters and tensors by value, the rest as text."""
    found: Snapshot = {}
    _walk(type(module).__name__, module, found, set())
    return found


def expect_unchanged(now: Snapshot, before: Snapshot, *, by: str) -> None:
    """Raise Violation at the first thing that came, went or changed."""
    for name in sorted(now.keys() | before.keys()):
        here, there = now.get(name), before.get(name)
        if here is None or there is None:
            raise Violation(f"{name} was {'removed' if here is None else 'added'} by {by}")
        if not _same(here, there):
            raise Violation(f"{name} was {_shown(there)}, and is {_shown(here)} after {by}")


def _walk(name: str, value: Any, found: Snapshot, seen: set[int]) -> None:
    if isinstance(value, Tensor):
        found[name] = value.detach().clone()
    elif isinstance(value, torch.Generator):
        found[name] = value.get_state()
    elif id(value) in seen:
        return
    elif isinstance(value, nn.Module):
        seen.add(id(value))
        for key, item in vars(value).items():
            inner = item.items() if key in ("_parameters", "_buffers", "_modules") else [(key, item)]
            for inner_key, inner_item in inner:
                _walk(f"{name}.{inner_key}", inner_item, found, seen)
    elif isinstance(value, Mapping):
        seen.add(id(value))
        for key, item in value.items():
            _walk(f"{name}[{key!r}]", item, found, seen)
    elif isinstance(value, list | tuple):
        seen.add(id(value))
        found[f"len({name})"] = str(len(value))
        for index, item in enumerate(value):
            _walk(f"{name}[{index}]", item, found, seen)
    elif _is_plain_object(value):
        seen.add(id(value))
        for key, item in vars(value).items():
            _walk(f"{name}.{key}", item, found, seen)
    else:
        found[name] = repr(value)


def _is_plain_object(value: Any) -> bool:
    """An object whose repr need not show what it holds; classes, functions and modules are not the router's own."""
    shows_itself = getattr(type(value), "__repr__") != object.__repr__  # noqa: B009
    return hasattr(value, "__dict__") and not shows_itself and not callable(value)


def _same(left: Tensor | str, right: Tensor | str) -> bool:
    if isinstance(left, str) or isinstance(right, str):
        return left is right or (isinstance(left, str) and left == right)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return bool(((left == right) | ((left != left) & (right != right))).all())


def _shown(value: Tensor | str) -> str:
    return value if isinstance(value, str) else f"{shown(value)} ({value.dtype})"


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global generators of torch, numpy and Python back at the end."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """torch.use_deterministic_algorithms(True) for a block, where memory that nobody wrote reads as NaN as well."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: compilers and checkpointing warn of torch's own doings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def readout(assignment: Assignment) -> Tensor:
    """0-d: a sum of all weights, each with a slope of its own, and all losses."""
    weights_N = assignment.pairs()[2]
    slopes_N = torch.linspace(-1, 1.5, weights_N.numel(), dtype=weights_N.dtype)
    total: Tensor = (weights_N * slopes_N).sum() + sum(assignment.losses.values())
    return total


def logits_gradient(assignment: Assignment, logits_TE: Tensor) -> Tensor:
    """The gradient that `readout` gives the logits; zeros where nothing depends on them."""
    total = readout(assignment)
    if not total.requires_grad:
        return torch.zeros_like(logits_TE)
    (gradient_TE,) = torch.autograd.grad(total, logits_TE, allow_unused=True, materialize_grads=True)
    return gradient_TE
