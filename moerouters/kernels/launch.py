"""Where Triton kernels run, and how big their blocks are. Imports no triton: the kernels in `gpu/` do."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

Arch = Literal["sm_80", "sm_90", "sm_100", "gfx942", "interpreter"]
"""The targets that kernels are compiled ahead of time for."""


def triton_serves(*tensors: Tensor, only: torch.dtype | None = None) -> bool:
    """Whether Triton kernels take these tensors: all on a GPU; of one dtype, or of any that its matrix units know."""
    if not TRITON_INSTALLED:
        return False
    fits = [tensor.dtype != torch.float64 if only is None else tensor.dtype == only for tensor in tensors]
    return all(fits) and all(tensor.is_cuda for tensor in tensors)


def arch_of(device: torch.device) -> Arch:
    """Whose blocks suit this device. CPU tensors reach a kernel only under Triton's interpreter.

    Blocks for sm_80 fit every NVIDIA GPU since: sm_86, sm_89 and sm_120 have 99 KB of shared memory for a program.
    """
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_100" if major == 10 else "sm_90" if major == 9 else "sm_80"


def launching_on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which is not always the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def persistent_programs(device: torch.device) -> int:
    """A program per multiprocessor, each taking every so-many-th tile. Interpreted two, so that tests loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def dot_precision(dtype: torch.dtype) -> str:
    """How a float32 product is taken: as torch.matmul would (float32 by default, not tf32)."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@dataclass(frozen=True)
class Blocks:
    """What one program of a grouped GEMM works on at a time."""

    rows: int
    columns: int
    """Of the result. The up-projection takes as many of the gate and as many of the up half."""
    depth: int
    """Of the sum, per step."""
    warps: int
    stages: int


Role = Literal["up", "rows", "hidden", "weight"]

# Reasoned from registers and shared memory, which are known ahead of time (docs/benchmarks/kernels.json); not measured.
# On Hopper and Blackwell two accumulators of 128 x 128 in eight warps take 128 registers a thread, and a stage of
# 128 x 64 values of rows and 256 x 64 of weights 48 KB of shared memory. `hidden` has an epilogue of six tiles: on
# Hopper it gets sixteen warps and shorter steps, on Ampere and on Blackwell (whose matrix unit takes no sixteen warps)
# half the columns. Sums over gathered rows load indices ahead of values, which takes half of the stages.
_SIXTEEN_BIT: dict[tuple[Arch, Role], Blocks] = {
    ("sm_80", "up"): Blocks(128, 64, 64, warps=8, stages=4),
    ("sm_80", "rows"): Blocks(128, 128, 64, warps=8, stages=4),
    ("sm_80", "hidden"): Blocks(128, 64, 64, warps=8, stages=4),
    ("sm_80", "weight"): Blocks(128, 128, 32, warps=8, stages=5),
    ("sm_90", "up"): Blocks(128, 128, 64, warps=8, stages=4),
    ("sm_90", "rows"): Blocks(128, 256, 64, warps=8, stages=4),
    ("sm_90", "hidden"): Blocks(128, 128, 32, warps=16, stages=4),
    ("sm_90", "weight"): Blocks(128, 256, 64, warps=8, stages=6),
    ("sm_100", "up"): Blocks(128, 128, 64, warps=8, stages=4),
    ("sm_100", "rows"): Blocks(128, 256, 64, warps=8, stages=4),
    ("sm_100", "hidden"): Blocks(128, 64, 64, warps=8, stages=4),
    ("sm_100", "weight"): Blocks(128, 256, 64, warps=8, stages=6),
    ("gfx942", "up"): Blocks(128, 64, 64, warps=8, stages=2),
    ("gfx942", "rows"): Blocks(128, 128, 64, warps=8, stages=2),
    ("gfx942", "hidden"): Blocks(128, 128, 64, warps=8, stages=2),
    ("gfx942", "weight"): Blocks(128, 128, 64, warps=8, stages=2),
}


def blocks_for(role: Role, arch: Arch, dtype: torch.dtype, mean_rows: int) -> Blocks:
    """Blocks of one GEMM for experts that get `mean_rows` rows on average (known on the host: rows / experts).

    `up`, `rows` and `hidden` have tiles of one height, as they share one map of tiles.
    """
    if arch == "interpreter":  # an operation costs 0.1 ms whatever its size: few programs, and still several a tensor
        return Blocks(16, 32 if role == "hidden" else 16, 16, warps=4, stages=1)
    height = 128 if mean_rows > 64 else 64 if mean_rows > 16 else 16
    if dtype == torch.float32:
        # Twice the bytes, and exact products run on the ordinary units: small tiles that keep registers free.
        return Blocks(min(height, 64), 64, 32, warps=4, stages=2)
    large = _SIXTEEN_BIT[arch, role]
    if height == 128 or role == "weight":
        return large
    # Few rows: reading weights is what takes the time, so their tile keeps its size and the rows get fewer warps.
    warps = 8 if role == "hidden" and height == 64 else 4
    return Blocks(height, min(large.columns, 128), large.depth, warps=warps, stages=large.stages)
