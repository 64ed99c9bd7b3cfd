"""Where kernels run and with which blocks."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from moerouters.kernels.launch import Arch, Role, arch_of, blocks_for, dot_precision, triton_serves

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 0), "sm_80")],
)
def test_a_gpu_gets_blocks_that_fit_it(
    capability: tuple[int, int], arch: Arch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert arch_of(torch.device("cuda")) == arch
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert arch_of(torch.device("cuda")) == "gfx942"
    assert arch_of(torch.device("cpu")) == "interpreter"


def test_tensors_on_a_cpu_are_not_served() -> None:
    assert not triton_serves(torch.zeros(2))


def test_float32_products_are_exact_unless_torch_is_told_otherwise() -> None:
    assert dot_precision(torch.float32) == "ieee"
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert dot_precision(torch.float32) == "tf32"
        assert dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("mean_rows", [0, 16, 17, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", get_args(Arch))
def test_blocks(arch: Arch, dtype: torch.dtype, mean_rows: int) -> None:
    """Powers of two that a matrix product takes; kernels that share a map of tiles have tiles of one height."""
    blocks = {role: blocks_for(role, arch, dtype, mean_rows) for role in get_args(Role)}
    assert len({blocks[role].rows for role in ("up", "rows", "hidden")}) == 1
    for block in blocks.values():
        for size in (block.rows, block.columns, block.depth):
            assert size >= 16
            assert size & (size - 1) == 0
