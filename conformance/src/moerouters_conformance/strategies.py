"""Strategies for inputs of routers. Plural nouns, keyword-only bounds; authors may use them in tests of their own.

Small tensors are drawn number by number, so that they shrink to something one can read: [[0.0, 0.0]] and not a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.strategies import SearchStrategy

from moerouters.gating import GatingSettings
from moerouters_conformance.case import Case
from moerouters_conformance.subject import ALL_FAMILIES, Subject

ORDINARY = (0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 3.25, 1e-3)
EXTREME = (*ORDINARY, 30.0, -30.0, 200.0, -200.0, 1e4, -1e4)


@st.composite
def gatings(
    draw: st.DrawFn,
    /,
    subject: Subject,
    *,
    min_experts: int = 1,
    max_experts: int = 6,
    min_k: int = 1,
    max_k: int = 4,
    families: Sequence[str] | None = None,
    spare: int = 0,
    **more: Any,
) -> GatingSettings:
    """Settings of gatings that the router accepts. `spare`: at least this many experts beyond K."""
    if min_experts < min_k + spare:
        raise InvalidArgument(f"{min_experts=} leaves no room for {min_k=} and {spare=}")
    offered = [name for name in (families or ALL_FAMILIES) if name in subject.families]
    if not offered:
        reject()
    family = draw(st.sampled_from(offered), label="family")
    E = draw(st.integers(min_experts, max_experts), label="E")
    K = draw(st.integers(min_k, min(max_k, E - spare)), label="K")
    return GatingSettings(num_experts=E, top_k=K, **(ALL_FAMILIES[family] | more))


@st.composite
def cases(
    draw: st.DrawFn,
    subject: Subject,
    *,
    min_tokens: int = 0,
    max_tokens: int = 6,
    values: Sequence[float] = ORDINARY,
    masks: bool = False,
    training: bool | None = None,
    max_warm_up: int = 2,
    dtype: str = "float32",
    settings: SearchStrategy[GatingSettings] | None = None,
) -> Case:
    """Cases with ties, repeated rows and, on demand, extreme values and padding. training: None draws the mode."""
    chosen = draw(gatings(subject) if settings is None else settings, label="gating")
    T = draw(st.integers(min_tokens, max_tokens), label="T")
    row = st.tuples(*[st.sampled_from(values)] * chosen.num_experts)
    logits = draw(st.tuples(*[row] * T), label="logits_TE")
    valid = draw(st.none() | st.tuples(*[st.booleans()] * T), label="valid_T") if masks else None
    return Case(
        settings=chosen,
        logits=logits,
        dtype=dtype,
        valid=valid,
        training=draw(st.booleans(), label="training") if training is None else training,
        warm_up=draw(st.integers(0, max_warm_up if subject.stateful else 0), label="warm_up"),
    )


@st.composite
def distinct_cases(
    draw: st.DrawFn,
    subject: Subject,
    *,
    min_tokens: int = 1,
    max_tokens: int = 6,
    tokens_per_expert: bool = False,
    masks: bool = False,
    training: bool | None = None,
    max_warm_up: int = 2,
    settings: SearchStrategy[GatingSettings] | None = None,
) -> Case:
    """Cases where no two logits of the batch are equal, so that no tie decides; in float64, if the router takes it.

    For rules that compare two ways of computing one thing, whose last bits may differ. tokens_per_expert: T is a
    multiple of E, so that T * K / E is whole.
    """
    chosen = draw(gatings(subject, min_experts=2) if settings is None else settings, label="gating")
    E = chosen.num_experts
    T = (
        E * draw(st.integers(1, 2), label="T/E")
        if tokens_per_expert
        else draw(st.integers(min_tokens, max_tokens), label="T")
    )
    # Irregular steps: on a regular grid the midpoints that a balancer puts its thresholds on tie all the time.
    numbers = draw(st.lists(st.integers(-999, 999), min_size=T * E, max_size=T * E, unique=True), label="logits_TE")
    logits = [number / 256 + (number * 7919 % 1009) * 1e-7 for number in numbers]
    rows = tuple(tuple(logits[t * E : (t + 1) * E]) for t in range(T))
    valid = draw(st.none() | st.tuples(*[st.booleans()] * T), label="valid_T") if masks else None
    return Case(
        settings=chosen,
        logits=rows,
        dtype=str(subject.precise).removeprefix("torch."),
        valid=valid,
        training=draw(st.booleans(), label="training") if training is None else training,
        warm_up=draw(st.integers(0, max_warm_up if subject.stateful else 0), label="warm_up"),
    )
