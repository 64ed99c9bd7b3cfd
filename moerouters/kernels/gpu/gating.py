"""The Triton kernels of `fused_gating`: a program takes a few rows of logits through all of it in registers."""

# Kernels are traced by their names and constants, not by types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moerouters.kernels.gating_rule import Gated, Rule

TILE = 2048
"""Logits that a program holds at a time: 16 in each of its 128 threads, eight tiles one after the other."""
TILES = 8
"""So many per program: it adds to each expert's count once, not once per tile."""


@triton.jit
def _sort_keys(values, columns, WIDTH: tl.constexpr):
    """int64 keys without ties that order values as `topk_lowest_id` does: value first, then the lower column."""
    values = tl.where(values != values, -3.4028234663852886e38, values) + 0.0  # 0.0 of -0.0
    bits = values.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # below zero, floats fall as their bits rise
    return (bits.to(tl.int64) << 32) | (WIDTH - 1 - columns)


@triton.jit
def _key_column(keys, WIDTH: tl.constexpr):
    return WIDTH - 1 - (keys & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _key_value(keys):
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _softplus(x):
    """As torch: x above 20. log(1 + e) loses small e, so e * log(u) / (u - 1) with u = 1 + e."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def _score(x_TE, real_1E, SCORE: tl.constexpr):
    if SCORE == "softmax":
        peak_T = tl.max(tl.where(real_1E, x_TE, float("-inf")), axis=1)
        powers_TE = tl.where(real_1E, tl.exp(x_TE - peak_T[:, None]), 0.0)
        s_TE = powers_TE / tl.sum(powers_TE, axis=1)[:, None]
    elif SCORE == "sigmoid":
        s_TE = 1.0 / (1.0 + tl.exp(-x_TE))
    elif SCORE == "sqrtsoftplus":
        s_TE = tl.sqrt_rn(tl.maximum(_softplus(x_TE), 1.1754943508222875e-38))
    elif SCORE == "relu":
        s_TE = tl.where(x_TE < 0.0, 0.0, x_TE)
    else:
        s_TE = x_TE
    # What is not finite has to show, and maxima pass NaN over.
    broken_T = tl.max(tl.where(real_1E & (x_TE != x_TE), 1, 0), axis=1)
    if SCORE == "softmax":
        s_TE = tl.where(broken_T[:, None] > 0, float("nan"), s_TE)
    else:
        s_TE = tl.where(x_TE != x_TE, float("nan"), s_TE)
    return s_TE


@triton.jit
def gating_forward_kernel(
    logits_ptr, correction_ptr, bias_ptr, valid_ptr, weights_ptr, ids_ptr, cutoff_ptr, load_ptr, finite_ptr,
    T, eps, scale,
    E: tl.constexpr, K: tl.constexpr, G: tl.constexpr, KEPT: tl.constexpr, SCORE: tl.constexpr, TOP2: tl.constexpr,
    AFTER: tl.constexpr, RENORMALIZE: tl.constexpr, CUTOFF: tl.constexpr,
    CORRECTED: tl.constexpr, BIASED: tl.constexpr, PADDED: tl.constexpr,
    EP: tl.constexpr, KP: tl.constexpr, GP: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    LOWEST: tl.constexpr = -9223372036854775808
    e_1E = tl.arange(0, EP)[None, :]
    real_1E = e_1E < E
    k_1K = tl.arange(0, KP)[None, :]
    load_E = tl.zeros([EP], tl.int32)
    for tile in range(TILES):
        t_T = (tl.program_id(0) * TILES + tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        here_T = t_T < T
        open_T = here_T
        if PADDED:
            open_T = here_T & (tl.load(valid_ptr + t_T, mask=here_T, other=0) != 0)
        x_TE = tl.load(logits_ptr + t_T[:, None] * E + e_1E, mask=open_T[:, None] & real_1E, other=0.0).to(tl.float32)
        odd_TE = (x_TE != x_TE) | (tl.abs(x_TE) == float("inf"))
        finite_T = tl.max(odd_TE.to(tl.int32), axis=1) == 0
        s_TE = _score(x_TE, real_1E, SCORE)

        a_TE = s_TE
        if CORRECTED:
            a_TE += tl.load(correction_ptr + e_1E, mask=real_1E, other=0.0)
        if BIASED:
            a_TE += tl.load(bias_ptr + e_1E, mask=real_1E, other=0.0)
        keys_TE = tl.where(real_1E, _sort_keys(a_TE, e_1E, EP), LOWEST)
        if KEPT < G:
            g_1G = tl.arange(0, GP)[None, :]
            group_keys_TG = tl.full([ROWS, GP], LOWEST, tl.int64)
            nan_TE = (a_TE != a_TE).to(tl.int32)
            for g in tl.static_range(G):
                mine_1E = e_1E // (E // G) == g
                best_T = tl.max(tl.where(mine_1E, keys_TE, LOWEST), axis=1)
                score_T = _key_value(best_T)
                if TOP2:
                    next_TE = tl.where(mine_1E & (keys_TE != best_T[:, None]), keys_TE, LOWEST)
                    score_T += _key_value(tl.max(next_TE, axis=1))
                score_T = tl.where(tl.max(tl.where(mine_1E, nan_TE, 0), axis=1) > 0, float("nan"), score_T)
                group_keys_TG = tl.where(g_1G == g, _sort_keys(score_T, g, GP)[:, None], group_keys_TG)
            kept_TE = tl.zeros([ROWS, EP], tl.int32)
            for _ in tl.static_range(KEPT):
                best_T = tl.max(group_keys_TG, axis=1)
                group_keys_TG = tl.where(group_keys_TG == best_T[:, None], LOWEST, group_keys_TG)
                kept_TE += (e_1E // (E // G) == _key_column(best_T, GP)[:, None]).to(tl.int32)
            closed_TE = tl.full([ROWS, EP], float("-inf"), tl.float32)
            closed_TE = tl.where(real_1E, _sort_keys(closed_TE, e_1E, EP), LOWEST)
            keys_TE = tl.where(kept_TE > 0, keys_TE, closed_TE)

        ids_TK = tl.full([ROWS, KP], E, tl.int32)
        c_TK = tl.zeros([ROWS, KP], tl.float32)
        taken_TE = tl.zeros([ROWS, EP], tl.int32)
        for k in tl.static_range(K):
            best_T = tl.max(keys_TE, axis=1)
            chosen_TE = keys_TE == best_T[:, None]
            keys_TE = tl.where(chosen_TE, LOWEST, keys_TE)
            filled_T = open_T & (_key_value(best_T) != float("-inf"))
            id_T = tl.where(filled_T, _key_column(best_T, EP), E)
            c_T = tl.sum(tl.where(e_1E == id_T[:, None], s_TE, 0.0), axis=1)
            ids_TK = tl.where(k_1K == k, id_T[:, None], ids_TK)
            c_TK = tl.where(k_1K == k, c_T[:, None], c_TK)
            taken_TE += tl.where(chosen_TE & filled_T[:, None], 1, 0)
        load_E += tl.sum(taken_TE, axis=0)
        if CUTOFF:
            cutoff_T = tl.full([ROWS], float("-inf"), tl.float32)
            if K < E:
                cutoff_T = _key_value(tl.max(keys_TE, axis=1))
            tl.store(cutoff_ptr + t_T, cutoff_T, mask=here_T)

        empty_TK = ids_TK == E
        if AFTER:
            peak_T = tl.max(tl.where(empty_TK, float("-inf"), c_TK), axis=1)
            powers_TK = tl.where(empty_TK, 0.0, tl.exp(c_TK - peak_T[:, None]))
            total_T = tl.sum(powers_TK, axis=1)
            c_TK = powers_TK / tl.where(total_T == 0.0, 1.0, total_T)[:, None]
        elif RENORMALIZE:
            slots_T = tl.sum((ids_TK != E).to(tl.int32), axis=1)
            c_TK = c_TK / tl.where(slots_T == 0, 1.0, tl.sum(c_TK, axis=1) + eps)[:, None]
        w_TK = tl.where(empty_TK, 0.0, tl.where(finite_T[:, None], c_TK * scale, float("nan")))
        out_TK = t_T[:, None] * K + k_1K
        mask_TK = here_T[:, None] & (k_1K < K)
        tl.store(weights_ptr + out_TK, w_TK, mask=mask_TK)
        tl.store(ids_ptr + out_TK, ids_TK.to(tl.int64), mask=mask_TK)
        tl.store(finite_ptr + t_T, finite_T.to(tl.int8), mask=here_T)
    e_E = tl.arange(0, EP)
    tl.atomic_add(load_ptr + e_E, load_E.to(tl.int64), mask=(e_E < E) & (load_E > 0))  # integers: any order will do


@triton.jit
def gating_backward_kernel(
    grad_weights_ptr, logits_ptr, ids_ptr, finite_ptr, valid_ptr, grad_logits_ptr,
    T, eps, scale,
    E: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, AFTER: tl.constexpr, RENORMALIZE: tl.constexpr,
    PADDED: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    e_1E = tl.arange(0, EP)[None, :]
    real_1E = e_1E < E
    k_1K = tl.arange(0, KP)[None, :]
    t_T = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here_T = t_T < T
    open_T = here_T
    if PADDED:
        open_T = here_T & (tl.load(valid_ptr + t_T, mask=here_T, other=0) != 0)
    x_TE = tl.load(logits_ptr + t_T[:, None] * E + e_1E, mask=open_T[:, None] & real_1E, other=0.0).to(tl.float32)
    s_TE = _score(x_TE, real_1E, SCORE)

    in_TK = t_T[:, None] * K + k_1K
    mask_TK = here_T[:, None] & (k_1K < K)
    ids_TK = tl.load(ids_ptr + in_TK, mask=mask_TK, other=E).to(tl.int32)
    g_TK = tl.load(grad_weights_ptr + in_TK, mask=mask_TK, other=0.0)
    finite_T = tl.load(finite_ptr + t_T, mask=here_T, other=1) != 0
    empty_TK = ids_TK == E
    g_TK = tl.where(empty_TK | (finite_T[:, None] == 0), 0.0, g_TK * scale)
    c_TK = tl.zeros([ROWS, KP], tl.float32)
    for k in tl.static_range(K):
        id_T = tl.sum(tl.where(k_1K == k, ids_TK, 0), axis=1)
        c_T = tl.sum(tl.where(e_1E == id_T[:, None], s_TE, 0.0), axis=1)
        c_TK = tl.where(k_1K == k, c_T[:, None], c_TK)
    if AFTER:
        peak_T = tl.max(tl.where(empty_TK, float("-inf"), c_TK), axis=1)
        powers_TK = tl.where(empty_TK, 0.0, tl.exp(c_TK - peak_T[:, None]))
        total_T = tl.sum(powers_TK, axis=1)
        p_TK = powers_TK / tl.where(total_T == 0.0, 1.0, total_T)[:, None]
        g_TK = p_TK * (g_TK - tl.sum(g_TK * p_TK, axis=1)[:, None])
    elif RENORMALIZE:
        slots_T = tl.sum((ids_TK != E).to(tl.int32), axis=1)
        total_T1 = tl.where(slots_T == 0, 1.0, tl.sum(c_TK, axis=1) + eps)[:, None]
        g_TK = g_TK / total_T1 - tl.sum(g_TK * (c_TK / total_T1 / total_T1), axis=1)[:, None]
    g_TK = tl.where(empty_TK, 0.0, g_TK)

    g_TE = tl.zeros([ROWS, EP], tl.float32)
    for k in tl.static_range(K):
        id_T = tl.sum(tl.where(k_1K == k, ids_TK, 0), axis=1)
        g_T = tl.sum(tl.where(k_1K == k, g_TK, 0.0), axis=1)
        g_TE += tl.where(e_1E == id_T[:, None], g_T[:, None], 0.0)
    if SCORE == "softmax":
        g_TE = s_TE * (g_TE - tl.sum(tl.where(real_1E, g_TE * s_TE, 0.0), axis=1)[:, None])
    elif SCORE == "sigmoid":
        g_TE = g_TE * (1.0 - s_TE) * s_TE
    elif SCORE == "sqrtsoftplus":
        g_TE = tl.where(_softplus(x_TE) >= 1.1754943508222875e-38, g_TE / (2.0 * s_TE), 0.0)
        g_TE = tl.where(x_TE > 20.0, g_TE, g_TE / (1.0 + tl.exp(-x_TE)))
    elif SCORE == "relu":
        g_TE = tl.where(s_TE <= 0.0, 0.0, g_TE)
    g_TE = tl.where(open_T[:, None], g_TE, 0.0)
    tl.store(grad_logits_ptr + t_T[:, None] * E + e_1E, g_TE, mask=here_T[:, None] & real_1E)


def gating_forward(
    logits_TE: Tensor,
    rule: Rule,
    *,
    correction_E: Tensor | None,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    cutoff: bool,
    rows: int | None = None,
    tiles: int = TILES,
) -> Gated:
    """As `fused_gating_torch`, for contiguous float16, bfloat16 or float32 logits; a cutoff is never NaN.

    rows, tiles: of a tile, and of a program.
    """
    T, E = logits_TE.shape
    K, G = rule.top_k, rule.num_groups
    sizes = _sizes(E, K, rows, grouped=rule.kept_groups < G)
    gated = Gated(
        logits_TE.new_empty((T, K), dtype=torch.float32),
        logits_TE.new_empty((T, K), dtype=torch.int64),
        logits_TE.new_empty((T if cutoff else 0,), dtype=torch.float32),
        logits_TE.new_zeros((E,), dtype=torch.int64),
        logits_TE.new_empty((T,), dtype=torch.bool),
    )
    if T:
        gating_forward_kernel[(triton.cdiv(T, sizes["ROWS"] * tiles),)](
            logits_TE, _vector(correction_E, logits_TE), _vector(bias_E, logits_TE), _bytes(valid_T, logits_TE),
            gated.weights_TK, gated.expert_ids_TK, gated.cutoff_T, gated.load_E, gated.finite_T.view(torch.int8),
            T, rule.eps, rule.scale,
            E=E, K=K, G=G, KEPT=rule.kept_groups, SCORE=rule.score, TOP2=rule.group_score == "top2_sum",
            AFTER=rule.softmax_after_topk, RENORMALIZE=rule.renormalize, CUTOFF=cutoff,
            CORRECTED=correction_E is not None, BIASED=bias_E is not None, PADDED=valid_T is not None,
            GP=triton.next_power_of_2(G), TILES=tiles, **sizes,
        )  # fmt: skip
    return gated


def gating_backward(
    grad_weights_TK: Tensor,
    logits_TE: Tensor,
    rule: Rule,
    *,
    expert_ids_TK: Tensor,
    finite_T: Tensor,
    valid_T: Tensor | None,
    rows: int | None = None,
) -> Tensor:
    """As `fusedgating_backward_kernel_torch`, but for rows that are not finite."""
    T, E = logits_TE.shape
    sizes = _sizes(E, rule.top_k, rows)
    grad_logits_TE = torch.empty_like(logits_TE)
    if T:
        gating_backward_kernel[(triton.cdiv(T, sizes["ROWS"]),)](
            grad_weights_TK, logits_TE, expert_ids_TK, finite_T.view(torch.int8), _bytes(valid_T, logits_TE),
            grad_logits_TE, T, rule.eps, rule.scale,
            E=E, K=rule.top_k, SCORE=rule.score, AFTER=rule.softmax_after_topk, RENORMALIZE=rule.renormalize,
            PADDED=valid_T is not None, **sizes,
        )  # fmt: skip
    return grad_logits_TE


def _sizes(E: int, K: int, rows: int | None, *, grouped: bool = False) -> dict[str, int]:
    """Groups take registers: a quarter of a tile then, or they spill."""
    wide = triton.next_power_of_2(E)
    return {"EP": wide, "KP": triton.next_power_of_2(K), "ROWS": rows or max(TILE // (4 if grouped else 1) // wide, 1)}


def _vector(values_E: Tensor | None, logits_TE: Tensor) -> Tensor:
    """Where there is none, something to point at."""
    return logits_TE if values_E is None else values_E.to(torch.float32).contiguous()


def _bytes(valid_T: Tensor | None, logits_TE: Tensor) -> Tensor:
    return logits_TE if valid_T is None else valid_T.contiguous().view(torch.int8)
