"""The Triton kernels of gating: their numbers (in the interpreter, where there is no GPU), and that they compile."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moerouters.kernels.gating import fused_gating_backward_torch, fused_gating_torch
from moerouters.kernels.gating_rule import Rule

pytest.importorskip("triton")
from moerouters.kernels.gpu import gating as gpu

from .compiled import Case
from .test_gating import RULES as COMMON_RULES

pytestmark = [
    # numpy's word for what a GPU does in silence: infinity minus infinity, exp of something large.
    pytest.mark.filterwarnings("ignore::RuntimeWarning")
]

SIGNATURE_FORWARD = {
    "logits_ptr": "*fp32", "correction_ptr": "*fp32", "bias_ptr": "*fp32", "valid_ptr": "*i8", "weights_ptr": "*fp32",
    "ids_ptr": "*i64", "cutoff_ptr": "*fp32", "load_ptr": "*i64", "finite_ptr": "*i8", "T": "i32", "eps": "fp32",
    "scale": "fp32",
}  # fmt: skip
SIGNATURE_BACKWARD = {
    "grad_weights_ptr": "*fp32", "logits_ptr": "*fp32", "ids_ptr": "*i64", "finite_ptr": "*i8", "valid_ptr": "*i8",
    "grad_logits_ptr": "*fp32", "T": "i32", "eps": "fp32", "scale": "fp32",
}  # fmt: skip


def forward_constants(E: int, K: int, rule: Rule, *, everything: bool) -> dict[str, Any]:
    return {
        "E": E, "K": K, "G": rule.num_groups, "KEPT": rule.kept_groups, "SCORE": rule.score,
        "TOP2": rule.group_score == "top2_sum", "AFTER": rule.softmax_after_topk, "RENORMALIZE": rule.renormalize,
        "CUTOFF": everything, "CORRECTED": everything, "BIASED": everything, "PADDED": everything,
        "GP": gpu.triton.next_power_of_2(rule.num_groups), "TILES": gpu.TILES,
    } | gpu._sizes(E, K, None, grouped=rule.kept_groups < rule.num_groups)  # fmt: skip


def backward_constants(E: int, K: int, rule: Rule, *, everything: bool) -> dict[str, Any]:
    return {
        "E": E, "K": K, "SCORE": rule.score, "AFTER": rule.softmax_after_topk, "RENORMALIZE": rule.renormalize,
        "PADDED": everything,
    } | gpu._sizes(E, K, None)  # fmt: skip


OLMOE, DEEPSEEK, GPT_OSS = (
    Rule("softmax", 8),
    Rule("sigmoid", 8, 8, 4, "top2_sum"),
    Rule("identity", 4, 1, 1, "max", True),
)
SQRTSOFTPLUS = Rule("sqrtsoftplus", 6)
BFLOAT16 = {"logits_ptr": "*bf16", "grad_logits_ptr": "*bf16"}


def narrow(signature: dict[str, str], types: dict[str, str]) -> dict[str, str]:
    return {name: types.get(name, kind) for name, kind in signature.items()}


COMPILED = [
    case
    for note, E, K, rule, everything, types in (
        ("OLMoE", 64, 8, OLMOE, False, {}),
        ("DeepSeek-V3", 256, 8, DEEPSEEK, True, {}),
        ("GPT-OSS, bf16", 32, 4, GPT_OSS, False, BFLOAT16),
        ("sqrtsoftplus, 60 experts", 60, 6, SQRTSOFTPLUS, True, {}),
    )
    for case in (
        Case(
            gpu.gating_forward_kernel,
            narrow(SIGNATURE_FORWARD, types),
            forward_constants(E, K, rule, everything=everything),
            note=note,
            slow=rule is not OLMOE,
        ),
        Case(
            gpu.gating_backward_kernel,
            narrow(SIGNATURE_BACKWARD, types),
            backward_constants(E, K, rule, everything=everything),
            note=note,
            slow=rule is not OLMOE,
        ),
    )
]

RULES = COMMON_RULES | {"everybody": Rule("softmax", 12), "one": Rule("sigmoid", 1)}
"""For 12 experts, which are no power of two."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(tokens: int, *, seed: int, experts: int = 12, levels: int = 4, odd: float = 0.0) -> dict[str, Tensor]:
    """Logits that are whole numbers over `levels` and biases that are not: adjusted scores are the same, or differ by
    more than the kernel and torch do in rounding."""
    random = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, generator=random).mul(levels).round().div(levels)
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 20.0, 21.0, -120.0])
    edges = edges[torch.randint(len(edges), logits_TE.shape, generator=random)]
    rows_T1 = torch.rand(tokens, 1, generator=random) < odd
    bias_E = torch.randn(experts, generator=random).mul(0.1)
    bias_E[torch.rand(experts, generator=random) < 0.2] = -torch.inf
    return {
        "logits_TE": torch.where(rows_T1 & (torch.rand(logits_TE.shape, generator=random) < 0.3), edges, logits_TE),
        "bias_E": bias_E,
        "correction_E": torch.randn(experts, generator=random).mul(0.1),
        "valid_T": torch.rand(tokens, generator=random) < 0.8,
        "slopes_TE": torch.randn(tokens, experts, generator=random),
    }


def check(logits_TE: Tensor, rule: Rule, slopes_TK: Tensor, *, cutoff: bool, **chosen: Tensor) -> None:
    """Same ids, counts and flags; weights and gradients to float32's last bits."""
    chosen = {name: value.to(DEVICE) for name, value in chosen.items()}
    logits_TE, slopes_TK = logits_TE.to(DEVICE), slopes_TK.to(DEVICE)
    everything = {"correction_E": None, "bias_E": None, "valid_T": None} | chosen
    expected = fused_gating_torch(logits_TE, rule, cutoff=cutoff, **chosen)
    found = gpu.gating_forward(logits_TE, rule, cutoff=cutoff, rows=32, tiles=2, **everything)
    for name in ("expert_ids_TK", "load_E", "finite_T"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.weights_TK, expected.weights_TK, rtol=2e-6, atol=1e-7, equal_nan=True)
    cutoff_T = expected.cutoff_T.nan_to_num(torch.finfo(torch.float32).min, torch.inf, -torch.inf)
    torch.testing.assert_close(found.cutoff_T, cutoff_T, rtol=2e-6, atol=1e-7)
    places = {"expert_ids_TK": expected.expert_ids_TK, "finite_T": expected.finite_T, "valid_T": everything["valid_T"]}
    right_TE = fused_gating_backward_torch(slopes_TK, logits_TE, rule, **places)
    mine_TE = gpu.gating_backward(slopes_TK, logits_TE, rule, rows=32, **places)
    assert mine_TE.dtype == logits_TE.dtype
    whole_T = expected.finite_T
    rounding = {} if logits_TE.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(mine_TE[whole_T], right_TE[whole_T], **rounding or {"rtol": 2e-5, "atol": 2e-6})


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    tokens=st.integers(0, 70),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([1, 4, 64]),
    odd=st.sampled_from([0.0, 0.3, 1.0]),
    given_=st.sets(st.sampled_from(["bias_E", "correction_E", "valid_T"])),
    cutoff=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    name=st.sampled_from(sorted(RULES)),
)
def test_equals_the_reference(
    tokens: int, seed: int, levels: int, odd: float, given_: set[str], cutoff: bool, dtype: torch.dtype, name: str
) -> None:
    values, rule = inputs(tokens, seed=seed, levels=levels, odd=odd), RULES[name]
    logits_TE = values["logits_TE"].to(dtype)
    if rule.group_score == "top2_sum":
        logits_TE = logits_TE.abs()  # sigmoid(1) + sigmoid(-1) and sigmoid(2) + sigmoid(-2) are 1, but for rounding
    slopes_TK = values["slopes_TE"][:, : rule.top_k].contiguous()
    check(logits_TE, rule, slopes_TK, cutoff=cutoff, **{name: values[name] for name in given_})


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 1), (5, 3), (64, 8), (60, 4), (128, 8), (300, 6)])
def test_numbers_of_experts(experts: int, top_k: int) -> None:
    values = inputs(40, seed=1, experts=experts, levels=1000)
    slopes_TK = values["slopes_TE"][:, :top_k].contiguous()
    check(values["logits_TE"], Rule("softmax", top_k), slopes_TK, cutoff=True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "relu", "identity"])
def test_far_from_zero(score: str) -> None:
    """Where scores underflow or saturate: small softplus must not be lost in log(1 + small)."""
    rule = Rule(score, 3, softmax_after_topk=score == "identity", renormalize=score != "relu")
    levels_T1 = torch.tensor([-1e4, -200, -104, -90, -30, 0, 19.9, 90, 1e4]).repeat_interleave(4).unsqueeze(1)
    values = inputs(len(levels_T1), seed=2, levels=8)
    logits_TE = values["logits_TE"] + levels_T1
    found = gpu.gating_forward(
        logits_TE.to(DEVICE), rule, correction_E=None, bias_E=None, valid_T=None, cutoff=False, rows=64, tiles=1
    )
    torch.testing.assert_close(
        found.weights_TK.cpu(), fused_gating_torch(logits_TE, rule).weights_TK, rtol=2e-5, atol=0
    )
    check(logits_TE, rule, values["slopes_TE"][:, :3].contiguous() / 64, cutoff=False)


def test_all_tied_takes_the_lowest_ids() -> None:
    logits_TE = torch.tensor([0.0, 3.0], device=DEVICE).repeat(9).unsqueeze(1).expand(18, 12).contiguous()
    gated = gpu.gating_forward(
        logits_TE, Rule("sigmoid", 4), correction_E=None, bias_E=None, valid_T=None, cutoff=False, rows=4
    )
    assert gated.expert_ids_TK.tolist() == [[0, 1, 2, 3]] * 18
    assert gated.load_E.tolist() == [18] * 4 + [0] * 8
