"""Schedules of v chunks a rank, stage s on rank s % P (Narayanan et al. 2021, with PyTorch's rounds of any size)."""

from __future__ import annotations

from moerouters.errors import ConfigError
from moerouters.pipeline.builders.row import BACKWARD, FORWARD, Row
from moerouters.pipeline.schedule import Schedule, interleaved_placement


def interleaved_one_f_one_b(num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """1F1B on chunks: 1/v of its bubble, for v times its transfers."""
    return _interleaved("interleaved-1f1b", num_ranks, num_microbatches, num_chunks, extra=0)


def kimi_k2(num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """Interleaved 1F1B with one more forward before the first backward, behind which transfers hide."""
    return _interleaved("kimi-k2", num_ranks, num_microbatches, num_chunks, extra=1)


def interleaved_gpipe(num_ranks: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """All forwards in the order of interleaved 1F1B, then all backwards."""
    every = num_microbatches * num_chunks
    return _interleaved("interleaved-gpipe", num_ranks, num_microbatches, num_chunks, extra=every)


def _interleaved(name: str, P: int, M: int, v: int, *, extra: int) -> Schedule:
    """Forwards go up through the chunks, backwards down, with one round of microbatches in each chunk.

    extra: forwards before the first backward beside those of interleaved 1F1B.
    """
    rounds = max(1, M // P)
    if M % rounds:
        raise ConfigError(
            f"{name} cannot run {M} microbatches on {P} ranks.",
            why=f"they are split in {rounds} rounds of one size",
            fix=f"take a multiple of {P}, for instance {M - M % P}",
        )
    per_round, total = M // rounds, M * v
    ranks = []
    for rank in range(P):
        row = Row(M)
        chunks = [step // per_round % v for step in range(total)]
        upwards = [chunk * P + rank for chunk in chunks]
        downwards = [(v - 1 - chunk) * P + rank for chunk in chunks]
        warmup = min(total, (v - 1) * per_round + 2 * (P - 1 - rank) + extra)
        for stage in upwards[:warmup]:
            row.run(stage, FORWARD)
        for up, down in zip(upwards[warmup:], downwards, strict=False):
            row.run(up, FORWARD)
            row.run(down, BACKWARD)
        for stage in downwards[total - warmup :]:
            row.run(stage, BACKWARD)
        ranks.append(tuple(row.items))
    return Schedule(name=name, num_microbatches=M, placement=interleaved_placement(P, v), ranks=tuple(ranks))
