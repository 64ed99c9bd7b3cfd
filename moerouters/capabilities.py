"""What a router promises, as data.

Each field is read three times: it drives a choice at run time, selects conformance checks, and fills a column of the
generated capability table. A field that nothing reads is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class AssignmentKind(StrEnum):
    """Shape of what the router hands out (see `moerouters.types.Assignment`)."""

    SLOTS = "slots"
    PAIRS = "pairs"
    DENSE = "dense"


class StateAlgebra(StrEnum):
    """How the stats of micro-batches and ranks combine into one update."""

    STATELESS = "stateless"
    """The router learns nothing after the step; `update` is never called."""
    ADDITIVE = "additive"
    """Sums: splitting a batch over micro-batches or ranks changes nothing."""
    MEAN_OF_SOLVES = "mean_of_solves"
    """Each forward solves on its own tokens; the update takes the token-weighted mean of the solutions."""


class LoadScope(StrEnum):
    """Whose tokens the balancer looks at."""

    NONE = "none"
    LOCAL = "local"
    GLOBAL = "global"


class CompileSupport(StrEnum):
    """What torch.compile can do with the router's forward."""

    FULLGRAPH = "fullgraph"
    EAGER = "eager"


class MaxViolation(BaseModel):
    """A bound on balance: MaxVio is at most `at_most` on every batch, once `after_steps` updates have passed since the
    start or since a sudden change of which experts are popular."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at_most: float = Field(ge=0)
    after_steps: int = Field(default=0, ge=0)


class Capabilities(BaseModel):
    """The closed record a plugin declares in its RouterSpec; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    assignment: AssignmentKind = AssignmentKind.SLOTS
    eval_assignment: AssignmentKind | None = None
    """The shape in eval mode, where it is another than in training; None: the same."""
    state: StateAlgebra = StateAlgebra.STATELESS
    load_scope: LoadScope = LoadScope.NONE
    compile: CompileSupport = CompileSupport.FULLGRAPH
    causal: bool = True
    """False: in training the choice for one token depends on later tokens of the batch."""
    eval_batch_invariant: bool = True
    """In eval mode the choice for one token does not depend on which other tokens share its batch."""
    forward_collective: bool = False
    """forward talks to other ranks: every rank must call it, also with no tokens."""
    parameters: bool = False
    """The router owns trainable parameters beyond the gate projection."""
    balance: MaxViolation | None = None
    balanced_losses: Mapping[str, float] = {}
    """Losses of the form E * sum(share of the load * mean probability), by name: their value at perfect balance, where
    it is least, coefficient included. With K = 1 and every token at one expert such a loss is E times as large."""
    dtypes: frozenset[str] = frozenset({"float16", "bfloat16", "float32", "float64"})
    """Dtypes of the logits that forward accepts; others are refused."""
