"""How the tests of experts compare results and gradients, and count matrix products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor


def slopes(like: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(like.shape, generator=random, dtype=torch.float64).to(like.dtype)


def gradients(y: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
    nothing = sum((tensor.sum() * 0).to(y.dtype) for tensor in wanted)  # a loop over no rows has no graph
    return torch.autograd.grad((y * slopes(y)).sum() + nothing, wanted)


def expect_equal(found: Tensor, expected: Tensor, wanted: Sequence[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for mine, right in zip(gradients(found, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)


@contextmanager
def products(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what the block multiplies, by the `multiply` of this module."""
    made: list[tuple[int, ...]] = []
    multiply = module.multiply

    def counted(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
        made.append(tuple(out.shape))
        result: Tensor = multiply(a, b, out, add=add)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, "multiply", counted)
        yield made
