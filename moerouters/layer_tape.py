"""LayerTape: what one layer writes down while a model is recorded, or reads while it is replayed.

Imported when that happens: `torch.compiler.disable` loads the compiler, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moerouters.errors import TraceError
from moerouters.kernels.accumulate import inside_backward
from moerouters.trace import slot_ids
from moerouters.types import Assignment, RouteContext


class LayerTape:
    """What one layer writes down, or reads, pass by pass. Given ids, it plays them; else it records."""

    def __init__(self, layer: str, ids: Sequence[Tensor] | None = None) -> None:
        self.ids: list[Tensor] = [] if ids is None else list(ids)
        self._layer = layer
        self._plays = ids is not None
        self._passes = 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a list grows; recomputation is asked for at run time
    def write(self, assignment: Assignment, num_sequences: int | None) -> None:
        """Keep the ids of a pass, [B, S, K] if it had B sequences; those of a recomputation were kept before."""
        if self._plays or inside_backward():
            return
        ids_TK = slot_ids(assignment).detach()
        B = num_sequences or 0
        self.ids.append(ids_TK.reshape(B, -1, ids_TK.shape[1]) if B and ids_TK.shape[0] % B == 0 else ids_TK)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def context(self, ctx: RouteContext, *, num_tokens: int, device: torch.device) -> RouteContext:
        """ctx with the ids of the next pass, or of the latest one in a recomputation."""
        if not self._plays:
            return ctx
        if not inside_backward():
            self._passes += 1
        if self._passes > len(self.ids):
            raise TraceError(
                f"layer '{self._layer}' runs for the {self._passes}th time, but the tape has {len(self.ids)} passes.",
                why="each pass takes the ids of one that was recorded",
                fix="replay as many passes as were recorded; tape.joined() makes one of a rollout's",
            )
        ids = self.ids[self._passes - 1]
        if ids.numel() != num_tokens * ids.shape[-1]:
            raise TraceError(
                f"layer '{self._layer}' routes {num_tokens} tokens, and the tape has ids for {ids.shape[:-1].numel()}.",
                where=f"pass {self._passes} of shape {list(ids.shape)}",
                why="every token needs the ids that were recorded for it",
                fix="replay the batch that was recorded; the last token of a rollout was never routed",
            )
        return replace(ctx, forced_ids_TK=ids.reshape(num_tokens, ids.shape[-1]).to(device=device, dtype=torch.int64))
