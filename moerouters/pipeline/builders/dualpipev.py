"""DualPipeV: two chunks a rank in V shape, forwards fused with backwards (DeepSeek's DualPipe, one direction of it).

Backwards are split everywhere, also where both halves run together: a gradient leaves before the weight half.
`dualpipev` is the table of JaxPP, which runs the weight halves that were put off last; `dualpipev-filled` is the order
of DeepSeek and PyTorch, which fills the gaps of the tail with them and ends earlier.
"""

from __future__ import annotations

from moerouters.errors import ConfigError
from moerouters.pipeline.builders.row import FORWARD, INPUT, WEIGHT, Row
from moerouters.pipeline.schedule import Item, Schedule, v_placement


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """Weight halves that are put off run last (JaxPP)."""
    return _dualpipev("dualpipev", num_ranks, num_microbatches, filled=False)


def dualpipev_filled(num_ranks: int, num_microbatches: int) -> Schedule:
    """Weight halves that are put off fill the gaps of the tail (DeepSeek)."""
    return _dualpipev("dualpipev-filled", num_ranks, num_microbatches, filled=True)


def _dualpipev(name: str, P: int, M: int, *, filled: bool) -> Schedule:
    if M < 2 * P:
        raise ConfigError(
            f"{name} cannot run {M} microbatches on {P} ranks.",
            why="its main phase begins when each of the 2 * ranks stages has a microbatch",
            fix=f"take at least {2 * P} microbatches",
        )
    ranks = tuple(_row(P, M, rank, filled=filled) for rank in range(P))
    return Schedule(name=name, num_microbatches=M, placement=v_placement(P), ranks=ranks)


def _row(P: int, M: int, rank: int, *, filled: bool) -> tuple[Item, ...]:
    row = Row(M)
    down, up = rank, 2 * P - 1 - rank  # the chunk on the way down the ranks, and that on the way back
    put_off: list[int] = []

    def split(stage: int) -> None:
        row.run(stage, INPUT)
        put_off.append(stage)

    for _ in range(2 * (P - 1 - rank)):
        row.run(down, FORWARD)
    for _ in range(rank + 1):
        row.run(down, FORWARD)
        row.run(up, FORWARD)
    for _ in range(P - 1 - rank):
        row.run(up, INPUT, WEIGHT, FORWARD)
    for step in range(M - 2 * P + rank + 1):
        if step == 0 and rank == P - 1:  # both stages are of one microbatch here: nothing could overlap
            row.run(down, FORWARD)
            row.run(up, INPUT, WEIGHT)
        else:
            row.fuse((down, (FORWARD,)), (up, (INPUT, WEIGHT)))
        row.fuse((up, (FORWARD,)), (down, (INPUT, WEIGHT)))
    for _ in range(P - 1 - rank):
        row.run(up, INPUT, WEIGHT)
        row.fuse((up, (FORWARD,)), (down, (INPUT, WEIGHT)))
    half, odd = (rank + 1) // 2, rank % 2 == 1
    for step in range(rank + 1):
        splits_up = step >= half and (odd or (filled and step > half))
        splits_down = step >= half and (filled or not (odd or rank == 0))
        split(up) if splits_up else row.run(up, INPUT, WEIGHT)
        split(down) if splits_down else row.run(down, INPUT, WEIGHT)
    for _ in range(P - 1 - rank):
        if filled:
            row.run(put_off.pop(0), WEIGHT)
        # JaxPP cannot split the backward of the model's first stage: nobody waits for its input half.
        split(down) if filled or rank > 0 else row.run(down, INPUT, WEIGHT)
    for stage in put_off:
        row.run(stage, WEIGHT)
    return tuple(row.items)
