"""The K-th and the (K+1)-th largest of each token on a CPU, by a network of elementwise minima and maxima.

A comparator puts the larger of two values first. Which comparators run does not depend on the values, so each is one
numpy call over thousands of tokens instead of a loop per token. Lists of experts are merged pairwise (Batcher's
odd-even merge; Knuth, vol. 3, 5.3.4), only the first K+1 of a list are kept, and what no answer needs is left out.
One CPU core, T = 65536, E = 64, K = 8: 10 ms; numpy's partition of every row takes 13, torch.topk 66.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moerouters.kernels.threads import share_out

Array = npt.NDArray[Any]

CHUNK = 8
"""Lists start with 8 to 15 experts each: the shortest that still leave long numpy calls later on."""
BLOCK = 1 << 18
"""Values in work at a time: 1 MiB of float32, what a core's second-level cache holds."""
SHARED_BLOCK = BLOCK << 2
"""The same of each of several threads: they take turns in the interpreter, and with shorter calls wait for each other.
Two take 8 to 10 ms where one takes 9 to 12, and with BLOCK 14 to 16."""


class Comparator(NamedTuple):
    high: int
    """The wire that gets the larger value,"""
    low: int
    """and the one that gets the smaller."""
    needs_high: bool
    needs_low: bool


class Level(NamedTuple):
    comparators: tuple[Comparator, ...]
    falling: tuple[int, ...]
    """The wires of the list that comes out, largest first."""


def work_size(num_experts: int, num_tokens: int, top_k: int, threads: int) -> int:
    """How many values `token_cutoffs` works on at a time in each of so many threads."""
    lists, _ = _plan(num_experts, top_k)
    return (-(-num_experts // lists) + 1) * lists * _width(num_experts, num_tokens, threads)


def token_cutoffs(scores_ET: Array, dual_E: Array, top_k: int, work: Sequence[Array]) -> tuple[Array, Array]:
    """The K-th and the (K+1)-th largest of s - q for every column; [T] each, K < E. NaN in a column stays there.

    work: [work_size] for each thread, in the dtype of the scores, overwritten.
    """
    E, T = scores_ET.shape
    lists, levels = _plan(E, top_k)
    length = -(-E // lists)
    upper_T, lower_T = np.empty(T, scores_ET.dtype), np.empty(T, scores_ET.dtype)
    width, free = _width(E, T, len(work)), list(work)

    @np.errstate(all="ignore")  # holds for one thread
    def run(starts: Iterable[int]) -> None:
        mine = free.pop()
        block, spare = mine[: length * lists * width], mine[length * lists * width :]
        for start in starts:
            now = slice(start, min(start + width, T))
            wide = now.stop - start
            values = block[: length * lists * wide].reshape(-1, wide)
            np.subtract(scores_ET[:, now], dual_E[:, None], out=values[:E])
            values[E:] = -np.inf
            wires = list(values.reshape(length, lists * wide))
            unused = spare[: lists * wide]
            for n, level in enumerate(levels):
                if n:  # the first half of all lists meets the second
                    half = unused.size // 2
                    wires = [wire[:half] for wire in wires] + [wire[half:] for wire in wires]
                    unused = unused[:half]
                unused = _run(level.comparators, wires, unused)
                wires = [wires[wire] for wire in level.falling]
            upper_T[now], lower_T[now] = wires[top_k - 1], wires[top_k]

    starts = range(0, T, width)
    if _worth_sharing(E, T, len(work)):
        share_out(run, starts)
    else:
        run(starts)
    return upper_T, lower_T


def _width(num_experts: int, num_tokens: int, threads: int) -> int:
    block = SHARED_BLOCK if _worth_sharing(num_experts, num_tokens, threads) else BLOCK
    return max(1, min(num_tokens, block // num_experts))


def _worth_sharing(num_experts: int, num_tokens: int, threads: int) -> bool:
    return threads > 1 and num_experts * num_tokens >= 2 * SHARED_BLOCK


def _run(comparators: tuple[Comparator, ...], wires: list[Array], unused: Array) -> Array:
    """Put larger values on the high wires, in place; the array that is unused afterwards."""
    for high, low, needs_high, needs_low in comparators:
        if not needs_low:
            np.maximum(wires[high], wires[low], out=wires[high])
        elif not needs_high:
            np.minimum(wires[high], wires[low], out=wires[low])
        else:
            np.minimum(wires[high], wires[low], out=unused)
            np.maximum(wires[high], wires[low], out=wires[high])
            wires[low], unused = unused, wires[low]
    return unused


@cache
def _plan(num_experts: int, top_k: int) -> tuple[int, tuple[Level, ...]]:
    """Into how many lists the experts are dealt, a power of two, and the levels: sort the lists, then merge pairs."""
    keep, lists = top_k + 1, 1
    while num_experts >= 2 * lists * CHUNK:
        lists *= 2
    nets: list[tuple[list[tuple[int, int]], list[int]]] = []
    net: list[tuple[int, int]] = []
    falling = _sort(list(range(-(-num_experts // lists))), keep, net)
    nets.append((net, falling))
    while lists >> len(nets) - 1 > 1:
        net, length = [], len(falling)
        falling = _merge(list(range(length)), list(range(length, 2 * length)), net)[:keep]
        nets.append((net, falling))
    needed = {top_k - 1, top_k}
    levels: list[Level] = []
    for net, falling in reversed(nets):
        wanted = {falling[place] for place in needed}
        comparators = []
        for high, low in reversed(net):
            if high in wanted or low in wanted:
                comparators.append(Comparator(high, low, high in wanted, low in wanted))
                wanted |= {high, low}
        levels.append(Level(tuple(reversed(comparators)), tuple(falling)))
        # A wire of this level is a place in a list of the level before: of its first half, or of its second.
        length = (max(max(pair) for pair in net) + 1) // 2 if net else 1
        needed = {wire % length for wire in wanted}
    return lists, tuple(reversed(levels))


def _sort(wires: list[int], keep: int, net: list[tuple[int, int]]) -> list[int]:
    """Append the comparators that sort `wires`; its first `keep` wires, largest first."""
    if len(wires) == 1:
        return wires
    half = len(wires) // 2
    return _merge(_sort(wires[:half], keep, net), _sort(wires[half:], keep, net), net)[:keep]


def _merge(left: list[int], right: list[int], net: list[tuple[int, int]]) -> list[int]:
    """Append the comparators that merge two falling lists; the wires of the merged one."""
    if not left or not right:
        return left + right
    if len(left) == len(right) == 1:
        net.append((left[0], right[0]))
        return left + right
    # The places 0, 2, 4, ... of both lists, and the places 1, 3, ...: each merged, they are neighbours from place 1 on.
    even, odd = _merge(left[::2], right[::2], net), _merge(left[1::2], right[1::2], net)
    merged = even[:1]
    for high, low in zip(odd, even[1:], strict=False):
        net.append((high, low))
        merged += [high, low]
    pairs = min(len(odd), len(even) - 1)
    return merged + odd[pairs:] + even[1 + pairs :]
