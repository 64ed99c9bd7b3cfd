"""ModelGating: a stock router's own arithmetic behind the interface that balancers know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moerouters.autocast import no_autocast
from moerouters.gating import Gating, GatingSettings, take_along_experts
from moerouters.swapping.reading import Dtype, Groups, Norm, Normalize, Over, Projection, Reading, Score, Step, Times

Tensors = Callable[[str], Tensor]
"""From a name inside the stock router to its tensor."""


def project(reading: Reading, hidden_TD: Tensor, tensors: Tensors) -> Tensor:
    """[T, E] logits, bit for bit those of the stock router, in its dtype."""
    projection = reading.projection
    if projection.autocast:
        logits_TE = _product(reading, hidden_TD, tensors)
    else:
        with no_autocast(hidden_TD.device):
            logits_TE = _product(reading, hidden_TD, tensors)
    return run(reading.before, logits_TE, own=logits_TE.dtype) if reading.before else logits_TE


def _product(reading: Reading, hidden_TD: Tensor, tensors: Tensors) -> Tensor:
    projection = reading.projection
    weight_ED = tensors(projection.weight)
    bias_E = None if projection.bias is None else tensors(projection.bias)
    if projection.dtype == "float32":
        bias_E = None if bias_E is None else bias_E.to(torch.float32)
        return F.linear(cast(hidden_TD, torch.float32), cast(weight_ED, torch.float32), bias_E)
    return F.linear(cast(hidden_TD, weight_ED.dtype), weight_ED, bias_E)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """values.to(dtype), without the microsecond that it takes to change nothing: a decoded token meets ten casts."""
    return values if values.dtype == dtype else values.to(dtype)


def run(steps: Sequence[Step], values: Tensor, *, own: torch.dtype) -> Tensor:
    """Do the steps of a Reading in their order.

    Told apart by `kind`: isinstance of a pydantic model takes a microsecond, which is felt at one token.
    """
    for step in steps:
        if step.kind == "normalize":
            total = values.sum(-1, True)  # by position: names cost 0.8 us here
            total = total.clamp_min(step.floor) if step.floor is not None else total
            values = values / (total + step.eps if step.eps else total)
        elif step.kind == "times":
            values = values * step.factor
        elif step.kind == "cast":
            values = cast(values, torch.float32 if step.to == "float32" else own)
        elif step.kind == "over":
            values = values / step.divisor
        elif step.kind == "cap":
            values = torch.tanh(values / step.cap) * step.cap
        elif step.kind == "norm":
            values = values / torch.norm(values, p=step.p, dim=-1, keepdim=True)
        else:
            raise AssertionError("scaling by a parameter needs the expert ids, see ModelGating")
    return values


class ModelGating(Gating):
    """Gating of a swapped model. Values travel in float32, and each step is computed in the dtype the model uses.

    `settings` are the nearest that core knows; what is computed is the Reading. `exact` is set where the router leaves
    scores alone: then a group's fill of 0 is followed, else it is -inf, since 0 wins over a negative biased score.
    """

    exact = True

    def __init__(self, reading: Reading, tensors: Tensors) -> None:
        super().__init__(settings_of(reading))
        self.reading = reading
        self._scores_wide = reading.score_dtype == "float32"
        self._function = _SCORES[reading.score]
        self._weighs_scores = type(self).weigh_full is ModelGating.weigh_full
        self._scaled = any(step.kind == "scaled" for step in reading.finish)
        self._casts = any(step.kind == "cast" for step in reading.finish)
        # Looked up for every decoded token, so decided here.
        projection = reading.projection
        self._weight_name = projection.weight
        self._only_multiplies = projection == Projection(weight=projection.weight) and not reading.before
        self._only_sums = reading.after is None and reading.finish == (Normalize(),)
        self.straight = reading.returns == "logits" and type(self) is ModelGating
        object.__setattr__(self, "tensors", tensors)  # it may hold the stock module, which must not become a child
        # Without elements: they follow the model's casts, and say what `own` means.
        self.register_buffer("own_0", tensors(reading.projection.weight).new_empty(0), persistent=False)
        bias = None if reading.correction_bias is None else tensors(reading.correction_bias).new_empty(0)
        self.register_buffer("bias_0", bias, persistent=False)

    own_0: Tensor
    bias_0: Tensor | None
    tensors: Tensors

    @property
    def domain(self) -> Literal["unit", "real"]:
        return "unit" if self.reading.score in ("softmax", "sigmoid") else "real"

    def score(self, logits_TE: Tensor) -> Tensor:
        logits_TE = cast(logits_TE, self._dtype(self.reading.score_dtype))
        return _wide(self._function(logits_TE))

    def probabilities(self, logits_TE: Tensor) -> Tensor:
        if self.reading.score in ("softmax", "identity"):
            return logits_TE.softmax(dim=-1)
        return super().probabilities(logits_TE)

    def corrected(self, scores_TE: Tensor) -> Tensor:
        if self.reading.correction_bias is None:
            return scores_TE
        assert self.bias_0 is not None
        dtype = self._dtype(self.reading.correction_dtype)
        if self.reading.correction_dtype == "own":
            dtype = torch.promote_types(dtype, self.bias_0.dtype)
        return _wide((scores_TE + self.correction_bias_E).to(dtype))

    def limit(self, adjusted_TE: Tensor) -> Tensor:
        groups = self.reading.groups
        if groups is None or groups.kept == groups.count:
            return adjusted_TE
        if not self.exact:
            return _limit(adjusted_TE, groups, fill=-float("inf"))
        biased = self.reading.correction_bias is not None
        dtype = self._dtype(self.reading.correction_dtype if biased else self.reading.score_dtype)
        return _wide(_limit(adjusted_TE.to(dtype), groups, fill=groups.fill))

    def top(self, values: Tensor, k: int) -> Tensor:
        """As torch.topk breaks ties and, where the model asks for any order, orders slots."""
        return values.topk(k, dim=-1, sorted=self.reading.sorted or k != self.top_k).indices

    def weigh(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        empty_TK = expert_ids_TK == self.num_experts
        # A finite floor instead of -inf, and a row of empty slots only is not 0: softmax and quotient would be NaN, and
        # so would the gradient of a parameter that scales them, 0 * NaN.
        floor = 0.0 if self.reading.after is None else torch.finfo(torch.bfloat16).min
        chosen_TK = take_along_experts(self._source(scores_TE), expert_ids_TK).masked_fill(empty_TK, floor)
        chosen_TK = chosen_TK.masked_fill(empty_TK.all(dim=-1, keepdim=True), 1.0)
        weights_TK = self._finish(chosen_TK, expert_ids_TK.clamp(max=self.num_experts - 1))
        return weights_TK.masked_fill(empty_TK, 0)

    def choose(self, scores_TE: Tensor, adjusted_TE: Tensor) -> tuple[Tensor, Tensor]:
        """([T, K] weights, [T, K] ids) of the best adjusted scores, where every token finds K experts."""
        reading = self.reading
        limited_TE = adjusted_TE if reading.groups is None else self.limit(adjusted_TE)
        best_TK, ids_TK = limited_TE.topk(reading.top_k, dim=-1, sorted=reading.sorted)
        if limited_TE is scores_TE and self._weighs_scores:
            return self._finish(best_TK, ids_TK), ids_TK  # nothing moved selection: what was best is what weighs
        return self.weigh_full(scores_TE, ids_TK), ids_TK

    def serve(
        self, hidden_TD: Tensor, bias_E_of: Callable[[Tensor], Tensor | None] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """([T, E] logits, [T, K] weights, [T, K] ids): `project`, `score` and `choose` in one frame, where `straight`.

        bias_E_of: from scores to what is added to them for selection; None for a router that leaves them alone.
        For a decoded token a router's time is mostly Python's (docs/swapping.md has the figures).
        """
        reading = self.reading
        weight_ED = self.tensors(self._weight_name)
        if self._only_multiplies and weight_ED.dtype == hidden_TD.dtype:
            logits_TE = F.linear(hidden_TD, weight_ED)
        else:
            logits_TE = project(reading, hidden_TD, self.tensors)
        wide = self._scores_wide and logits_TE.dtype == torch.float32
        scores_TE = self._function(logits_TE) if wide else self.score(logits_TE)
        adjusted_TE = scores_TE if reading.correction_bias is None else self.corrected(scores_TE)
        bias_E = None if bias_E_of is None else bias_E_of(scores_TE)
        if bias_E is not None:
            adjusted_TE = adjusted_TE + bias_E
        if reading.groups is not None:
            adjusted_TE = self.limit(adjusted_TE)
        best_TK, ids_TK = adjusted_TE.topk(reading.top_k, -1, True, reading.sorted)
        if adjusted_TE is not scores_TE:
            source_TE = scores_TE if reading.weigh == "scores" else self._source(scores_TE)
            best_TK = source_TE.gather(1, ids_TK)
        if wide and self._only_sums:
            return logits_TE, best_TK / best_TK.sum(-1, True), ids_TK
        return logits_TE, self._finish(best_TK, ids_TK), ids_TK

    def choose_as_stock(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """([T, K] weights, [T, K] ids) of the stock router."""
        scores_TE = self.score(logits_TE)
        return self.choose(scores_TE, self.corrected(scores_TE))

    def weigh_full(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """`weigh` for ids without empty slots."""
        return self._finish(self._source(scores_TE).gather(1, expert_ids_TK), expert_ids_TK)

    def _source(self, scores_TE: Tensor) -> Tensor:
        return self.limit(scores_TE) if self.reading.weigh == "limited" and self.exact else scores_TE

    def _finish(self, chosen_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """From the chosen scores or logits to combine weights, in the dtypes of the model."""
        reading = self.reading
        weights_TK = cast(chosen_TK, self._dtype(reading.score_dtype))
        if reading.after is not None:
            function, dtype = reading.after
            weights_TK = cast(weights_TK, self._dtype(dtype))
            weights_TK = weights_TK.softmax(dim=-1) if function == "softmax" else weights_TK.sigmoid()
        if not self._scaled:
            own = self.own_0.dtype if self._casts else torch.float32
            return _wide(run(reading.finish, weights_TK, own=own))
        for step in reading.finish:
            if step.kind == "scaled":
                factor = self.tensors(step.parameter)
                weights_TK = weights_TK * (factor[expert_ids_TK] if step.per_expert else factor)
            else:
                weights_TK = run((step,), weights_TK, own=self.own_0.dtype)
        return _wide(weights_TK)

    def weigh_pairs(self, scores_TE: Tensor, token_ids_N: Tensor, expert_ids_N: Tensor) -> Tensor:
        if self.reading.after is not None and self.reading.after[0] == "sigmoid":
            scores_TE = scores_TE.sigmoid()
        return super().weigh_pairs(scores_TE, token_ids_N, expert_ids_N)

    def _dtype(self, name: Dtype) -> torch.dtype:
        return torch.float32 if name == "float32" else self.own_0.dtype


def _softmax(logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(-1)


def _sqrtsoftplus(logits_TE: Tensor) -> Tensor:
    return F.softplus(logits_TE).sqrt()


def _identity(logits_TE: Tensor) -> Tensor:
    return logits_TE


_SCORES: dict[Score, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrtsoftplus,
    "identity": _identity,
}


def _limit(values_TE: Tensor, groups: Groups, *, fill: float) -> Tensor:
    T, E = values_TE.shape
    grouped_TGe = values_TE.reshape(T, groups.count, E // groups.count)
    if groups.score == "max":
        group_scores_TG = grouped_TGe.amax(dim=-1)
    else:
        group_scores_TG = grouped_TGe.topk(2, dim=-1).values.sum(dim=-1)
    kept_ids = group_scores_TG.topk(groups.kept, dim=-1, sorted=groups.sorted).indices
    kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(1, kept_ids, True)
    return grouped_TGe.masked_fill(~kept_TG.unsqueeze(-1), fill).reshape(T, E)


def settings_of(reading: Reading) -> GatingSettings:
    """The nearest settings that core knows, for plug-ins that look at them and for people."""
    groups, after = reading.groups, None if reading.after is None else reading.after[0]
    scale = 1.0
    for step in reading.finish:
        scale *= step.factor if isinstance(step, Times) else 1 / step.divisor if isinstance(step, Over) else 1
    normalize = next((step for step in reading.finish if isinstance(step, Normalize)), None)
    to_one = normalize is not None or any(isinstance(step, Norm) and step.p == 1 for step in reading.finish)
    return GatingSettings(
        num_experts=reading.num_experts,
        top_k=reading.top_k,
        # What selects on logits and takes a sigmoid of the chosen comes nearest to sigmoid scores.
        score="sigmoid" if after == "sigmoid" else reading.score,
        softmax_after_topk=after == "softmax",
        correction_bias=reading.correction_bias is not None,
        num_groups=1 if groups is None else groups.count,
        kept_groups=1 if groups is None else groups.kept,
        group_score="max" if groups is None or groups.count == 1 else groups.score,
        ties="torch",
        renormalize=to_one,
        eps=0.0 if normalize is None else normalize.eps,
        scale=scale,
    )


def _wide(values: Tensor) -> Tensor:
    """At least float32, which holds every 16-bit value exactly."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
