"""Stage graphs that nobody thought of."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from moerouters.pipeline.graph import StageGraph


@st.composite
def graphs(draw: st.DrawFn, stages: int) -> Any:
    """Every stage takes what the one before gives, and anything from earlier ones."""
    made: list[tuple[list[str], list[str]]] = []
    for stage in range(stages):
        earlier = [f"v{before}" for before in range(stage - 1)]
        takes = [f"v{stage - 1}" if stage else "input"]
        takes += draw(st.lists(st.sampled_from(earlier), unique=True, max_size=2)) if earlier else []
        made.append((takes, [f"v{stage}"]))
    return StageGraph.of(*made)
