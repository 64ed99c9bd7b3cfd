"""A Reading: the gating of somebody else's router, step by step, as data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Score = Literal["softmax", "sigmoid", "sqrtsoftplus", "identity"]
Dtype = Literal["float32", "own"]
"""float32 whatever the model is cast to, or `own`: the dtype of the router's weight."""


class _Step(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")  # a fill is often -inf


class Cast(_Step):
    """To another dtype."""

    kind: Literal["cast"] = "cast"
    to: Dtype

    def __str__(self) -> str:
        return f"cast to {self.to}" if self.to == "float32" else "cast to the weight's dtype"


class Times(_Step):
    """By a constant."""

    kind: Literal["times"] = "times"
    factor: float

    def __str__(self) -> str:
        return f"times {self.factor:g}"


class Over(_Step):
    """Divided by a constant; not the same bits as times its inverse."""

    kind: Literal["over"] = "over"
    divisor: float

    def __str__(self) -> str:
        return f"over {self.divisor:g}"


class Cap(_Step):
    """cap * tanh(x / cap)."""

    kind: Literal["cap"] = "cap"
    cap: float

    def __str__(self) -> str:
        return f"soft-capped at {self.cap:g}"


class Normalize(_Step):
    """Over the sum of the row: sum + eps, or max(sum, floor)."""

    kind: Literal["normalize"] = "normalize"
    eps: float = 0.0
    floor: float | None = None

    def __str__(self) -> str:
        if self.floor is not None:
            return f"over max(sum, {self.floor:g})"
        return f"over sum + {self.eps:g}" if self.eps else "over sum"


class Norm(_Step):
    """Over the p-norm of the row; not the same bits as over its sum."""

    kind: Literal["norm"] = "norm"
    p: float

    def __str__(self) -> str:
        return f"over {self.p:g}-norm"


class Scaled(_Step):
    """By a parameter of the router: one factor, or one per expert."""

    kind: Literal["scaled"] = "scaled"
    parameter: str
    per_expert: bool

    def __str__(self) -> str:
        return f"times {self.parameter}" + (" of the expert" if self.per_expert else "")


Step = Annotated[Cast | Times | Over | Cap | Normalize | Norm | Scaled, Field(discriminator="kind")]


class Groups(_Step):
    """Only experts of the best `kept` of `count` equal groups stay candidates."""

    count: int
    kept: int
    score: Literal["max", "top2_sum"]
    fill: float
    """What the scores of the others become: -inf, or in some releases 0, which wins over negative biased scores."""
    sorted: bool


class Projection(_Step):
    """hidden states to logits: one matrix product."""

    weight: str
    """Name of the [E, D] parameter inside the router module."""
    bias: str | None = None
    dtype: Dtype = "own"
    autocast: bool = True
    """Whether an autocast region around the router changes the product's dtype."""


class Reading(BaseModel):
    """What a stock router computes. Names of tensors are relative to the router module."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_experts: int
    top_k: int
    projection: Projection
    before: tuple[Step, ...] = ()
    """What happens to the product until it is the logits."""
    returns: Literal["logits", "scores"] = "logits"
    """What the router hands out at index 0."""
    score: Score
    score_dtype: Dtype = "float32"
    correction_bias: str | None = None
    """The tensor added to scores (or logits, for `identity`) for selection only."""
    correction_dtype: Dtype = "float32"
    """In which the sum is taken."""
    groups: Groups | None = None
    sorted: bool = True
    """Whether torch.topk was asked for falling order; it decides the order of the slots."""
    weigh: Literal["scores", "limited", "logits"] = "scores"
    """What the weights are taken from; `limited` are the scores after the groups' fill."""
    after: tuple[Literal["softmax", "sigmoid"], Dtype] | None = None
    """A function of the K chosen logits, and the dtype it is computed in."""
    finish: tuple[Step, ...] = ()
    """What happens to the K chosen until they are combine weights."""
    weights_dtype: Literal["float32", "own", "hidden"] = "float32"

    def __str__(self) -> str:
        """One line for people."""
        E, K = self.num_experts, self.top_k
        parts = [str(step) for step in self.before if not isinstance(step, Cast)]
        if self.score != "identity":
            parts.append(f"{self.score} over {E}")
        if self.correction_bias is not None:
            parts.append(f"plus {self.correction_bias} to choose")
        if self.groups is not None:
            g = self.groups
            parts.append(f"best {g.kept} of {g.count} groups by {g.score.replace('_', ' ')}")
        parts.append(f"top {K} of {E}" if self.score == "identity" else f"top {K}")
        if self.after is not None:
            parts.append(f"{self.after[0]} of the chosen")
        parts += [str(step) for step in self.finish if not isinstance(step, Cast)]
        return ", ".join(parts)
