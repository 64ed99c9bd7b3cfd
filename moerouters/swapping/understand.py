"""From what was watched to a Reading: match the expressions of a router's results, from the outside in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch

from moerouters.swapping.expression import Expression
from moerouters.swapping.reading import (
    Cap,
    Cast,
    Dtype,
    Groups,
    Normalize,
    Over,
    Projection,
    Reading,
    Scaled,
    Score,
    Step,
    Times,
)


class NotUnderstood(Exception):
    """The router computes something that no Reading can say; the message names it."""


class NotARouter(NotUnderstood):
    """The module does not return what routers return."""


def understand(logits: Expression, weights: Expression, expert_ids: Expression, *, prepared: bool = False) -> Reading:
    """Reading of a router watched with its hidden states as leaf `hidden`, 16-bit, and its own tensors as other leaves.

    Everything in float32 was cast to it by the router then. `prepared`: the router makes something of the hidden states
    before the product, which an adapter knows. Raises NotUnderstood.
    """
    chosen = _Selection(expert_ids)
    finish, after, source, picked_by = _weights(weights)
    if picked_by is not None and picked_by.without_views() is not chosen.topk_ids:
        raise NotUnderstood("the weights belong to other experts than the ids")

    scores, score, score_input = _score(chosen.scores)
    first = logits.without_casts()
    returns_scores = first is scores.without_casts() and score != "identity"
    head = score_input.without_casts() if returns_scores else logits.without_views()
    if score_input.without_casts() is not head.without_casts():
        raise NotUnderstood("the scores are not computed from what the router returns as logits")
    before, projection = _logits(head, prepared=prepared)
    return Reading(
        num_experts=head.shape[-1],
        top_k=chosen.top_k,
        projection=projection,
        before=before,
        returns="scores" if returns_scores else "logits",
        score=score,
        score_dtype=_dtype(score_input) if score != "identity" else _dtype(head),
        correction_bias=chosen.bias,
        correction_dtype=chosen.bias_dtype,
        groups=chosen.groups,
        sorted=chosen.sorted,
        weigh=_source(source, chosen, score_input, score),
        after=after,
        finish=finish,
        weights_dtype=_dtype(weights),
    )


class _Selection:
    """The top-k, and what was added and masked before it."""

    def __init__(self, expert_ids: Expression) -> None:
        self.topk_ids = expert_ids.without_casts()
        if self.topk_ids.op != "topk.1":
            _refuse("the expert ids come from", self.topk_ids, "not from torch.topk: experts are not chosen by score")
        self.top_k, self.sorted = _topk(self.topk_ids)
        self.masked = self.topk_ids.inputs[0].without_views()
        self.groups: Groups | None = None
        biased = self.masked
        if self.masked.op == "masked_fill":
            biased = self.masked.inputs[0].without_views()
            self.groups = _groups(self.masked, biased)
        self.bias: str | None = None
        self.bias_dtype: Dtype = "float32"
        self.scores = biased
        if biased.op == "add":
            self.scores, bias = (each.without_views() for each in biased.inputs)
            leaf = bias.without_casts()
            if leaf.op != "leaf" or leaf.name == "hidden":
                _refuse("the scores are added to", leaf, "only a tensor of the model may be")
            self.bias = leaf.name
            self.bias_dtype = _dtype(biased)


def _groups(masked: Expression, biased: Expression) -> Groups:
    fill = masked.scalars()
    if len(fill) != 1:
        _refuse("the scores are masked by", masked, "expected one value")
    kept_ids = next((each for each in masked.inputs[1].ancestors() if each.op == "topk.1"), None)
    if kept_ids is None:
        _refuse("the mask of the scores is", masked.inputs[1], "expected a top-k of group scores")
    kept, in_order = _topk(kept_ids)
    group_scores = kept_ids.inputs[0].without_views()
    how: Literal["max", "top2_sum"]
    if group_scores.op in ("amax", "max.0"):
        how, source = "max", group_scores.inputs[0]
    elif group_scores.op == "sum" and group_scores.inputs[0].op == "topk.0" and _topk(group_scores.inputs[0])[0] == 2:
        how, source = "top2_sum", group_scores.inputs[0].inputs[0]
    else:
        _refuse("a group is scored by", group_scores, "expected its maximum, or the sum of its best two")
    if source.without_views() is not biased:
        raise NotUnderstood("groups are scored by other values than experts are chosen by")
    return Groups(count=group_scores.shape[-1], kept=kept, score=how, fill=fill[0], sorted=in_order)


def _weights(weights: Expression) -> tuple[tuple[Step, ...], Any, Expression, Expression | None]:
    """The steps from chosen values to weights, the function before them, its source, and the ids if gathered."""
    steps: list[Step] = []
    after: tuple[str, Dtype] | None = None
    found = weights.without_views()
    while True:
        if found.op in ("topk.0", "gather"):
            ids = found.inputs[1] if found.op == "gather" else None
            return tuple(reversed(steps)), after, found.inputs[0].without_views(), ids
        if after is not None and not found.is_cast:
            _refuse(f"the {after[0]} is taken of", found, "expected the chosen logits")
        if found.op in ("_softmax", "sigmoid"):
            after = ("softmax" if found.op == "_softmax" else "sigmoid", _dtype(found))
            found = found.inputs[0].without_views()
        elif after is not None:
            found = found.inputs[0].without_views()  # the cast is in the dtype of the function
        else:
            step, found = _step(found)
            steps.append(step)


def _step(found: Expression) -> tuple[Step, Expression]:
    """The last step that made `found`, and what it was made of."""
    numbers = found.scalars()
    first = found.inputs[0].without_views() if found.inputs else found
    if found.is_cast:
        return Cast(to=_dtype(found)), first
    if found.op == "mul" and len(found.inputs) == 1 and len(numbers) == 1:
        if first.op == "tanh" and first.inputs[0].op == "div" and first.inputs[0].scalars() == numbers:
            return Cap(cap=numbers[0]), first.inputs[0].inputs[0].without_views()
        return Times(factor=numbers[0]), first
    if found.op == "div" and len(found.inputs) == 1 and len(numbers) == 1:
        return Over(divisor=numbers[0]), first
    if found.op == "mul" and len(found.inputs) == 2:
        factor = found.inputs[1].without_casts()
        if factor.op == "index" and factor.inputs[0].without_casts().op == "leaf":
            return Scaled(parameter=factor.inputs[0].without_casts().name, per_expert=True), first
        if factor.op == "leaf" and factor.name != "hidden":
            return Scaled(parameter=factor.name, per_expert=False), first
    if found.op == "div" and len(found.inputs) == 2:
        total, step = _denominator(found.inputs[1].without_views())
        if total.op == "sum" and total.inputs[0].without_views() is first:
            return step, first
    return _refuse("there is a step", found, "that no Reading can say")


def _denominator(found: Expression) -> tuple[Expression, Normalize]:
    numbers = found.scalars()
    if found.op == "add" and len(found.inputs) == 1:
        return found.inputs[0].without_views(), Normalize(eps=numbers[0])
    if found.op in ("clamp", "clamp_min") and len(numbers) == 1:
        return found.inputs[0].without_views(), Normalize(floor=numbers[0])
    return found, Normalize()


_SCORES: dict[str, Callable[[Expression], tuple[Any, Expression] | None]] = {
    "_softmax": lambda e: ("softmax", e.inputs[0]),
    "sigmoid": lambda e: ("sigmoid", e.inputs[0]),
    "sqrt": lambda e: ("sqrtsoftplus", e.inputs[0].inputs[0]) if e.inputs[0].op == "softplus" else None,
}


def _score(scores: Expression) -> tuple[Expression, Score, Expression]:
    """The score function and its input; `identity` where selection is on logits."""
    bare = scores.without_casts()
    matched = _SCORES[bare.op](bare) if bare.op in _SCORES else None
    if matched is None:
        return scores, "identity", scores
    return bare, matched[0], matched[1].without_views()


def _logits(head: Expression, *, prepared: bool) -> tuple[tuple[Step, ...], Projection]:
    steps: list[Step] = []
    found = head
    while found.op not in ("mm", "addmm"):
        if found.op == "leaf" or not found.inputs:
            _refuse("the logits come from", found, "expected one matrix product of the hidden states")
        step, found = _step(found)
        steps.append(step)
    *bias, hidden, weight = found.inputs
    weight_leaf = weight.inputs[0].without_casts() if weight.op in ("t", "transpose") else weight
    fed = hidden.ancestors() if prepared else [hidden.without_casts()]
    if all(each.name != "hidden" for each in fed) or weight_leaf.op != "leaf":
        _refuse("the logits are a product of", hidden.without_casts(), "expected the hidden states and a parameter")
    projection = Projection(
        weight=weight_leaf.name,
        bias=bias[0].without_casts().name if bias else None,
        dtype=_dtype(found),
    )
    return tuple(reversed(steps)), projection


def _source(
    source: Expression, chosen: _Selection, logits: Expression, score: Score
) -> Literal["scores", "limited", "logits"]:
    bare = source.without_casts()
    if bare is chosen.scores.without_casts():
        return "logits" if score == "identity" else "scores"
    if bare is logits.without_casts():
        return "logits"
    if bare is chosen.masked and chosen.bias is None:
        return "limited"
    _refuse("the weights are taken from", bare, "expected scores or logits without the correction bias")


def _topk(expression: Expression) -> tuple[int, bool]:
    k, *rest = expression.constants  # then dim, largest, sorted, as far as they were given
    return k, rest[2] if len(rest) > 2 else True


def _dtype(expression: Expression) -> Dtype:
    return "float32" if expression.dtype == torch.float32 else "own"


def _refuse(what: str, expression: Expression, why: str) -> NoReturn:
    made = expression.name or expression.op
    raise NotUnderstood(f"{what} `{made}`, {why}")
