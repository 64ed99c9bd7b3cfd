"""Read the gating of a stock router: run it once on small random tensors, and understand what it did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moerouters.swapping.expression import Expression, Watch
from moerouters.swapping.reading import Reading
from moerouters.swapping.stock import Stock
from moerouters.swapping.understand import NotARouter, understand

_TOKENS = 6  # neither 1, where shapes are ambiguous, nor a size of a small config


def read(stock: Stock, *, prepared: bool = False) -> Reading:
    """The Reading of a router that returns (logits, weights, expert ids).

    `prepared`: it makes something of the hidden states before it multiplies them, which the adapter knows. Raises
    NotARouter if it returns something else, NotUnderstood for a step that no Reading can say.
    """
    low = torch.bfloat16
    # In 16 bits every cast to float32 shows. With a float32 weight beside them: which dtype the results follow.
    attempts = ((low, low), (low, torch.float32), (torch.float32, torch.float32))
    outcomes: dict[tuple[torch.dtype, torch.dtype], tuple[Expression, ...]] = {}
    problems: list[Exception] = []
    for hidden_dtype, own_dtype in attempts:
        try:
            outcomes[hidden_dtype, own_dtype] = _watch(stock, hidden_dtype, own_dtype)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            problems.append(error)
    if not outcomes:
        raise NotARouter(f"it cannot be run on hidden states alone: {problems[0]}")
    reading = understand(*next(iter(outcomes.values())), prepared=prepared)
    mixed = outcomes.get((low, torch.float32))
    if reading.weights_dtype == "own" and mixed is not None and mixed[1].dtype == low:
        reading = reading.model_copy(update={"weights_dtype": "hidden"})
    if (low, low) not in outcomes and mixed is not None:
        # The product takes 16-bit hidden states and float32 weights only: so the router casts the hidden states.
        reading = reading.model_copy(update={"weights_dtype": "hidden" if mixed[1].dtype == low else "float32"})
    autocast = reading.projection.model_copy(update={"autocast": _obeys_autocast(stock)})
    return reading.model_copy(update={"projection": autocast})


def hidden_size(stock: Stock) -> int:
    """D: the width of the first matrix."""
    for name in stock.own_names():
        if stock(name).dim() == 2 and stock(name).shape[1] > 1:
            return stock(name).shape[1]
    raise NotARouter("it has no matrix, so it computes no logits")


def _watch(
    stock: Stock, hidden_dtype: torch.dtype, own_dtype: torch.dtype, *, autocast: bool = False
) -> tuple[Expression, ...]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: probe_like(value, generator).to(own_dtype) if value.is_floating_point() else value.cpu()
        for name, value in stock.tensors().items()
    }
    hidden_TD = torch.randn(_TOKENS, hidden_size(stock), generator=generator).to(hidden_dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Watch({"hidden": hidden_TD, **tensors}) as watch:
        results = triple(stock.run(tensors, hidden_TD))
    return tuple(watch.expression(result) for result in results)


def triple(results: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weights, ids) of what a router returned. Raises NotARouter for another form."""
    if not (isinstance(results, tuple) and len(results) == 3 and all(isinstance(each, Tensor) for each in results)):
        raise NotARouter(f"it returns {_shape_of(results)}, not (logits, weights, expert ids)")
    logits, weights, ids = results
    fits = logits.dim() == weights.dim() == ids.dim() == 2 and weights.shape == ids.shape
    if not fits or ids.is_floating_point() or not weights.is_floating_point():
        raise NotARouter(f"it returns {_shape_of(results)}, not (logits [T, E], weights [T, K], expert ids [T, K])")
    return logits, weights, ids


def probe_like(value: Tensor, generator: torch.Generator) -> Tensor:
    """Random float32 values in the shape of a router's tensor: matrices that give logits of size 1, vectors of 0.3."""
    scale = value.shape[-1] ** -0.5 if value.dim() >= 2 and value.shape[0] > 1 else 0.3
    return torch.randn(value.shape, generator=generator) * scale


def _obeys_autocast(stock: Stock) -> bool:
    logits = _watch(stock, torch.float32, torch.float32, autocast=True)[0]
    product = next((each for each in logits.ancestors() if each.op in ("mm", "addmm")), None)
    return product is None or product.dtype == torch.bfloat16


def _shape_of(results: Any) -> str:
    if isinstance(results, Tensor):
        return f"a tensor {list(results.shape)}"
    if isinstance(results, tuple | list):
        return f"({', '.join(_shape_of(each) for each in results)})"
    return type(results).__name__
