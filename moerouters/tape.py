"""record and replay on models: the same routing in another pass - rollout and training, or a run that is repeated.

    with record(model) as tape:
        model(**batch)
    with replay(model, tape):
        loss = model(**batch).loss

Works on every module that owns a router: `MoELayer`, and the routers of a swapped model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moerouters.errors import TraceError
from moerouters.routed import RoutedModule
from moerouters.trace import RoutingTrace, force, keep, read_tensors, smallest
from moerouters.types import Assignment, RouteContext

_SCHEMA = "moerouters.tape/1"


@dataclass(frozen=True, kw_only=True)
class Tape:
    """Expert ids of a number of forward passes, per layer."""

    expert_ids: dict[str, list[Tensor]] = field(default_factory=dict)
    """Layer name to one tensor per pass: [B, S, K], or [T, K] where the layer saw no sequences; id E is an empty slot.
    int16 up to E = 32,767, else int32; on the CPU once recording has ended."""
    num_experts: dict[str, int] = field(default_factory=dict)

    def joined(self) -> Tape:
        """All passes as one along the sequence: what a rollout with a cache (a prompt, then token by token) did, for a
        training pass over the whole text. Raises TraceError if passes differ in their number of sequences."""
        for name, passes in self.expert_ids.items():
            shapes = {tuple(ids.shape[:1]) if ids.dim() == 3 else None for ids in passes}
            if len(shapes) > 1 or None in shapes:
                raise TraceError(
                    f"the passes of layer '{name}' cannot be joined.",
                    why=f"they have the shapes {', '.join(str(list(ids.shape)) for ids in passes)}, not [B, S, K]",
                    fix="record passes over the same sequences, in a model that is called with [B, S] tokens",
                )
        return Tape(
            expert_ids={name: [torch.cat(passes, dim=1)] for name, passes in self.expert_ids.items()},
            num_experts=self.num_experts,
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a versioned schema."""
        tensors = {f"{i}/{name}": ids for name, passes in self.expert_ids.items() for i, ids in enumerate(passes)}
        save_file(tensors, path, metadata={"schema": _SCHEMA, "num_experts": json.dumps(self.num_experts)})

    @classmethod
    def load(cls, path: str | Path) -> Tape:
        """Read what `save` wrote; raises TraceError for any other file."""
        tensors, metadata = read_tensors(path, schema=_SCHEMA, what="tape", fix="pass a file that Tape.save wrote")
        passes: dict[str, dict[int, Tensor]] = {}
        for key, ids in tensors.items():
            number, _, name = key.partition("/")
            passes.setdefault(name, {})[int(number)] = ids
        ordered = {name: [each[i] for i in sorted(each)] for name, each in passes.items()}
        return cls(expert_ids=ordered, num_experts=json.loads(metadata["num_experts"]))


@overload
def record(what: nn.Module) -> AbstractContextManager[Tape]: ...
@overload
def record(what: Mapping[str, Assignment]) -> RoutingTrace: ...
def record(what: nn.Module | Mapping[str, Assignment]) -> AbstractContextManager[Tape] | RoutingTrace:
    """For a model: a context in which every pass is written on the tape it gives, recomputation left out.

    For {layer: assignment}: a RoutingTrace of them. Raises TraceError for a model without routers of ours.
    """
    return _recording(what) if isinstance(what, nn.Module) else keep(what)


@overload
def replay(what: nn.Module, tape: Tape) -> AbstractContextManager[None]: ...
@overload
def replay(
    what: RoutingTrace, tape: str, *, ctx: RouteContext = ..., device: torch.device | str = ...
) -> RouteContext: ...
def replay(
    what: nn.Module | RoutingTrace,
    tape: Tape | str,
    *,
    ctx: RouteContext = RouteContext(),
    device: torch.device | str = "cpu",
) -> AbstractContextManager[None] | RouteContext:
    """For a model: a context in which its passes take the ids of the tape, pass by pass; weights are computed anew.

    A recomputation inside a backward pass takes the ids of the layer's latest pass. For a RoutingTrace and the name of
    a layer: `ctx` with that layer's ids forced. Raises TraceError where layers, tokens or passes do not match.
    """
    if isinstance(what, nn.Module):
        assert isinstance(tape, Tape)
        return _replaying(what, tape)
    assert isinstance(tape, str)
    return force(what, tape, ctx=ctx, device=device)


@contextmanager
def _recording(model: nn.Module) -> Iterator[Tape]:
    from moerouters.layer_tape import LayerTape

    layers, tape = _layers(model), Tape()
    for name, layer in layers.items():
        layer.tape = LayerTape(name)
    try:
        yield tape
    finally:
        for name, layer in layers.items():
            assert layer.tape is not None
            # Only now to the CPU: a transfer per layer and pass would wait for the device each time.
            num_experts = layer.router.gating.num_experts
            tape.expert_ids[name] = [smallest(ids.cpu(), num_experts) for ids in layer.tape.ids]
            tape.num_experts[name] = num_experts
            layer.tape = None


@contextmanager
def _replaying(model: nn.Module, tape: Tape) -> Iterator[None]:
    from moerouters.layer_tape import LayerTape

    layers = _layers(model)
    if layers.keys() != tape.expert_ids.keys():
        raise TraceError(
            "the tape was recorded from other layers than the model has.",
            where=f"tape: {', '.join(tape.expert_ids) or 'nothing'}",
            why=f"the model has {', '.join(layers)}",
            fix="replay on the model that was recorded, with the same layers swapped",
        )
    for name, layer in layers.items():
        layer.tape = LayerTape(name, tape.expert_ids[name])
    try:
        yield
    finally:
        for layer in layers.values():
            layer.tape = None


def _layers(model: nn.Module) -> dict[str, RoutedModule]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, RoutedModule)}
    if not found:
        raise TraceError(
            f"{type(model).__name__} has no router of moerouters.",
            why="stock routers neither write down what they choose nor take ids",
            fix="swap(model, 'topk') first, which leaves every output bit-identical",
        )
    return found
