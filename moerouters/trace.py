"""Record who went where, and replay it: routing as data, by layer name.

Reinforcement learning needs the trainer to route as the sampler did (router replay, R3), debugging needs a run to be
repeated. A trace is a safetensors file of small integers, never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moerouters.capabilities import AssignmentKind
from moerouters.errors import TraceError
from moerouters.types import Assignment, RouteContext

_SCHEMA = "moerouters.trace/1"


@dataclass(frozen=True, kw_only=True)
class RoutingTrace:
    """The chosen expert ids of one forward pass, per layer."""

    expert_ids: Mapping[str, Tensor]
    """Layer name to [T, K] in the smallest integer dtype that holds E (the empty slot), on the CPU."""
    num_experts: Mapping[str, int]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a versioned schema."""
        meta = {"schema": _SCHEMA, "num_experts": json.dumps(dict(self.num_experts))}
        save_file({name: ids.contiguous() for name, ids in self.expert_ids.items()}, path, metadata=meta)

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read what `save` wrote; raises TraceError for any other file."""
        ids, meta = read_tensors(
            path, schema=_SCHEMA, what="routing trace", fix="pass a file that RoutingTrace.save wrote"
        )
        return cls(expert_ids=ids, num_experts=json.loads(meta["num_experts"]))


def read_tensors(path: str | Path, *, schema: str, what: str, fix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file with just this schema; raises TraceError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no iterator)
    except (OSError, SafetensorError) as error:
        raise TraceError(f"cannot read the {what} '{path}'.", why=str(error), fix=fix) from error
    if metadata.get("schema") != schema:
        raise TraceError(
            f"'{path}' is no {what}.", why=f"its schema is {metadata.get('schema')!r}, expected {schema!r}", fix=fix
        )
    return tensors, metadata


def keep(assignments: Mapping[str, Assignment]) -> RoutingTrace:
    """Keep the ids of each layer's assignment, pairs as slots; a place that a capacity limit emptied stays empty."""
    ids = {name: smallest(slot_ids(a).cpu(), a.num_experts) for name, a in assignments.items()}
    return RoutingTrace(expert_ids=ids, num_experts={name: a.num_experts for name, a in assignments.items()})


def force(
    trace: RoutingTrace,
    layer: str,
    *,
    ctx: RouteContext = RouteContext(),
    device: torch.device | str = "cpu",
) -> RouteContext:
    """ctx with the recorded ids of `layer` forced. Weights are computed anew, so gradients reach the gate."""
    if layer not in trace.expert_ids:
        raise TraceError(
            f"the trace has no layer '{layer}'.",
            why=f"it was recorded with: {', '.join(sorted(trace.expert_ids))}",
            fix="replay under the names that were recorded",
        )
    return replace(ctx, forced_ids_TK=trace.expert_ids[layer].to(device=device, dtype=torch.int64))


def slot_ids(assignment: Assignment) -> Tensor:
    """[T, K] with K as wide as the token with the most experts needs."""
    if assignment.kind is not AssignmentKind.PAIRS:
        return assignment.expert_ids
    token_ids_N, expert_ids_N, _ = assignment.pairs()
    chosen_N = token_ids_N[expert_ids_N < assignment.num_experts]
    widest = int(torch.bincount(chosen_N, minlength=1).max())
    return assignment.with_slots(max(widest, 1))[0]


def smallest(ids: Tensor, num_experts: int) -> Tensor:
    """ids as int16, or int32 where the id E does not fit: uint8 overflows at 256, which three frameworks shipped."""
    for dtype in (torch.int16, torch.int32):
        if num_experts <= torch.iinfo(dtype).max:
            return ids.to(dtype)
    return ids
