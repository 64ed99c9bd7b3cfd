"""The balanced hash: frequent tokens are dealt out one by one, each to the experts that have the least so far.

A hash spreads vocabulary ids evenly, and text is not spread evenly over ids: by Zipf's law a few of them make up much
of it, and the expert that draws one of those is full (arXiv:2106.04426, balanced assignment).
"""

from __future__ import annotations

from functools import lru_cache
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

from moerouters_hash.mixing import GOLDEN, WORD, mix

UNSEEN = -1
"""In every place of an id that never occurs: dealt out as well, all such ids would go to one and the same expert."""


@lru_cache(maxsize=8)
def balanced_table(frequencies: tuple[int, ...], *, num_experts: int, top_k: int, seed: int) -> NDArray[np.int64]:
    """[V, K] experts of every vocabulary id, for read only: layers of one config share it.

    Ids come by falling frequency, equal ones in the order of their hash; the K experts of an id are those with the
    least frequency dealt so far, of equal ones that with the lower hash. Integers throughout, so the same everywhere.
    """
    key = mix(seed ^ GOLDEN)
    least = [(0, mix((expert * GOLDEN & WORD) ^ key), expert) for expert in range(num_experts)]
    heapify(least)
    table_VK = np.full((len(frequencies), top_k), UNSEEN, dtype=np.int64)
    seen = [token for token, frequency in enumerate(frequencies) if frequency]
    for token in sorted(seen, key=lambda token: (-frequencies[token], mix(token ^ key))):
        taken = [heappop(least) for _ in range(top_k)]
        table_VK[token] = [expert for _, _, expert in taken]
        for load, order, expert in taken:
            heappush(least, (load + frequencies[token], order, expert))
    table_VK.flags.writeable = False
    return table_VK
