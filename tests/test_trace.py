"""Traces on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moerouters import Gating, RouteContext, Router, RoutingTrace, record, replay
from moerouters.errors import TraceError


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [
        (8, torch.int16),
        (256, torch.int16),
        (32767, torch.int16),
        (32768, torch.int32),
        (300, torch.int16),
        (70000, torch.int32),
    ],
)
def test_round_trip(num_experts: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """The largest id and the empty slot, E itself, survive."""
    router = Router(Gating.sigmoid(num_experts, 2))
    logits_TE = torch.randn(3, num_experts, generator=torch.Generator().manual_seed(0))
    logits_TE[0, num_experts - 1] = 50.0
    assignment = router(logits_TE, RouteContext(valid_T=torch.tensor([True, True, False])))
    record({"a.b": assignment}).save(tmp_path / "trace")
    trace = RoutingTrace.load(tmp_path / "trace")
    assert trace.num_experts == {"a.b": num_experts}
    assert trace.expert_ids["a.b"].dtype == dtype
    ctx = replay(trace, "a.b", ctx=RouteContext(num_sequences=3))
    assert ctx.num_sequences == 3
    assert ctx.forced_ids_TK.dtype == torch.int64
    assert torch.equal(ctx.forced_ids_TK, assignment.expert_ids)
    assert num_experts - 1 in ctx.forced_ids_TK[0]
    assert ctx.forced_ids_TK[2].tolist() == [num_experts] * 2


def test_ids_past_int32_stay_int64() -> None:
    many = 2**31
    assignment = Router(Gating.softmax(8, 2))(torch.randn(3, 8))
    trace = record({"layer": replace(assignment, num_experts=many, expert_ids=assignment.expert_ids + many - 8)})
    assert trace.expert_ids["layer"].dtype == torch.int64


def test_an_unknown_layer() -> None:
    trace = RoutingTrace(expert_ids={"b": torch.zeros(1, 2), "a": torch.zeros(1, 2)}, num_experts={"a": 2, "b": 2})
    with pytest.raises(TraceError, match=r"the trace has no layer 'c'\.\n.*it was recorded with: a, b\n"):
        replay(trace, "c")


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read the routing trace"):
        RoutingTrace.load(tmp_path / "missing")
    (tmp_path / "text").write_text("no trace")
    with pytest.raises(TraceError, match="cannot read the routing trace"):
        RoutingTrace.load(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "other", metadata={"schema": "other/1", "num_experts": json.dumps({})})
    with pytest.raises(TraceError, match=r"its schema is 'other/1', expected 'moerouters\.trace/1'"):
        RoutingTrace.load(tmp_path / "other")
    save_file({"x": torch.zeros(1)}, tmp_path / "bare")
    with pytest.raises(TraceError, match="its schema is None"):
        RoutingTrace.load(tmp_path / "bare")
