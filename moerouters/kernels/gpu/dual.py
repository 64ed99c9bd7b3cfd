"""Triton kernels of `moerouters.kernels.dual`: seven launches an iteration, no host synchronisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moerouters.kernels.gpu.order_statistic import count_digits, descend, new_counts, unsortable
from moerouters.kernels.overshoot import FURTHER

SCORES_AT_ONCE = 2048
"""That a program of the token kernel holds in registers."""


@triton.jit
def load_dual(dual_ptr, tokens_ptr, num_experts, CENTRE: tl.constexpr, BLOCK_E: tl.constexpr):
    """q [BLOCK_E], its mean taken off first if CENTRE and there are tokens. Every program adds up in the same order."""
    experts = tl.arange(0, BLOCK_E)
    dual_E = tl.load(dual_ptr + experts, mask=experts < num_experts, other=0.0)
    if CENTRE:
        mean = tl.div_rn(tl.sum(dual_E, axis=0), num_experts.to(tl.float32))
        dual_E = tl.where(tl.load(tokens_ptr) > 0, dual_E - mean, dual_E)
    return dual_E


@triton.jit
def token_threshold_kernel(
    scores_ptr, dual_ptr, valid_ptr, threshold_ptr, tokens_ptr, wanted_ptr, num_tokens, num_experts, top_k,
    FIRST: tl.constexpr, MASKED: tl.constexpr, CENTRED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """p of every token, from contiguous scores; +inf for one that does not count. The first call counts the tokens,
    later ones, if CENTRED, the tokens by which each expert is wanted."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    live = tokens < num_tokens
    if MASKED:
        live = live & tl.load(valid_ptr + tokens, mask=live, other=0).to(tl.int1)
    mask = live[:, None] & (experts[None, :] < num_experts)
    places = tokens.to(tl.int64)[:, None] * num_experts + experts[None, :]
    scores = tl.load(scores_ptr + places, mask=mask, other=-float("inf"))
    dual_E = load_dual(dual_ptr, tokens_ptr, num_experts, CENTRED and not FIRST, BLOCK_E)
    left = scores - dual_E[None, :]
    # From the largest value down, equal ones together, until K+1 have been seen.
    seen = tl.zeros([BLOCK_T], tl.int32)
    upper = tl.full([BLOCK_T], -float("inf"), tl.float32)
    lower = tl.full([BLOCK_T], -float("inf"), tl.float32)
    for _ in range(top_k + 1):
        largest = tl.max(left, axis=1)
        equal = left == largest[:, None]
        now = seen + tl.sum(equal.to(tl.int32), axis=1)
        upper = tl.where((seen < top_k) & (now >= top_k), largest, upper)
        lower = tl.where((seen <= top_k) & (now > top_k), largest, lower)
        seen = now
        left = tl.where(equal, -float("inf"), left)
    counted = live & (lower > -float("inf"))
    threshold = (upper + lower) * 0.5 if CENTRED else tl.maximum(lower, 0.0)
    threshold = tl.where(counted, threshold, float("inf"))
    tl.store(threshold_ptr + tokens, threshold, mask=tokens < num_tokens)
    if FIRST:
        tl.atomic_add(tokens_ptr, tl.sum(counted.to(tl.int32), axis=0).to(tl.int64), sem="relaxed")
    elif CENTRED:
        wanted_E = tl.sum((scores - threshold[:, None] > dual_E[None, :]).to(tl.int32), axis=0)
        tl.atomic_add(wanted_ptr + experts, wanted_E, mask=experts < num_experts, sem="relaxed")


@triton.jit
def overshoot(wanted_ptr, tokens_ptr, num_experts, top_k, FURTHER: tl.constexpr, BLOCK_E: tl.constexpr):
    """As in `moerouters.kernels.dual`. Every program finds it anew."""
    experts = tl.arange(0, BLOCK_E)
    mask = experts < num_experts
    wanted_E = tl.load(wanted_ptr + experts, mask=mask, other=0).to(tl.int64)
    whole = tl.maximum(tl.load(tokens_ptr) * top_k, 1)
    off = tl.max(tl.where(mask, tl.abs(num_experts * wanted_E - whole), 0), axis=0)
    return tl.maximum(FURTHER - off.to(tl.float64) / whole.to(tl.float64), 0.0).to(tl.float32)


@triton.jit
def expert_threshold_kernel(
    counts_ptr, tokens_ptr, dual_ptr, wanted_ptr, new_ptr, num_experts, top_k, factor, summand, divisor,
    FIRST: tl.constexpr, CENTRED: tl.constexpr, FURTHER: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The next q of one expert, its mean not yet taken off."""
    expert = tl.program_id(0)
    old_E = load_dual(dual_ptr, tokens_ptr, num_experts, CENTRED and not FIRST, BLOCK_E)
    old = tl.sum(tl.where(tl.arange(0, BLOCK_E) == expert, old_E, 0.0), axis=0)
    if CENTRED:
        key, places = descend(counts_ptr, tokens_ptr, expert, 0, num_experts, factor, summand, divisor, 4, 2)
        upper = unsortable(key)
        key, places = descend(counts_ptr, tokens_ptr, expert, 1, num_experts, factor, summand, divisor, 4, 2)
        rest = (tl.load(tokens_ptr) * factor + summand) % divisor
        fraction = tl.div_rn(rest.to(tl.float32), divisor.to(tl.float32))
        new = upper + (unsortable(key) - upper) * fraction
        if not FIRST:
            new += overshoot(wanted_ptr, tokens_ptr, num_experts, top_k, FURTHER, BLOCK_E) * (new - old)
    else:
        key, places = descend(counts_ptr, tokens_ptr, expert, 0, num_experts, factor, summand, divisor, 4, 1)
        new = tl.maximum(unsortable(key), 0.0)
    tl.store(new_ptr + expert, tl.where(places > 0, new, old))


@triton.jit
def centre_kernel(dual_ptr, tokens_ptr, found_ptr, num_experts, BLOCK_E: tl.constexpr):
    experts = tl.arange(0, BLOCK_E)
    dual_E = load_dual(dual_ptr, tokens_ptr, num_experts, True, BLOCK_E)
    tl.store(found_ptr + experts, dual_E, mask=experts < num_experts)


def dual_update(
    scores_TE: Tensor, dual_E: Tensor, valid_T: Tensor | None, top_k: int, iterations: int, centred: bool
) -> Tensor:
    """See the public function; float32, T > 0, K < E."""
    T, E = scores_TE.shape
    count = 2 if centred else 1
    # Place c + 1/2 for the middle of the gap, c = tokens K / E; place floor(c) + 1 for the value below it.
    rank = (2 * top_k, E, 2 * E) if centred else (top_k, E, E)
    block_e = triton.next_power_of_2(E)
    block_t = max(1, SCORES_AT_ONCE // block_e)
    with torch.cuda.device_of(scores_TE):
        scores_TE = scores_TE.contiguous()
        by_expert_TE = scores_TE.t().contiguous().t()  # neighbouring threads read neighbouring tokens of an expert
        counts = new_counts(E, count, scores_TE.device)
        tokens = torch.zeros((), dtype=torch.int64, device=scores_TE.device)
        wanted_NE = torch.zeros(iterations, E, dtype=torch.int32, device=scores_TE.device)
        p_T = scores_TE.new_empty(T)
        q_E, new_E = dual_E.contiguous(), torch.empty_like(dual_E)
        for n in range(iterations):
            counts.zero_()
            # Without fused multiply-add: a CPU's bits.
            token_threshold_kernel[(triton.cdiv(T, block_t),)](
                scores_TE, q_E, scores_TE if valid_T is None else valid_T, p_T, tokens, wanted_NE[n], T, E, top_k,
                FIRST=n == 0, MASKED=valid_T is not None, CENTRED=centred, BLOCK_T=block_t, BLOCK_E=block_e,
                enable_fp_fusion=False,
            )  # fmt: skip
            count_digits(by_expert_TE, p_T, tokens, counts, rank=rank, count=count)
            expert_threshold_kernel[(E,)](
                counts, tokens, q_E, wanted_NE[n], new_E, E, top_k, *rank, FIRST=n == 0, CENTRED=centred,
                FURTHER=FURTHER, BLOCK_E=block_e, enable_fp_fusion=False,
            )  # fmt: skip
            q_E, new_E = new_E, torch.empty_like(new_E) if n == 0 else q_E  # dual_E itself is the caller's
        if centred:
            centre_kernel[(1,)](q_E, tokens, new_E, E, BLOCK_E=block_e)
            return new_E
    return q_E
