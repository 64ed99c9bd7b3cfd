"""Every back-end against one process, over random groups, splits, assignments and settings."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from moerouters_conformance.pool import WORLD_SIZE, rank_pool

from .parity import Case, expect_parity, steps

BACKENDS = [
    name
    for name in ("all_gather", "all_to_all", "padded", "tensor_sliced")
    if find_spec(f"moerouters.dispatch.{name}") is not None
]
BATCH = 20
"""Cases per job of the pool."""


@st.composite
def cases(draw: st.DrawFn, dispatcher: str, dtype: torch.dtype) -> Case:
    size = draw(st.sampled_from([1, 2, WORLD_SIZE]))
    equal = dispatcher in ("padded", "tensor_sliced")
    counts = st.integers(0, 7)
    tokens = (draw(counts),) * size if equal else tuple(draw(st.lists(counts, min_size=size, max_size=size)))
    num_experts = size * draw(st.integers(1 if size > 1 else 2, 3))
    kind = draw(st.sampled_from(["slots", "slots", "pairs", "dense"]))
    factors = st.sampled_from([0.5, 1.0, 1.5])
    shared = draw(st.booleans())
    return Case(
        dispatcher,
        tokens,
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts // 2)),
        load=draw(st.sampled_from(["even", "one_expert", "half", "holes"])),
        kind=kind,
        padding=not shared and draw(st.booleans()),
        capacity_factor=draw(factors if dispatcher == "padded" else st.none() | factors),
        shared=shared,
        chunks=draw(st.integers(1, 3)),
        dtype=dtype,
        backwards=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 1000)),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dispatcher", BACKENDS)
def test_output_and_gradients_are_those_of_one_process(dispatcher: str, dtype: torch.dtype) -> None:
    # Not shrunk: each case is small already, the message names it, and a rank that raises costs a start of the pool.
    # The first example is always the simplest, here the BATCH simplest cases. Halves take the way of doubles.
    @settings(max_examples=3 if dtype == torch.float64 else 2, phases=[Phase.explicit, Phase.generate])
    @given(st.lists(cases(dispatcher, dtype), min_size=BATCH, max_size=BATCH, unique=True))
    def check(batch: list[Case]) -> None:
        by_rank = rank_pool().run(steps, batch)
        for case, results in zip(batch, zip(*by_rank, strict=True), strict=True):
            expect_parity(case, list(results))

    check()
