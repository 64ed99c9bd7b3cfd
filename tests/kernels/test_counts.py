"""Tokens per expert."""

import pytest
import torch

from moerouters.kernels.counts import count_experts, count_experts_torch
from support.oracles import count


@pytest.mark.parametrize("shape", [(0,), (0, 3), (40,), (20, 3)])
@pytest.mark.parametrize("function", [count_experts, count_experts_torch])
def test_counts(function, shape: tuple[int, ...], generator: torch.Generator) -> None:  # type: ignore[no-untyped-def]
    ids = torch.randint(0, 6, shape, generator=generator)  # 5 experts, 5 marks an empty place
    load_E = function(ids, 5)
    assert load_E.dtype == torch.int64
    assert load_E.tolist() == count(ids.reshape(-1, 1).tolist(), 5)


def test_counts_are_exact_where_float32_stops() -> None:
    """float32 stops counting at 2**24."""
    ids = torch.zeros(1, dtype=torch.int64).expand(2**24 + 1)
    assert count_experts(ids, 2).tolist() == [2**24 + 1, 0]
