"""FirstPasses: what a layer chose, kept for the recomputation of the same pass inside backward.

Activation checkpointing runs a layer again. A router whose forward talks to other ranks must not do so a second time:
they may be elsewhere, and wait for something else. So its choice is kept, and handed in as forced ids.

Several passes are in flight at once (micro-batches, a layer used twice, pipelines), and their backwards run in any
order. Nothing that torch hands to a recomputation says which pass it repeats, so it is found by its logits, bit by bit.

Imported where it is needed: `torch.compiler.disable` loads the compiler, which takes seconds.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moerouters.capabilities import AssignmentKind
from moerouters.errors import RecomputeError, UnsupportedError
from moerouters.kernels.accumulate import inside_backward
from moerouters.noise import digest
from moerouters.types import Assignment, RouteContext

_IN_GRAPH = "moerouters.first_passes"


@dataclass(frozen=True, eq=False)
class FirstPass:
    """One pass of a layer."""

    logits: Tensor
    """int64 0-d, digest of the bits of its logits."""
    noise_key: Tensor | None
    expert_ids_TK: Tensor
    """In a small integer type: there is one for each pass in flight."""


class FirstPasses:
    """The passes of one layer that may be recomputed.

    A pass is forgotten with its autograd graph. One that ran without a graph (reentrant checkpointing does that) is
    kept until it is recomputed in one with a graph. `clear`, at the optimizer step, ends all of them.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakSet[FirstPass] = weakref.WeakSet()
        self._held: list[FirstPass] = []

    def __reduce__(self) -> tuple[type[FirstPasses], tuple[()]]:
        """Copies and pickles of a layer know no passes: graphs are not copied either."""
        return FirstPasses, ()

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget all: with other weights no pass can be recomputed."""
        self._known.clear()
        self._held.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # whether this is a recomputation is asked at run time
    @torch.no_grad()
    def recall(
        self, logits_TE: Tensor, ctx: RouteContext, *, kind: AssignmentKind
    ) -> tuple[RouteContext, FirstPass | None]:
        """Outside of backward, and where all experts are taken, ctx as it is. Else ctx with the ids of the first pass,
        and that pass.

        Waits for the device then, to look digests up. Raises RecomputeError where no pass had these logits, or several
        had and chose differently; UnsupportedError for a router whose choice is not [T, K] ids.
        """
        if not inside_backward() or kind is AssignmentKind.DENSE:  # nothing was chosen
            return ctx, None
        if kind is not AssignmentKind.SLOTS:
            raise UnsupportedError(
                f"a router that chooses {kind.value} and talks to other ranks cannot be recomputed.",
                why="a recomputation takes the ids of the first pass, which are [T, K] slots",
                fix="leave this layer out of activation checkpointing",
            )
        first = self._find(logits_TE, ctx.noise_key)
        return replace(ctx, forced_ids_TK=first.expert_ids_TK.long()), first

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def keep(self, logits_TE: Tensor, assignment: Assignment, ctx: RouteContext, first: FirstPass | None) -> None:
        """Remember the pass that gave `assignment`; `first`, which it repeats, if it is a recomputation."""
        if first is None:
            if assignment.kind is not AssignmentKind.SLOTS:
                return
            small = torch.int16 if assignment.num_experts < 2**15 else torch.int32
            first = FirstPass(digest(logits_TE), _copy(ctx.noise_key), assignment.expert_ids.to(small))
            self._known.add(first)
            self._held.append(first)
        node = assignment.weights.grad_fn
        if node is not None:
            # The graph holds the pass from here on; whoever recomputes it, once or more, holds the graph.
            metadata: Any = node.metadata  # a dict, which torch's stubs take for a method
            metadata.setdefault(_IN_GRAPH, []).append(first)
            self._held = [held for held in self._held if held is not first]

    def _find(self, logits_TE: Tensor, noise_key: Tensor | None) -> FirstPass:
        alike = [each for each in self._known if each.expert_ids_TK.shape[0] == logits_TE.shape[0]]
        if alike:
            same = (torch.stack([each.logits for each in alike]) == digest(logits_TE)).tolist()
            alike = [each for each, it_is in zip(alike, same, strict=True) if it_is]
        if noise_key is not None and len(alike) > 1:
            alike = [each for each in alike if each.noise_key is not None and torch.equal(each.noise_key, noise_key)]
        if not alike:
            raise RecomputeError(
                f"no pass in flight had the logits that backward recomputes ({logits_TE.shape[0]} tokens).",
                why="the recomputation reuses the experts of the first pass, which it finds by the bits of the logits",
                fix="make the checkpointed part deterministic (preserve_rng_state, the same autocast); run backward "
                "before the optimizer step, and only once through reentrant checkpointing",
            )
        first, *others = alike
        if not all(torch.equal(first.expert_ids_TK, other.expert_ids_TK) for other in others):
            raise RecomputeError(
                f"{len(alike)} passes in flight had the same logits and chose different experts.",
                why="the recomputation of one cannot be told from that of another by its logits",
                fix="give each micro-batch its own RouteContext(noise_key=...)",
            )
        return first


def _copy(noise_key: Tensor | None) -> Tensor | None:
    """Its owner may count it up in place."""
    return None if noise_key is None else noise_key.clone()
