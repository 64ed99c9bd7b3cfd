"""The cost model of PPMoE (arXiv:2304.11414), to hold ours against. Known from notes on the paper, not its own text.

Its ring moves the whole message in each of 2 (T - 1) steps. A ring that cuts the message in T parts, as libraries do,
moves a T-th of that, so its ratio is T times smaller: `allreduce_over_compute` of one T-th.
"""

from __future__ import annotations


def all_to_all_over_ffn(num_experts: int) -> float:
    """What two all-to-alls of a DPMoE layer take at least, over what its experts take: (E - 1) E / 16."""
    return (num_experts - 1) * num_experts / 16


def allreduce_over_compute(*, ranks: int, flops_per_s: float, bytes_per_s: float, width: int) -> float:
    """Eq. 5: the all-reduce of a tensor-parallel FFN of width 4 h over its arithmetic, (T - 1) T F / (4 B h)."""
    return (ranks - 1) * ranks * flops_per_s / (4 * bytes_per_s * width)


def bubble(stages: int, micro_batches: int) -> float:
    """Part of a pipelined step in which a stage waits: (P - 1) / (M + P - 1)."""
    return (stages - 1) / (micro_batches + stages - 1)


def bubble_over_ideal(stages: int, micro_batches: int) -> float:
    """The same over the time without waiting: (P - 1) / M."""
    return (stages - 1) / micro_batches
