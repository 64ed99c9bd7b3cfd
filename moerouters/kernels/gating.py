"""Gating in one operator: score, bias, groups, top-k, weights, renormalise, scale and counts, from logits.

A GPU takes one kernel forward and one backward (`gpu/gating.py`). A CPU goes through the reference a few thousand rows
at a time, in several threads: what it writes in between stays in cache, and its bits are those of the reference on all
rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moerouters.kernels.counts import count_experts
from moerouters.kernels.gating_rule import Gated, Rule
from moerouters.kernels.launch import triton_serves
from moerouters.kernels.threads import share_out
from moerouters.kernels.topk import topk_lowest_id

CHUNK = 1 << 20
"""Logits of one chunk on a CPU: 4 MiB in float32."""
MOST_EXPERTS, MOST_CHOSEN = 1024, 32
"""What the Triton kernel holds in registers, and passes it is unrolled to."""


# The steps, which Gating's methods go through as well.


def score_logits(logits_TE: Tensor, score: str) -> Tensor:
    """[T, E] scores of logits in the compute dtype."""
    match score:
        case "softmax":
            return logits_TE.softmax(dim=-1)
        case "sigmoid":
            return logits_TE.sigmoid()
        case "sqrtsoftplus":
            # softplus underflows to 0 below -104, where the root's derivative is infinite and 0 * inf is NaN.
            return F.softplus(logits_TE).clamp_min(torch.finfo(logits_TE.dtype).tiny).sqrt()
        case "relu":
            return logits_TE.relu()
        case _:
            return logits_TE


def open_groups(group_scores_TG: Tensor, kept_ids: Tensor, values_TE: Tensor) -> Tensor:
    """[T, E] values, -inf for experts outside the kept groups."""
    T, G = group_scores_TG.shape
    kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(1, kept_ids, True)
    limited_TGe = values_TE.reshape(T, G, values_TE.shape[1] // G).masked_fill(~kept_TG.unsqueeze(-1), -float("inf"))
    return limited_TGe.reshape(values_TE.shape)


def score_groups(values_TE: Tensor, num_groups: int, group_score: str) -> Tensor:
    """[T, G]: the best expert of each group, or the sum of its best two."""
    grouped_TGe = values_TE.reshape(-1, num_groups, values_TE.shape[1] // num_groups)
    return grouped_TGe.amax(dim=-1) if group_score == "max" else grouped_TGe.topk(2, dim=-1).values.sum(dim=-1)


def weigh_chosen(scores_TE: Tensor, expert_ids_TK: Tensor, rule: Rule) -> Tensor:
    """[T, K] combine weights of the chosen experts; empty slots (id E) get 0."""
    return _weigh(take_along_experts(scores_TE, expert_ids_TK), expert_ids_TK == scores_TE.shape[1], rule)


def _weigh(chosen_TK: Tensor, empty_TK: Tensor | None, rule: Rule) -> Tensor:
    """[T, K] combine weights of chosen scores; None if no slot is empty."""
    if rule.softmax_after_topk:
        # A finite floor instead of -inf: a row of empty slots only must not become NaN, nor its gradient.
        weights_TK = _blank(_blank(chosen_TK, empty_TK, torch.finfo(chosen_TK.dtype).min).softmax(dim=-1), empty_TK)
    else:
        weights_TK = _blank(chosen_TK, empty_TK)
        if rule.renormalize:
            weights_TK = weights_TK / _sums(weights_TK, empty_TK, rule.eps)
    return weights_TK if rule.scale == 1.0 else weights_TK * rule.scale


def _sums(weights_TK: Tensor, empty_TK: Tensor | None, eps: float) -> Tensor:
    """[T, 1], what weights are divided by."""
    sums_T1 = weights_TK.sum(dim=-1, keepdim=True) + eps
    if empty_TK is None or eps >= torch.finfo(weights_TK.dtype).tiny:
        return sums_T1
    # A row without experts has nothing to share out, and would be 0 / 0.
    return torch.where(empty_TK.all(dim=-1, keepdim=True), 1.0, sums_T1)


def _blank(values_TK: Tensor, empty_TK: Tensor | None, value: float = 0.0) -> Tensor:
    return values_TK if empty_TK is None else values_TK.masked_fill(empty_TK, value)


def finite_rows(values_TE: Tensor) -> Tensor:
    """bool [T]: whether all of the row is finite.

    NaN passes through the extremes; asking isfinite of every element takes ten times as long (1.8 against 0.18 ms at
    T = 4096, E = 64 on a CPU), and aminmax five times.
    """
    return torch.isfinite(values_TE.amax(dim=-1)) & torch.isfinite(values_TE.amin(dim=-1))


def take_along_experts(values_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """[T, K] values at the given ids; the id E reads expert E-1 (mask it after).

    index_select rather than gather: its backward is deterministic on every device.
    """
    T, E = values_TE.shape
    rows_T1 = torch.arange(T, device=values_TE.device).unsqueeze(1) * E
    flat_N = (rows_T1 + expert_ids_TK.clamp(max=E - 1)).reshape(-1)
    return values_TE.reshape(-1).index_select(0, flat_N).reshape(expert_ids_TK.shape)


# The whole.


def fused_gating(
    logits_TE: Tensor,
    rule: Rule,
    *,
    correction_E: Tensor | None = None,
    bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
    cutoff: bool = False,
) -> Gated:
    """Route [T, E] logits, float16, bfloat16, float32 (on a CPU float64, too); gradients reach them from the weights.

    correction_E and then bias_E, float32 [E], are added to the scores for selection; padding (False in valid_T) gets
    empty slots. On a GPU the scores may differ from the reference in their last bits, and a row that is not finite has
    another gradient, which is of no use either way.
    """
    logits_TE = logits_TE.contiguous()
    return Gated(*_fused(logits_TE, correction_E, bias_E, valid_T, cutoff, *rule))


def fused_gating_torch(
    logits_TE: Tensor,
    rule: Rule,
    *,
    correction_E: Tensor | None = None,
    bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
    cutoff: bool = False,
) -> Gated:
    """Reference of `fused_gating`: one step after the other, plain autograd."""
    E, K = logits_TE.shape[1], rule.top_k
    scores_TE, finite_T = _scores(logits_TE, valid_T, rule)
    with torch.no_grad():
        adjusted_TE = scores_TE
        for addend_E in (correction_E, bias_E):
            adjusted_TE = adjusted_TE if addend_E is None else adjusted_TE + addend_E
        adjusted_TE = _limit(adjusted_TE, rule)
        ids = topk_lowest_id(adjusted_TE, K + 1 if cutoff and K < E else K)
        top = take_along_experts(adjusted_TE, ids)
        expert_ids_TK = torch.where(top[:, :K] == -float("inf"), E, ids[:, :K])
        if valid_T is not None:
            expert_ids_TK = torch.where(valid_T.unsqueeze(1), expert_ids_TK, E)
        cutoff_T = top[:, K] if cutoff and K < E else top.new_full((len(top) if cutoff else 0,), -float("inf"))
    weights_TK = _weights(scores_TE, expert_ids_TK, finite_T, rule)
    return Gated(weights_TK, expert_ids_TK, cutoff_T, count_experts(expert_ids_TK, E), finite_T)


def _scores(logits_TE: Tensor, valid_T: Tensor | None, rule: Rule) -> tuple[Tensor, Tensor]:
    if valid_T is not None:
        logits_TE = torch.where(valid_T.unsqueeze(1), logits_TE, 0.0)
    return score_logits(_wide(logits_TE), rule.score), finite_rows(logits_TE.detach())


def _weights(scores_TE: Tensor, expert_ids_TK: Tensor, finite_T: Tensor, rule: Rule) -> Tensor:
    weights_TK = weigh_chosen(scores_TE, expert_ids_TK, rule)
    return torch.where(finite_T.unsqueeze(1) | (expert_ids_TK == scores_TE.shape[1]), weights_TK, float("nan"))


def kernel_fits(logits_TE: Tensor, rule: Rule) -> bool:
    """Whether the Triton kernel routes such logits; else the reference is what a GPU has."""
    narrow = logits_TE.dtype in (torch.float16, torch.bfloat16, torch.float32)
    small = logits_TE.shape[1] <= MOST_EXPERTS and rule.top_k <= MOST_CHOSEN
    return narrow and small and triton_serves(logits_TE)


@torch.library.custom_op("moerouters::fused_gating", mutates_args=())
def _fused(
    logits_TE: Tensor, correction_E: Tensor | None, bias_E: Tensor | None, valid_T: Tensor | None, cutoff: bool,
    score: str, top_k: int, num_groups: int, kept_groups: int, group_score: str, softmax_after_topk: bool,
    renormalize: bool, eps: float, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rule = Rule(score, top_k, num_groups, kept_groups, group_score, softmax_after_topk, renormalize, eps, scale)
    if kernel_fits(logits_TE, rule):
        from moerouters.kernels.gpu.gating import gating_forward

        return gating_forward(logits_TE, rule, correction_E=correction_E, bias_E=bias_E, valid_T=valid_T, cutoff=cutoff)
    outputs = _empty_outputs(logits_TE, top_k, cutoff)
    weights_TK, expert_ids_TK, cutoff_T, load_E, finite_T = outputs
    plain = correction_E is None and bias_E is None and valid_T is None and not cutoff
    load_E.zero_()
    adding = Lock()

    def run(some: Iterable[slice]) -> None:
        for rows in some:
            part = _gate_whole(logits_TE[rows], rule) if plain and logits_TE.device.type == "cpu" else None
            if part is None:
                part = fused_gating_torch(
                    logits_TE[rows], rule, correction_E=correction_E, bias_E=bias_E,
                    valid_T=None if valid_T is None else valid_T[rows], cutoff=cutoff,
                )  # fmt: skip
            weights_TK[rows], expert_ids_TK[rows], finite_T[rows] = part.weights_TK, part.expert_ids_TK, part.finite_T
            if cutoff:
                cutoff_T[rows] = part.cutoff_T
            with adding:
                load_E.add_(part.load_E)

    share_out(run, _chunks(logits_TE))
    return outputs


def _gate_whole(logits_TE: Tensor, rule: Rule) -> Gated | None:
    """`fused_gating_torch` where all logits are finite: then no slot is empty. None where one is not.

    Half of what the reference does once it has ids is about empty slots, and changes no bit where there are none.
    """
    if not bool(torch.isfinite(logits_TE.sum())):  # infinity and NaN never leave a sum; where it overflows, no harm
        return None
    scores_TE = score_logits(_wide(logits_TE), rule.score)
    expert_ids_TK = topk_lowest_id(_limit(scores_TE, rule), rule.top_k)
    weights_TK = _weigh(scores_TE.gather(1, expert_ids_TK), None, rule)
    load_E = torch.bincount(expert_ids_TK.reshape(-1), minlength=logits_TE.shape[1])
    T = logits_TE.shape[0]
    return Gated(weights_TK, expert_ids_TK, scores_TE.new_empty(0), load_E, load_E.new_ones(T, dtype=torch.bool))


def _limit(adjusted_TE: Tensor, rule: Rule) -> Tensor:
    if rule.kept_groups == rule.num_groups:
        return adjusted_TE
    group_scores_TG = score_groups(adjusted_TE, rule.num_groups, rule.group_score)
    return open_groups(group_scores_TG, topk_lowest_id(group_scores_TG, rule.kept_groups), adjusted_TE)


def _wide(logits_TE: Tensor) -> Tensor:
    return logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()


def _empty_outputs(logits_TE: Tensor, top_k: int, cutoff: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, E = logits_TE.shape
    dtype = torch.float64 if logits_TE.dtype == torch.float64 else torch.float32
    return (
        logits_TE.new_empty((T, top_k), dtype=dtype),
        logits_TE.new_empty((T, top_k), dtype=torch.int64),
        logits_TE.new_empty((T if cutoff else 0,), dtype=dtype),
        logits_TE.new_empty((E,), dtype=torch.int64),
        logits_TE.new_empty((T,), dtype=torch.bool),
    )


@_fused.register_fake
def _(
    logits_TE: Tensor, correction_E: Any, bias_E: Any, valid_T: Any, cutoff: bool, score: str, top_k: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(logits_TE, top_k, cutoff)


def fused_gating_backward_torch(
    grad_weights_TK: Tensor,
    logits_TE: Tensor,
    rule: Rule,
    *,
    expert_ids_TK: Tensor,
    finite_T: Tensor,
    valid_T: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """[T, E] gradient of `fused_gating_torch` in the bits that autograd gives it; differentiable in turn.

    whole: no slot is empty and no row broken.
    """
    T, E = logits_TE.shape
    scores_TE, _ = _scores(logits_TE, valid_T, rule)
    chosen_TK = take_along_experts(scores_TE, expert_ids_TK)
    empty_TK = None if whole else expert_ids_TK == E
    if empty_TK is not None:
        grad_weights_TK = grad_weights_TK.masked_fill(~(finite_T.unsqueeze(1) | empty_TK), 0)
    grad_TK = _weigh_backward(grad_weights_TK, chosen_TK, empty_TK, rule)
    rows_T1 = torch.arange(T, device=logits_TE.device).unsqueeze(1) * E
    flat_N = (rows_T1 + expert_ids_TK.clamp(max=E - 1)).reshape(-1)
    grad_TE = torch.zeros_like(scores_TE).reshape(-1).index_add(0, flat_N, grad_TK.reshape(-1)).reshape(T, E)
    grad_TE = _score_backward(grad_TE, logits_TE.to(scores_TE.dtype), scores_TE, rule.score).to(logits_TE.dtype)
    return grad_TE if valid_T is None else torch.where(valid_T.unsqueeze(1), grad_TE, 0.0)


def _weigh_backward(grad_TK: Tensor, chosen_TK: Tensor, empty_TK: Tensor | None, rule: Rule) -> Tensor:
    grad_TK = grad_TK if rule.scale == 1.0 else grad_TK * rule.scale
    if rule.softmax_after_topk:
        weights_TK = _blank(chosen_TK, empty_TK, torch.finfo(chosen_TK.dtype).min).softmax(dim=-1)
        grad_TK = torch.ops.aten._softmax_backward_data(_blank(grad_TK, empty_TK), weights_TK, -1, weights_TK.dtype)
    elif rule.renormalize:
        chosen_TK = _blank(chosen_TK, empty_TK)
        sums_T1 = _sums(chosen_TK, empty_TK, rule.eps)
        grad_sums_T1 = (-grad_TK * ((chosen_TK / sums_T1) / sums_T1)).sum(dim=-1, keepdim=True)
        grad_TK = grad_TK / sums_T1 + grad_sums_T1
    return _blank(grad_TK, empty_TK)


def _score_backward(grad_TE: Tensor, logits_TE: Tensor, scores_TE: Tensor, score: str) -> Tensor:
    match score:
        case "softmax":
            backward: Tensor = torch.ops.aten._softmax_backward_data(grad_TE, scores_TE, -1, scores_TE.dtype)
        case "sigmoid":
            backward = torch.ops.aten.sigmoid_backward(grad_TE, scores_TE)
        case "sqrtsoftplus":
            above_TE = F.softplus(logits_TE) >= torch.finfo(logits_TE.dtype).tiny
            backward = torch.where(above_TE, grad_TE / (2 * scores_TE), 0.0)
            backward = torch.ops.aten.softplus_backward(backward, logits_TE, 1.0, 20.0)
        case "relu":
            backward = torch.ops.aten.threshold_backward(grad_TE, scores_TE, 0)
        case _:
            backward = grad_TE
    return backward


@torch.library.custom_op("moerouters::fused_gating_backward", mutates_args=())
def _fused_backward(
    grad_weights_TK: Tensor, logits_TE: Tensor, expert_ids_TK: Tensor, finite_T: Tensor, valid_T: Tensor | None,
    score: str, top_k: int, num_groups: int, kept_groups: int, group_score: str, softmax_after_topk: bool,
    renormalize: bool, eps: float, scale: float,
) -> Tensor:  # fmt: skip
    rule = Rule(score, top_k, num_groups, kept_groups, group_score, softmax_after_topk, renormalize, eps, scale)
    if kernel_fits(logits_TE, rule):
        from moerouters.kernels.gpu.gating import gating_backward

        return gating_backward(
            grad_weights_TK, logits_TE, rule, expert_ids_TK=expert_ids_TK, finite_T=finite_T, valid_T=valid_T
        )
    grad_logits_TE = torch.empty_like(logits_TE)
    on_cpu = logits_TE.device.type == "cpu"  # elsewhere a look at values would be waited for
    whole = (
        on_cpu and valid_T is None and bool(finite_T.all()) and not bool((expert_ids_TK == logits_TE.shape[1]).any())
    )

    def run(some: Iterable[slice]) -> None:
        for rows in some:
            grad_logits_TE[rows] = fused_gating_backward_torch(
                grad_weights_TK[rows], logits_TE[rows], rule, expert_ids_TK=expert_ids_TK[rows],
                finite_T=finite_T[rows], valid_T=None if valid_T is None else valid_T[rows], whole=whole,
            )  # fmt: skip

    share_out(run, _chunks(logits_TE))
    return grad_logits_TE


@_fused_backward.register_fake
def _(grad_weights_TK: Tensor, logits_TE: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits_TE)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, _, valid_T, _, *rule = inputs
    ctx.rule = Rule(*rule)
    ctx.save_for_backward(logits_TE, output[1], output[4], valid_T)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_weights_TK: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    logits_TE, expert_ids_TK, finite_T, valid_T = ctx.saved_tensors
    if torch.is_grad_enabled():  # somebody wants the gradient of the gradient
        grad_logits_TE = fused_gating_backward_torch(
            grad_weights_TK, logits_TE, ctx.rule, expert_ids_TK=expert_ids_TK, finite_T=finite_T, valid_T=valid_T
        )
    else:
        grad_logits_TE = _fused_backward(
            grad_weights_TK.contiguous(), logits_TE, expert_ids_TK, finite_T, valid_T, *ctx.rule
        )
    return (grad_logits_TE, *[None] * 13)


_fused.register_autograd(_backward, setup_context=_save)


def _chunks(logits_TE: Tensor) -> list[slice]:
    """All rows at once on a GPU."""
    T, E = logits_TE.shape
    rows = max(CHUNK // E, 1) if logits_TE.device.type == "cpu" else max(T, 1)
    return [slice(start, start + rows) for start in range(0, T, rows)]
