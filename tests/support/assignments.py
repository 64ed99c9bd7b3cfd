"""Assignments as flat dictionaries of tensors, to compare two of them field by field."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moerouters import Assignment


def tensors_of(assignment: Assignment) -> dict[str, Tensor]:
    """Every tensor of an assignment by name; losses and stats as `losses.x` and `stats.x`."""
    named = {
        name: getattr(assignment, name)
        for name in ("expert_ids", "weights", "token_ids_N", "load_E", "tokens", "nonfinite", "dropped")
    }
    flat = {name: value for name, value in named.items() if value is not None}
    flat |= {f"losses.{name}": loss for name, loss in assignment.losses.items()}
    flat |= {f"stats.{name}": stat for name, stat in assignment.stats.items()}
    return flat


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, but: Iterable[str] = ()) -> None:
    """Same names, dtypes, shapes and values; NaN equals NaN."""
    skipped = set(but)
    assert actual.keys() - skipped == expected.keys() - skipped
    for name in expected.keys() - skipped:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )


def weights_by_pair(assignment: Assignment) -> dict[tuple[int, int], float]:
    """{(token, expert): weight} of every place that is not empty: the same for slots, pairs and dense."""
    tokens_N, experts_N, weights_N = (part.tolist() for part in assignment.pairs())
    return {
        (token, expert): weight
        for token, expert, weight in zip(tokens_N, experts_N, weights_N, strict=True)
        if expert < assignment.num_experts
    }
