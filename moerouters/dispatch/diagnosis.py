"""Who failed where: ranks whose exchange failed leave their position in the group's store and read those of others.

Nothing of this runs before an exchange has failed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

LIMIT_S = 1.0
"""How long a rank that failed waits for word from others: they notice the same loss within milliseconds of each other,
or each when its own time-out ends."""
_POLL_S = 0.02


def whereabouts(group: dist.ProcessGroup, position: str, *, limit_s: float = LIMIT_S) -> str:
    """Where the other ranks of `group` failed and which say nothing, a line each; empty if that cannot be found out.

    position: where this rank failed, for the others to read. Returns after `limit_s` at the latest, also where the
    store hangs, and raises nothing: an error is being reported already.
    """
    found: list[str] = []

    def ask() -> None:
        try:
            found.append(_ask(group, position, limit_s))
        except Exception:
            # The rank that serves the store may be the one that died. The error that is reported stands without this.
            return

    # A store whose server hangs blocks for its own time-out, minutes; a thread can be left behind.
    asking = threading.Thread(target=ask, daemon=True, name="moerouters-whereabouts")
    asking.start()
    asking.join(2 * limit_s)
    return found[0] if found else ""


def _ask(group: dist.ProcessGroup, position: str, limit_s: float) -> str:
    store, here = _store_of(group), group.rank()
    store.set(_key(here), position)
    silent = [rank for rank in range(group.size()) if rank != here]
    places: dict[str, list[int]] = {}
    deadline = time.monotonic() + limit_s
    while silent:
        heard = [rank for rank in silent if store.check([_key(rank)])]
        for rank in heard:
            places.setdefault(store.get(_key(rank)).decode(), []).append(rank)
        silent = [rank for rank in silent if rank not in heard]
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    lines = [f"{ranks_text(ranks)} failed in {place}" for place, ranks in sorted(places.items())]
    if silent:
        lines.append(f"no word within {limit_s:g} s from {ranks_text(silent)}")
    return "\n".join(lines)


def ranks_text(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _key(rank: int) -> str:
    return f"moerouters/failed/{rank}"


def _store_of(group: dist.ProcessGroup) -> Any:
    """Private to torch, the same in 2.11 and 2.13; without it messages name one rank less."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_process_group_store(group)
