"""The Triton kernels of order statistics and dual steps against the torch references, interpreted where no GPU is."""

from __future__ import annotations

import math

import pytest
import torch

triton = pytest.importorskip("triton")
from moerouters.kernels.dual import dual_update_torch  # noqa: E402
from moerouters.kernels.gpu import dual, order_statistic  # noqa: E402
from moerouters.kernels.order_statistic import kth_largest_per_expert, kth_largest_per_expert_torch  # noqa: E402
from moerouters.kernels.overshoot import FURTHER  # noqa: E402

from .compiled import Case  # noqa: E402
from .test_dual import scores  # noqa: E402
from .test_order_statistic import KINDS, values  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

RANK = dict.fromkeys(("num_experts", "factor", "summand", "divisor"), "i32")
COUNT = dict.fromkeys(("num_tokens", "stride_t", "stride_e"), "i32") | RANK
TOKEN = {
    "scores_ptr": "*fp32", "dual_ptr": "*fp32", "valid_ptr": "*i1", "threshold_ptr": "*fp32", "tokens_ptr": "*i64",
    "wanted_ptr": "*i32", "num_tokens": "i32", "num_experts": "i32", "top_k": "i32",
}  # fmt: skip
COMPILED = [
    *(
        Case(
            order_statistic.count_digits_kernel,
            {"values_ptr": "*fp32", "offset_ptr": "*fp32", "number_ptr": "*i64", "counts_ptr": "*i32", **COUNT},
            {"DEPTH": depth, "COUNT": 2, "TILE": order_statistic.TILE},
            note=f"digit {depth}",
            slow=depth == 0,
        )
        for depth in (0, 3)
    ),
    Case(
        order_statistic.read_off_kernel,
        {"counts_ptr": "*i32", "number_ptr": "*i64", "found_ptr": "*fp32", "num_experts": "i32"},
        {"COUNT": 2},
    ),
    *(
        Case(
            dual.token_threshold_kernel,
            TOKEN,
            {
                "FIRST": first,
                "MASKED": True,
                "CENTRED": True,
                "BLOCK_T": dual.SCORES_AT_ONCE // block_e,
                "BLOCK_E": block_e,
            },
            note=f"{block_e} experts",
            slow=block_e == 512,
        )
        for first, block_e in ((True, 64), (False, 512))
    ),
    *(
        Case(
            dual.expert_threshold_kernel,
            {
                "counts_ptr": "*i32",
                "tokens_ptr": "*i64",
                "dual_ptr": "*fp32",
                "wanted_ptr": "*i32",
                "new_ptr": "*fp32",
                "top_k": "i32",
                **RANK,
            },
            {"FIRST": False, "CENTRED": centred, "FURTHER": FURTHER, "BLOCK_E": 64},
            note="centred" if centred else "published",
            slow=not centred,
        )
        for centred in (True, False)
    ),
    Case(
        dual.centre_kernel,
        {"dual_ptr": "*fp32", "tokens_ptr": "*i64", "found_ptr": "*fp32", "num_experts": "i32"},
        {"BLOCK_E": 64},
    ),
]


@pytest.mark.parametrize("kind", KINDS)
def test_radix_selection_finds_what_sorting_finds(kind: str) -> None:
    values_TE = values(kind, (40, 3)).to(DEVICE)
    valid_T = torch.arange(40, device=DEVICE) % 3 != 1
    hidden_TE = torch.where(valid_T.unsqueeze(1), values_TE, math.nan)
    for rank in (13, 40):
        at = torch.tensor(rank, device=DEVICE)
        found = order_statistic.kth_largest_per_expert(hidden_TE, at, valid_T, 2)
        assert torch.equal(found, kth_largest_per_expert_torch(values_TE, at, valid_T=valid_T, count=2)), rank


def test_radix_selection_over_several_tiles_in_any_layout() -> None:
    values_ET = values("normal", (2 * order_statistic.TILE + 5, 2)).t().contiguous().to(DEVICE)
    at = torch.tensor(700, device=DEVICE)
    found = order_statistic.kth_largest_per_expert(values_ET.t(), at, None, 1)
    assert torch.equal(found, kth_largest_per_expert_torch(values_ET.t(), at))


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "published"])
@pytest.mark.parametrize("kind", ["softmax", "ties", "holes"])
def test_dual_steps_equal_the_reference(kind: str, centred: bool) -> None:
    """To the bit as published; centred up to the order in which the mean of q is summed."""
    scores_TE, q_E = (t.to(DEVICE) for t in scores(kind, 21, 5))
    valid_T = torch.arange(21, device=DEVICE) % 4 != 1
    hidden_TE = torch.where(valid_T.unsqueeze(1), scores_TE, math.nan)
    before_E = q_E.clone()
    found_E = dual.dual_update(hidden_TE, q_E, valid_T, 2, 3, centred)
    expected_E = dual_update_torch(scores_TE, q_E, top_k=2, iterations=3, centred=centred, valid_T=valid_T)
    torch.testing.assert_close(found_E, expected_E, rtol=0, atol=2e-7 if centred else 0)
    assert torch.equal(q_E, before_E)


def test_no_token_that_counts() -> None:
    scores_TE, q_E = (t.to(DEVICE) for t in scores("normal", 9, 5))
    nobody_T = torch.zeros(9, dtype=torch.bool, device=DEVICE)
    assert torch.equal(dual.dual_update(scores_TE, q_E, nobody_T, 2, 2, True), q_E)


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "E", "K"), [(65536, 64, 8), (4096, 16, 2), (16384, 384, 6), (1000, 60, 4)])
def test_large_shapes_without_a_host_synchronisation(T: int, E: int, K: int) -> None:
    scores_TE, q_E = (t.cuda() for t in scores("softmax", T, E))
    wanted = torch.tensor(T // 7, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistic = kth_largest_per_expert(scores_TE, wanted, count=2)
        published_E = torch.ops.moerouters.dual_update(scores_TE, q_E, None, K, 4, False)
        centred_E = torch.ops.moerouters.dual_update(scores_TE, q_E, None, K, 4, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(statistic, kth_largest_per_expert_torch(scores_TE, wanted, count=2))
    assert torch.equal(published_E, dual_update_torch(scores_TE, q_E, top_k=K, iterations=4, centred=False))
    expected_E = dual_update_torch(scores_TE, q_E, top_k=K, iterations=4, centred=True)
    torch.testing.assert_close(centred_E, expected_E, rtol=0, atol=1e-6)
