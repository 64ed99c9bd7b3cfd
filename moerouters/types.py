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

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moerouters.capabilities import AssignmentKind
from moerouters.errors import AssignmentError, ContextError


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


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Which experts get which tokens with which weight, and the losses and stats that go with it.

    `kind` says how to read `expert_ids` and `weights`, which have one shape: [T, K] for SLOTS, [T, E] for DENSE (slot
    e is expert e), [N] for PAIRS, whose tokens stand in `token_ids_N`. The id `num_experts` marks an empty place.
    """

    kind: AssignmentKind
    num_tokens: int
    num_experts: int
    expert_ids: Tensor
    weights: Tensor
    token_ids_N: Tensor | None = None
    load_E: Tensor
    """int64 [E], routed pairs per expert before any dropping; padding counts nowhere."""
    tokens: Tensor
    """int64 0-d, tokens that are neither padding nor non-finite."""
    nonfinite: Tensor
    """int64 0-d, tokens whose logits hold NaN or infinity."""
    dropped: Tensor | None = None
    """int64 0-d, pairs that `limit_capacity` took away; None where no capacity was set."""
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    """0-d losses, already scaled by the router's own coefficients."""
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    """What `Router.update` needs; adds up over micro-batches and ranks. Empty when the assignment was forced."""

    @property
    def expert_ids_TK(self) -> Tensor:
        """int64 [T, K]; for PAIRS convert with `to_slots` first."""
        if self.kind is AssignmentKind.PAIRS:
            raise AssignmentError(
                "this assignment is a list of pairs, it has no expert_ids_TK.",
                why="an expert-choice or threshold router gives tokens a varying number of experts",
                fix="use token_ids_N, expert_ids and weights, or to_slots()",
            )
        return self.expert_ids

    @property
    def weights_TK(self) -> Tensor:
        """[T, K], in the order of `expert_ids_TK`."""
        self.expert_ids_TK  # noqa: B018  (raises for pairs)
        return self.weights

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """token_ids_N, expert_ids_N, weights_N of every place, empty ones included; what a DispatchPlan is made of."""
        if self.token_ids_N is not None:
            return self.token_ids_N, self.expert_ids, self.weights
        tokens_T = torch.arange(self.num_tokens, device=self.expert_ids.device)
        token_ids_N = tokens_T.unsqueeze(1).expand_as(self.expert_ids).reshape(-1)
        return token_ids_N, self.expert_ids.reshape(-1), self.weights.reshape(-1)

    def to_slots(self, num_slots: int | None = None) -> tuple[Tensor, Tensor]:
        """(expert_ids_TK, weights_TK) for code that knows no empty slots: an empty slot gets a valid id and weight 0.

        num_slots bounds the experts of one token in a PAIRS assignment (default E; further ones would be an error).
        The filler ids are spread round robin, so the wasted work does not pile up on one expert.
        """
        if self.kind is AssignmentKind.PAIRS:
            ids_TK, weights_TK = _pairs_to_slots(self, num_slots or self.num_experts)
        else:
            ids_TK, weights_TK = self.expert_ids, self.weights
        empty_TK = ids_TK == self.num_experts
        places_TK = torch.arange(ids_TK.numel(), device=ids_TK.device).reshape(ids_TK.shape)
        filler_TK = places_TK % self.num_experts
        return torch.where(empty_TK, filler_TK, ids_TK), weights_TK.masked_fill(empty_TK, 0)

    def validate(self) -> Assignment:
        """Check every invariant on the host and return self; raise AssignmentError at the first that is broken."""
        from moerouters.validation import validate_assignment

        validate_assignment(self)
        return self


def _pairs_to_slots(assignment: Assignment, num_slots: int) -> tuple[Tensor, Tensor]:
    token_ids_N, expert_ids_N, weights_N = assignment.pairs()
    T, E = assignment.num_tokens, assignment.num_experts
    # Empty pairs sort behind all others as token T; a pair's slot is its distance to the first pair of its token.
    keys_N = torch.where(expert_ids_N == E, T, token_ids_N)
    sorted_N, order_N = torch.sort(keys_N, stable=True)
    slot_N = torch.arange(sorted_N.numel(), device=sorted_N.device) - torch.searchsorted(sorted_N, sorted_N)
    kept_N = (sorted_N < T) & (slot_N < num_slots)
    # One spill row and column at the end take what is empty or past the bound.
    place_N = torch.where(kept_N, sorted_N * num_slots + slot_N, T * num_slots)
    ids = torch.full((T * num_slots + 1,), E, dtype=torch.int64, device=sorted_N.device)
    ids = ids.scatter(0, place_N, torch.where(kept_N, expert_ids_N.index_select(0, order_N), E))
    weights = weights_N.new_zeros(T * num_slots + 1)
    weights = weights.index_add(0, place_N, weights_N.index_select(0, order_N) * kept_N)
    return ids[:-1].reshape(T, num_slots), weights[:-1].reshape(T, num_slots)
