"""Tiles of the rows that experts have, and which threads work on which.

A tile is some neighbouring rows, of one expert or several. Threads that share each product wait for each other after
every one of them. Where each has experts of its own, forward and backward of one layer take 0.72 to 0.95 of the time,
of four layers 0.95 (two cores of a Xeon, 16 experts of 6 MiB and 64 of 1.5 MiB; docs/benchmarks/log.md).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from moerouters.kernels.threads import alone_at_once, share_out

_ROWS, _BYTES = 1024, 20 * 2**20
"""Most of a tile that all threads work on; bytes are of all its buffers."""
_ROWS_ALONE, _BYTES_ALONE = 320, 64 * 2**20
"""Most of a tile that one thread works on; bytes are of the buffers of all threads."""
_LEAST_ROWS = 64
_LEAST_PRODUCT = 1 << 24
"""Multiplications of a tile's product, below which threads wait for the interpreter longer than for each other: with
two threads 2**24 took the same time either way, 2**25 less, and 2**22 1.03 to 1.07 times as much."""
_TOGETHER = 1.1
"""Time of a product by all threads, over that of as many products at once, each by one."""


class Piece(NamedTuple):
    """An expert's part of a tile."""

    expert: int
    rows: slice
    """Counted from the tile's begin."""
    first: bool
    """Of the expert's pieces."""
    last: bool


@dataclass
class Tile:
    """Neighbouring rows, of one expert or several: what is no matrix product is done for all of them at once."""

    begin: int
    end: int
    pieces: list[Piece]


Chain = list[Tile]
"""Tiles of one expert, or one tile of several: what one thread does, one after the other. No expert is in two."""


@dataclass(frozen=True)
class Plan:
    """All rows that experts have."""

    together: list[Tile]
    """All threads work in each product of these."""
    apart: list[Chain]
    """Each of these is for one thread."""
    threads: int
    """That work apart."""
    rows_alone: int
    """Most rows of a tile that a thread has for its own."""
    end: int
    """Rows of all experts."""

    @property
    def buffer_rows(self) -> int:
        """Rows of buffers. Of these the thread n has those from n * rows_alone on."""
        return max([self.threads * self.rows_alone, *(tile.end - tile.begin for tile in self.together)])

    def run(self, work: Callable[[Iterable[Tile], int], None]) -> None:
        """Call work(tiles, n), where n is the thread's number, until all tiles are done."""
        work(self.together, 0)
        free = list(range(self.threads))

        def run_chains(chains: Iterable[Chain]) -> None:
            thread = free.pop()
            for chain in chains:
                work(chain, thread)

        if self.apart:
            share_out(run_chains, self.apart)


def plan_tiles(
    load: Sequence[int], row_bytes: int, row_products: int, *, threads: int | None = None, thread_bytes: int = 0
) -> Plan:
    """Tiles for so many rows of each expert.

    row_bytes: what buffers hold for each row. row_products: multiplications for each row in a product. threads: that
    may work apart, None for as many as can. thread_bytes: what each of these needs besides.
    """
    starts = accumulate(load, initial=0)
    experts = [(expert, start, rows) for expert, (start, rows) in enumerate(zip(starts, load, strict=False)) if rows]
    threads, end = alone_at_once() if threads is None else threads, sum(load)
    most_alone = min(_ROWS_ALONE, (_BYTES_ALONE // threads - thread_bytes) // row_bytes)
    chains = _chains(experts, most_alone) if threads > 1 and most_alone >= _LEAST_ROWS else []
    if end * row_products < _LEAST_PRODUCT * sum(map(len, chains)):
        chains = []
    chains.sort(key=_rows, reverse=True)
    apart = chains[_shared_by_all([_rows(chain) for chain in chains], threads) :]
    elsewhere = {piece.expert for chain in apart for tile in chain for piece in tile.pieces}
    rest = [each for each in experts if each[0] not in elsewhere]
    most = max(_LEAST_ROWS, min(_ROWS, _BYTES // row_bytes))
    together = [tile for chain in _chains(rest, most) for tile in chain]
    rows_alone = max((tile.end - tile.begin for chain in apart for tile in chain), default=0)
    return Plan(together, apart, max(1, min(threads, len(apart))), rows_alone, end)


def _chains(experts: Iterable[tuple[int, int, int]], most: int) -> list[Chain]:
    """Tiles of at most so many rows: an expert of more has several to itself, neighbours of fewer share one."""
    chains: list[Chain] = []
    for expert, start, rows in experts:
        tile = chains[-1][-1] if chains and len(chains[-1]) == 1 else None
        if tile is not None and tile.end == start and start + rows - tile.begin <= most:
            tile.end += rows
            tile.pieces.append(Piece(expert, slice(start - tile.begin, tile.end - tile.begin), True, True))
            continue
        parts = -(-rows // most)
        bounds = pairwise(start + part * rows // parts for part in range(parts + 1))
        pieces = [(begin, end, begin == start, end == start + rows) for begin, end in bounds]
        chains.append([Tile(begin, end, [Piece(expert, slice(0, end - begin), *ends)]) for begin, end, *ends in pieces])
    return chains


def _rows(chain: Chain) -> int:
    return chain[-1].end - chain[0].begin


def _shared_by_all(rows: Sequence[int], threads: int) -> int:
    """How many of the largest chains all threads work on, so that no thread has to wait long in the end."""
    found, least = 0, float("inf")
    for count in range(len(rows) + 1):
        busy = [0] * threads
        for each in rows[count:]:  # the largest first, each by who is free
            heapq.heapreplace(busy, busy[0] + each)
        even, longest = sum(busy) / threads, max(busy)
        time = _TOGETHER * sum(rows[:count]) / threads + longest
        if time < least:
            found, least = count, time
        if longest <= 1.02 * even:
            break
    return found
