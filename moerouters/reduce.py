"""Sum the stats of all layers over ranks: one flattened collective per dtype and step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

Sums = dict[str, dict[str, Tensor]]


def reduce_sums(sums: Mapping[str, Mapping[str, Tensor]], group: dist.ProcessGroup | None) -> Sums:
    """{layer: {name: tensor}} summed over `group` (None: the world, if torch.distributed runs). The input is copied.

    Tensors of one dtype travel in one flat all-reduce: a model with 60 layers costs two collectives, not 300.
    """
    copies = {layer: {name: value.clone() for name, value in named.items()} for layer, named in sums.items()}
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return copies
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    # Sorted, so that every rank packs the same values in the same places, whatever order it met its layers in.
    for layer in sorted(copies):
        for name in sorted(copies[layer]):
            by_dtype.setdefault(copies[layer][name].dtype, []).append(copies[layer][name])
    for dtype in sorted(by_dtype, key=str):
        values = by_dtype[dtype]
        flat = torch.cat([value.reshape(-1) for value in values])
        dist.all_reduce(flat, group=group)
        for value, part in zip(values, torch.split(flat, [value.numel() for value in values]), strict=True):
            value.copy_(part.reshape(value.shape))
    return copies
