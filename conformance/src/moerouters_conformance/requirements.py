"""Requirements that rules share."""

from __future__ import annotations

import torch

from moerouters import AssignmentKind, StateAlgebra
from moerouters.capabilities import CompileSupport
from moerouters_conformance.rule import Requirement

STATE = Requirement(text="state (it declares state=stateless)", holds=lambda s: s.stateful)
ADDITIVE = Requirement(text="state=additive", holds=lambda s: s.capabilities.state is StateAlgebra.ADDITIVE)
MEAN_OF_SOLVES = Requirement(
    text="state=mean_of_solves", holds=lambda s: s.capabilities.state is StateAlgebra.MEAN_OF_SOLVES
)
STATELESS = Requirement(text="state=stateless", holds=lambda s: not s.stateful)
CAUSAL = Requirement(text="causal=True", holds=lambda s: s.capabilities.causal)
BATCH_INVARIANT = Requirement(text="eval_batch_invariant=True", holds=lambda s: s.capabilities.eval_batch_invariant)
FULLGRAPH = Requirement(text="compile=fullgraph", holds=lambda s: s.capabilities.compile is CompileSupport.FULLGRAPH)
BALANCE = Requirement(text="a declared balance bound", holds=lambda s: s.capabilities.balance is not None)
SLOTS = Requirement(text="assignment=slots", holds=lambda s: s.capabilities.assignment is AssignmentKind.SLOTS)
FIXED_SLOTS = Requirement(text="exactly K experts per token", holds=lambda s: s.fixed_slots)
FOLLOWS_SCORES = Requirement(text="a fresh router that takes the K highest scores", holds=lambda s: s.follows_scores)
NO_NOISE = Requirement(text="a choice without noise, which goes by position", holds=lambda s: not s.draws_noise)
NO_TOKEN_IDS = Requirement(
    text="experts without identities (this one looks at token ids)", holds=lambda s: not s.hashes_tokens
)
LOSSES = Requirement(text="an auxiliary loss", holds=lambda s: s.has_losses)
FLOAT64 = Requirement(
    text="float64 logits, in which sums of near ties are told apart", holds=lambda s: s.precise == torch.float64
)
