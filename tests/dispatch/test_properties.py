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
    for name in ("all_gather", "all_to_all", "hierarchical", "mesh3d", "padded", "tensor_sliced")
    if find_spec(f"moerouters.dispatch.{name}") is not None
]
MESHES = {
    "hierarchical": [(2, 2), (4, 1), (1, 4)],
    "mesh3d": [(2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 4, 1)],
}
BATCH = 20
"""Cases per job of the pool."""


@st.composite
def cases(draw: st.DrawFn, dispatcher: str, dtype: torch.dtype) -> Case:
    mesh = draw(st.sampled_from(MESHES[dispatcher])) if dispatcher in MESHES else ()
    size = WORLD_SIZE if mesh else draw(st.sampled_from([1, 2, WORLD_SIZE]))
    alike = size if dispatcher in ("padded", "tensor_sliced") else mesh[2] if len(mesh) == 3 else 1
    counts = st.lists(st.integers(0, 7), min_size=size // alike, max_size=size // alike)
    tokens = tuple(count for count in draw(counts) for _ in range(alike))
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
        mesh=mesh,
    )


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["float64", "bfloat16"]
)
@pytest.mark.parametrize("dispatcher", BACKENDS)
def test_output_and_gradients_are_those_of_one_process(dispatcher: str, dtype: torch.dtype) -> None:
    # Not shrunk: each case is small already, the message names it, and a rank that raises costs a start of the pool.
    # The first example is always the simplest, here the BATCH simplest cases. Halves take the way of doubles.
    # Gradients of mesh3d are gathered from DTensors, which takes longer than the rest.
    examples = 2 if dtype == torch.bfloat16 or dispatcher == "mesh3d" else 3

    @settings(max_examples=examples, phases=[Phase.explicit, Phase.generate])
    @given(st.lists(cases(dispatcher, dtype), min_size=BATCH, max_size=BATCH, unique=True))
    def check(batch: list[Case]) -> None:
        by_rank = rank_pool().run(steps, batch)
        for case, results in zip(batch, zip(*by_rank, strict=True), strict=True):
            expect_parity(case, list(results))

    check()
