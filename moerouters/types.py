"""The records that the stages of a MoE layer exchange, and the legend of the letters that every tensor name wears.

| letter | size                             | | word          | meaning                                                |
|--------|----------------------------------|-|---------------|--------------------------------------------------------|
| T      | tokens on this rank              | | logits_TE     | what the gate projection gives, raw                    |
| D      | model width                      | | scores_TE     | logits after the score function                        |
| F      | width inside an expert           | | weights_TK    | combine weights, from the *unadjusted* scores          |
| E, e   | experts in all, on this rank     | | expert_ids_TK | chosen experts, int64; the value E marks an empty slot |
| K      | experts per token                | | load_E        | tokens per expert, int64, before any dropping          |
| N      | T*K routed pairs                 | | cutoff_T      | the (K+1)-th largest adjusted score of a token         |
| R      | rows this rank's experts receive | | valid_T       | bool, False for padding                                |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moerouters.assignment import Assignment
from moerouters.capabilities import AssignmentKind
from moerouters.errors import ContextError, ShapeError

__all__ = ["Assignment", "RouteContext", "Routing", "Selection", "check_context"]


@dataclass(frozen=True, kw_only=True)
class RouteContext:
    """What a router may know beside the logits. Every field is optional; values are tensors, so nothing recompiles."""

    valid_T: Tensor | None = None
    """bool [T]; False rows are padding: they get empty slots and count nowhere. None: every token is real."""
    sequence_ids_T: Tensor | None = None
    """int64 [T], which of the `num_sequences` sequences a token belongs to."""
    num_sequences: int | None = None
    """Sequences in this batch, known on the host; an upper bound on the ids plus one."""
    token_ids_T: Tensor | None = None
    """int64 [T], vocabulary ids, for routers that hash tokens."""
    hidden_TD: Tensor | None = None
    """[T, D], the layer's input, for routers that look past the logits."""
    noise_key: Tensor | None = None
    """int64 [n], what noise is drawn from (seed, step, micro-batch, layer, ...): the same key gives the same noise."""
    forced_ids_TK: Tensor | None = None
    """int64 [T, K], the assignment to use (replay, recompute, tests): nothing is solved, selected or observed."""
    logits_TE: Tensor | None = None
    """[T, E], the logits as the gating prepared them (`Routing.logits_TE`): in every stage the router's own doing, for
    noise and probability masses, which scores no longer show. Callers leave it out."""

    def need(self, name: str, *, router: str) -> Any:
        """Return the named field, or raise ContextError saying which router misses what."""
        value = getattr(self, name)
        if value is None:
            raise ContextError(
                f"router '{router}' needs {name}, and the RouteContext has none.",
                why="this router's choice or loss depends on it; it is never guessed",
                fix=f"pass RouteContext({name}=...) to the layer or router",
            )
        return value


def check_context(ctx: RouteContext, *, num_tokens: int) -> None:
    """Raise ShapeError for a per-token field of another length or dtype: a length of 1 would broadcast silently.

    Looks at shapes and dtypes only, which the host knows.
    """
    fields = {
        "valid_T": (ctx.valid_T, torch.bool, 1),
        "sequence_ids_T": (ctx.sequence_ids_T, torch.int64, 1),
        "token_ids_T": (ctx.token_ids_T, torch.int64, 1),
        "forced_ids_TK": (ctx.forced_ids_TK, torch.int64, 2),
        "hidden_TD": (ctx.hidden_TD, None, 2),
    }
    for name, (value, dtype, dims) in fields.items():
        if value is None:
            continue
        if value.dim() != dims or value.shape[0] != num_tokens or (dtype is not None and value.dtype != dtype):
            raise ShapeError(
                f"RouteContext.{name} is {value.dtype} of shape {list(value.shape)}; there are {num_tokens} tokens.",
                why=f"it has {dims} dimension{'s' if dims > 1 else ''}, one row per token, and dtype {dtype or 'any'}",
                fix="flatten [B, S] to [B * S], and cast it",
            )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What `Router.select` chose, before weights.

    SLOTS and DENSE: expert_ids is [T, K] (K = E for DENSE), E marks an empty slot. PAIRS: expert_ids and token_ids are
    [N], in any order; the id E marks an empty pair. No expert stands twice at one token.
    """

    kind: AssignmentKind
    expert_ids: Tensor
    token_ids_N: Tensor | None = None
    cutoff_T: Tensor | None = None
    """The (K+1)-th largest adjusted score; -inf where a token had no further candidate; None if never computed."""
    solved: Tensor | None = None
    """What `select` worked out on the way (prices, thresholds) and `observe` is to report, so that nothing is solved
    twice; of any shape without T."""

    @classmethod
    def slots(cls, expert_ids_TK: Tensor, cutoff_T: Tensor | None = None) -> Selection:
        return cls(kind=AssignmentKind.SLOTS, expert_ids=expert_ids_TK, cutoff_T=cutoff_T)

    @classmethod
    def pairs(cls, token_ids_N: Tensor, expert_ids_N: Tensor) -> Selection:
        return cls(kind=AssignmentKind.PAIRS, expert_ids=expert_ids_N, token_ids_N=token_ids_N)

    @classmethod
    def dense(cls, *, num_tokens: int, num_experts: int, device: torch.device) -> Selection:
        """Every expert for every token, slots in order of expert id."""
        ids_TE = torch.arange(num_experts, device=device).expand(num_tokens, num_experts)
        return cls(kind=AssignmentKind.DENSE, expert_ids=ids_TE)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Everything one forward computed, for `Router.losses` and `Router.observe`. Fields a router does not read may be
    None (see `Router.reads`)."""

    logits_TE: Tensor
    """Raw logits in the compute dtype, after soft-capping. Carries the gradient."""
    scores_TE: Tensor
    adjusted_TE: Tensor | None
    """Scores after bias and `adjust`; None when the assignment was forced."""
    bias_E: Tensor | None
    selection: Selection
    weights: Tensor
    """Combine weights in the shape of `selection.expert_ids`."""
    load_E: Tensor

    @property
    def expert_ids_TK(self) -> Tensor:
        """The chosen ids of a slots or dense selection."""
        assert self.selection.kind is not AssignmentKind.PAIRS, "pairs have no [T, K] ids"
        return self.selection.expert_ids

    @property
    def cutoff_T(self) -> Tensor | None:
        return self.selection.cutoff_T
