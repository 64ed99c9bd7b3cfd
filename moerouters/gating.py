"""Gating: how the *model* turns logits into scores and chosen scores into combine weights.

Balancers change who is chosen; gating decides what the chosen ones weigh. The two are apart so that one balancer works
in every architecture. Odd models subclass Gating; plug-ins never do.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from moerouters.errors import ConfigError, ShapeError
from moerouters.kernels.gating import open_groups, score_groups, score_logits, take_along_experts, weigh_chosen
from moerouters.kernels.gating_rule import Rule
from moerouters.kernels.topk import topk_lowest_id
from moerouters.state import StatefulModule

__all__ = ["Gating", "GatingSettings", "ScoreFunction", "take_along_experts"]

ScoreFunction = Literal["softmax", "sigmoid", "sqrtsoftplus", "relu", "identity"]


class GatingSettings(BaseModel):
    """The settings of a Gating: frozen and closed. Field names follow the flow: cap, score, limit, select, weigh."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_experts: int = Field(ge=1)
    """E."""
    top_k: int = Field(ge=1)
    """K, at most E."""
    soft_cap: float | None = Field(default=None, gt=0)
    """logits become cap * tanh(logits / cap)."""
    score: ScoreFunction = "softmax"
    """What makes scores of logits; `identity` selects on logits."""
    softmax_after_topk: bool = False
    """Weights are a softmax over the K chosen logits (GPT-OSS, Granite); needs score='identity'."""
    correction_bias: bool = False
    """The model has a bias of its own per expert that steers selection only (DeepSeek-V3's e_score_correction_bias)."""
    num_groups: int = Field(default=1, ge=1)
    """Experts stand in this many equal, contiguous groups."""
    kept_groups: int = Field(default=1, ge=1)
    """Only the best this many groups of a token stay candidates."""
    group_score: Literal["max", "top2_sum"] = "max"
    """A group's score: its best expert, or the sum of its best two."""
    ties: Literal["lowest_id", "torch"] = "lowest_id"
    """Order among equal scores: by expert id, or whatever torch.topk does (to keep a swapped model's bits)."""
    renormalize: bool = True
    """Divide the K weights by their sum."""
    eps: float = Field(default=1e-20, ge=0)
    """Added to that sum; 1e-20 vanishes in float32 unless every chosen score is 0."""
    scale: float = 1.0
    """Factor on the combine weights, after renormalisation."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        E, K, groups, kept = self.num_experts, self.top_k, self.num_groups, self.kept_groups
        problems = []
        if K > E:
            problems.append(f"top_k {K} exceeds num_experts {E}")
        if E % groups:
            problems.append(f"num_experts {E} is not a multiple of num_groups {groups}")
        elif kept > groups:
            problems.append(f"kept_groups {kept} exceeds num_groups {groups}")
        elif groups > 1 and kept * (E // groups) < K:
            problems.append(f"{kept} kept groups of {E // groups} experts hold fewer than top_k {K}")
        elif groups > 1 and self.group_score == "top2_sum" and E // groups < 2:
            problems.append(f"group_score top2_sum needs 2 experts per group, num_groups {groups} leaves {E // groups}")
        if self.softmax_after_topk and self.score != "identity":
            problems.append("softmax_after_topk selects on logits: set score='identity'")
        if self.score == "identity" and not self.softmax_after_topk:
            problems.append("score='identity' gives no valid weights: set softmax_after_topk=True")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Gating(StatefulModule):
    """Score, limit and weigh. Stateless unless `correction_bias` is set; then it owns float32 `correction_bias_E`."""

    correction_bias_E: Tensor

    def __init__(self, settings: GatingSettings) -> None:
        super().__init__()
        self.settings = settings
        self.rule = Rule(*[getattr(settings, name) for name in Rule._fields])
        if settings.correction_bias:
            self.register_state("correction_bias_E", settings.num_experts)

    @classmethod
    def _make(cls, **settings: Any) -> Self:
        try:
            return cls(GatingSettings(**settings))
        except ValidationError as error:
            raise ConfigError(
                "the gating got bad settings.",
                where="\n".join(f"{k}={v!r}" for k, v in settings.items()),
                why="\n".join(_one_line(e) for e in error.errors()),
                fix="mend the fields named above; moerouters.gating.GatingSettings documents each",
            ) from None

    @classmethod
    def softmax(cls, num_experts: int, top_k: int, **settings: Any) -> Self:
        """Softmax over all experts, then top-k (Mixtral, Qwen-MoE, OLMoE)."""
        return cls._make(num_experts=num_experts, top_k=top_k, score="softmax", **settings)

    @classmethod
    def sigmoid(cls, num_experts: int, top_k: int, **settings: Any) -> Self:
        """Sigmoid scores (DeepSeek-V3, GLM, Kimi)."""
        return cls._make(num_experts=num_experts, top_k=top_k, score="sigmoid", **settings)

    @classmethod
    def sqrtsoftplus(cls, num_experts: int, top_k: int, **settings: Any) -> Self:
        """sqrt(softplus(logits)) scores (DeepSeek-V4)."""
        return cls._make(num_experts=num_experts, top_k=top_k, score="sqrtsoftplus", **settings)

    @classmethod
    def softmax_after_topk(cls, num_experts: int, top_k: int, **settings: Any) -> Self:
        """Top-k on logits, then softmax over the K chosen (GPT-OSS, Granite)."""
        settings = {"score": "identity", "softmax_after_topk": True, "renormalize": False} | settings
        return cls._make(num_experts=num_experts, top_k=top_k, **settings)

    @classmethod
    def relu(cls, num_experts: int, top_k: int, **settings: Any) -> Self:
        """relu(logits), not renormalised: a zero score is no expert at all (ReMoE)."""
        settings = {"renormalize": False} | settings
        return cls._make(num_experts=num_experts, top_k=top_k, score="relu", **settings)

    @classmethod
    def of(cls, num_experts: int, top_k: int, *, score: str = "softmax", **settings: Any) -> Self:
        """By name: softmax, sigmoid, sqrtsoftplus, softmax_after_topk or relu; as `RouterSpec.gating` has it."""
        names = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_after_topk", "relu")
        if score not in names:
            raise ConfigError(f"no gating is called {score!r}.", why=f"there is: {', '.join(names)}", fix="pick one")
        gating: Self = getattr(cls, score)(num_experts, top_k, **settings)
        return gating

    @property
    def num_experts(self) -> int:
        return self.settings.num_experts

    @property
    def top_k(self) -> int:
        return self.settings.top_k

    @property
    def domain(self) -> Literal["unit", "real"]:
        """Where scores live: `unit` (softmax, sigmoid: [0, 1]) or `real`. Bias rates and thresholds depend on it."""
        return "unit" if self.settings.score in ("softmax", "sigmoid") else "real"

    @property
    def fusable(self) -> bool:
        """Whether `rule` says it all, so that `fused_gating` may do it: no adapter, no soft cap, no ties of torch."""
        return type(self) is Gating and self.settings.soft_cap is None and self.settings.ties == "lowest_id"

    def prepare(self, logits_TE: Tensor) -> Tensor:
        """logits in the compute dtype (float32; float64 stays), soft-capped. Raises ShapeError on a wrong E."""
        if logits_TE.dim() != 2 or logits_TE.shape[1] != self.num_experts:
            raise ShapeError(
                f"logits have shape {list(logits_TE.shape)}, but the gating has {self.num_experts} experts.",
                why="logits are [tokens, num_experts]",
                fix=f"give the gate projection {self.num_experts} outputs, or the gating num_experts="
                f"{logits_TE.shape[-1] if logits_TE.dim() else '?'}",
            )
        if logits_TE.dtype != torch.float64:
            logits_TE = logits_TE.float()
        cap = self.settings.soft_cap
        return logits_TE if cap is None else cap * torch.tanh(logits_TE / cap)

    def score(self, logits_TE: Tensor) -> Tensor:
        """[T, E] scores of prepared logits."""
        return score_logits(logits_TE, self.settings.score)

    def probabilities(self, logits_TE: Tensor) -> Tensor:
        """[T, E], rows that sum to 1, for auxiliary losses: softmax, or the scores over their sum (DeepSeek-V3).

        A row whose scores all underflow is 0 instead.
        """
        if self.settings.score in ("softmax", "identity"):
            return logits_TE.softmax(dim=-1)
        scores_TE = self.score(logits_TE)
        # Not the smallest float: 1 / 1e-38 times a GradScaler's 65536 overflows in backward, and inf * 0 is NaN.
        return scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)

    def corrected(self, scores_TE: Tensor) -> Tensor:
        """[T, E] scores that selection starts from: with the model's own correction bias, if it has one."""
        return scores_TE + self.correction_bias_E if self.settings.correction_bias else scores_TE

    def limit(self, adjusted_TE: Tensor) -> Tensor:
        """Set the experts outside a token's kept groups to -inf: 0.0 would win over negative biased scores."""
        s = self.settings
        if s.kept_groups == s.num_groups:
            return adjusted_TE
        group_scores_TG = score_groups(adjusted_TE, s.num_groups, s.group_score)
        return open_groups(group_scores_TG, self.top(group_scores_TG, s.kept_groups), adjusted_TE)

    def top(self, values: Tensor, k: int) -> Tensor:
        """Columns of the k largest values per row, falling, ties as the settings say."""
        if self.settings.ties == "torch":
            return values.topk(k, dim=-1).indices
        return topk_lowest_id(values, k)

    def weigh(self, scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """[T, K] combine weights of the chosen experts from *unadjusted* scores; empty slots (id E) get 0."""
        return weigh_chosen(scores_TE, expert_ids_TK, self.rule)

    def weigh_pairs(self, scores_TE: Tensor, token_ids_N: Tensor, expert_ids_N: Tensor) -> Tensor:
        """[N] combine weights of (token, expert) pairs; empty pairs (expert id E) get 0. Same rule as `weigh`."""
        T, E = scores_TE.shape
        empty_N = expert_ids_N == E
        flat_N = token_ids_N * E + expert_ids_N.clamp(max=E - 1)
        chosen_N = scores_TE.reshape(-1).index_select(0, flat_N)
        if self.settings.softmax_after_topk:
            # The largest chosen score of each token cancels in the quotient and keeps exp in range.
            lowest = torch.finfo(chosen_N.dtype).min
            peaks_T = chosen_N.new_full((T,), lowest).scatter_reduce(
                0, token_ids_N, chosen_N.detach().masked_fill(empty_N, lowest), "amax"
            )
            chosen_N = (chosen_N - peaks_T.index_select(0, token_ids_N)).masked_fill(empty_N, 0).exp()
        weights_N = chosen_N.masked_fill(empty_N, 0)
        if self.settings.renormalize or self.settings.softmax_after_topk:
            eps = 0.0 if self.settings.softmax_after_topk else self.settings.eps
            sums_T = weights_N.new_zeros(T).index_add(0, token_ids_N, weights_N) + eps
            weights_N = weights_N / torch.where(empty_N, 1.0, sums_T.index_select(0, token_ids_N))
        return weights_N * self.settings.scale

    def extra_repr(self) -> str:
        shown = self.settings.model_dump(exclude_defaults=True)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _one_line(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
