"""The well-known schedules by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moerouters.errors import ConfigError
from moerouters.pipeline.builders.dualpipev import dualpipev, dualpipev_filled
from moerouters.pipeline.builders.interleaved import interleaved_gpipe, interleaved_one_f_one_b, kimi_k2
from moerouters.pipeline.builders.plain import eager_one_f_one_b, gpipe, one_f_one_b, zero_bubble_h1
from moerouters.pipeline.schedule import Schedule


@dataclass(frozen=True, kw_only=True, slots=True)
class Builder:
    """One schedule: how it is made, and how many chunks a rank may have in it."""

    make: Callable[[int, int, int], Schedule]
    """(num_ranks, num_microbatches, num_chunks)."""
    chunks: int | None
    """Always so many; None: as many as are asked for, 2 by default."""
    splits_backward: bool = False


def _plain(function: Callable[[int, int], Schedule], *, chunks: int = 1, splits_backward: bool = False) -> Builder:
    return Builder(make=lambda P, M, v: function(P, M), chunks=chunks, splits_backward=splits_backward)


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "gpipe": _plain(gpipe),
        "1f1b": _plain(one_f_one_b),
        "eager-1f1b": _plain(eager_one_f_one_b),
        "zero-bubble-h1": _plain(zero_bubble_h1, splits_backward=True),
        "interleaved-gpipe": Builder(make=interleaved_gpipe, chunks=None),
        "interleaved-1f1b": Builder(make=interleaved_one_f_one_b, chunks=None),
        "kimi-k2": Builder(make=kimi_k2, chunks=None),
        "dualpipev": _plain(dualpipev, chunks=2, splits_backward=True),
        "dualpipev-filled": _plain(dualpipev_filled, chunks=2, splits_backward=True),
    }
)


def build(name: str, num_ranks: int, num_microbatches: int, num_chunks: int | None = None) -> Schedule:
    """The schedule `name` of P ranks and M microbatches.

    num_chunks: stages a rank; the model has num_ranks * num_chunks stages. Raises ConfigError for an unknown name and
    for sizes that the schedule is not made for.
    """
    builder = BUILDERS.get(name)
    if builder is None:
        raise ConfigError(f"there is no schedule '{name}'.", why=f"there is: {', '.join(BUILDERS)}", fix="pick one")
    chunks = (builder.chunks or 2) if num_chunks is None else num_chunks
    if builder.chunks not in (None, chunks):
        raise ConfigError(
            f"{name} cannot have {num_chunks} chunks a rank.",
            why=f"it always has {builder.chunks}",
            fix="leave the chunks out, or take an interleaved schedule",
        )
    if min(num_ranks, num_microbatches, chunks) < 1:
        raise ConfigError(
            f"{name} cannot be built for {num_ranks} ranks, {num_microbatches} microbatches and {chunks} chunks.",
            why="each is at least 1",
            fix="for instance 4 ranks and 8 microbatches",
        )
    return builder.make(num_ranks, num_microbatches, chunks)
