"""Gating in one operator, against its steps one after the other."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moerouters.kernels import gating
from moerouters.kernels.gating import fused_gating, fused_gating_torch
from moerouters.kernels.gating_rule import Gated, Rule

RULES = {
    "softmax": Rule("softmax", 3),
    "softmax as is": Rule("softmax", 2, renormalize=False, scale=2.5),
    "sigmoid in groups": Rule("sigmoid", 3, 4, 2, "top2_sum", eps=1e-2),
    "sigmoid, best of groups": Rule("sigmoid", 3, 2, 1, scale=1.5),
    "sqrtsoftplus": Rule("sqrtsoftplus", 4),
    "relu": Rule("relu", 2, renormalize=False),
    "relu over its sum": Rule("relu", 2, eps=0.0),
    "on logits": Rule("identity", 3, softmax_after_topk=True, scale=0.5),
}
E = 12


def inputs(tokens: int, *, seed: int = 0, levels: float = 1000, odd: float = 0.0, experts: int = E) -> dict[str, Any]:
    """Logits on a grid of 1 / levels, which ties them; `odd` of the rows hold infinities or NaN."""
    random = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, experts, generator=random).mul(levels).round().div(levels)
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 60.0, -120.0])
    edges = edges[torch.randint(len(edges), logits_TE.shape, generator=random)]
    rows_T1 = torch.rand(tokens, 1, generator=random) < odd
    logits_TE = torch.where(rows_T1 & (torch.rand(logits_TE.shape, generator=random) < 0.3), edges, logits_TE)
    bias_E = torch.randn(experts, generator=random).mul(0.1)
    bias_E[torch.rand(experts, generator=random) < 0.2] = -torch.inf
    return {
        "logits_TE": logits_TE,
        "bias_E": bias_E,
        "correction_E": torch.randn(experts, generator=random).mul(0.1),
        "valid_T": torch.rand(tokens, generator=random) < 0.8,
        "slopes": torch.randn(tokens, 64, generator=random),
    }


def gradient(gated: Gated, logits_TE: Tensor, slopes: Tensor) -> Tensor:
    grad_weights_TK = slopes[:, : gated.weights_TK.shape[1]].to(gated.weights_TK.dtype)
    return torch.autograd.grad(gated.weights_TK, logits_TE, grad_weights_TK)[0]


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit, but for the payload of NaN and the sign of zero."""
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    tokens=st.integers(0, 40),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([1, 4, 1000]),
    odd=st.sampled_from([0.0, 0.3, 1.0]),
    given_=st.sets(st.sampled_from(["bias_E", "correction_E", "valid_T"])),
    cutoff=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    name=st.sampled_from(sorted(RULES)),
)
def test_in_chunks_as_at_once(
    tokens: int, seed: int, levels: float, odd: float, given_: set[str], cutoff: bool, dtype: torch.dtype, name: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gating, "CHUNK", 7 * E)
        values = inputs(tokens, seed=seed, levels=levels, odd=odd)
        logits_TE = values["logits_TE"].to(dtype).requires_grad_()
        chosen = {name: values[name] for name in given_}
        found = fused_gating(logits_TE, RULES[name], cutoff=cutoff, **chosen)
        expected = fused_gating_torch(logits_TE, RULES[name], cutoff=cutoff, **chosen)
        for mine, right in zip(found, expected, strict=True):
            assert_same(mine, right)
        assert_same(*(gradient(gated, logits_TE, values["slopes"]) for gated in (found, expected)))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_gradients_of_first_and_second_order(rule: Rule) -> None:
    values = inputs(4)
    logits_TE = values["logits_TE"].double().add(0.05).requires_grad_()

    def weights_of(logits_TE: Tensor) -> Tensor:
        return fused_gating(logits_TE, rule, valid_T=values["valid_T"]).weights_TK

    assert torch.autograd.gradcheck(weights_of, logits_TE)
    assert torch.autograd.gradgradcheck(weights_of, logits_TE)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens(rule: Rule, dtype: torch.dtype) -> None:
    logits_TE = torch.zeros(0, E, dtype=dtype, requires_grad=True)
    for gate in (fused_gating, fused_gating_torch):
        gated = gate(logits_TE, rule, cutoff=True)
        assert gated.weights_TK.shape == gated.expert_ids_TK.shape == (0, rule.top_k)
        assert gated.load_E.tolist() == [0] * E
        assert torch.autograd.grad(gated.weights_TK.sum(), logits_TE)[0].shape == (0, E)


def test_is_a_well_formed_operator() -> None:
    values = inputs(9)
    rule = RULES["sigmoid in groups"]
    arguments = (values["logits_TE"].requires_grad_(), values["correction_E"], None, values["valid_T"], True, *rule)
    torch.library.opcheck(torch.ops.moerouters.fused_gating.default, arguments)
