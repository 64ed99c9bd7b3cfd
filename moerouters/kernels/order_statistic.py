"""Order statistics per expert: the n-th largest value that the tokens hold for it, n known to the device alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moerouters.kernels.launch import triton_serves

Array = npt.NDArray[Any]

LOWEST = -float("inf")
AT_ONCE = 1 << 18
"""Values that one numpy call partitions: 1 MiB of float32."""


def kth_largest_per_expert(
    values_TE: Tensor, rank: Tensor, *, valid_T: Tensor | None = None, count: int = 1, most: int | None = None
) -> Tensor:
    """[count, E]: per expert the values at rank `rank` (int64 0-d, 1 is the largest) and, for count = 2, the next rank.

    Floats; float32 and float64 on a CPU and float32 on a GPU have a fast path. valid_T: bool [T], tokens that count;
    what the others hold is never read. The others hold no NaN. -inf is no value. A rank below 1 stands for 1, one past
    an expert's values for its last value; an expert without values gets 0. most: a rank, known on the host, past which
    none is asked for. Exact, without a host synchronisation on a GPU, and without a gradient.
    """
    found: Tensor = _kth_largest_per_expert(values_TE.detach(), rank, valid_T, count, most)
    return found


@torch.library.custom_op("moerouters::kth_largest_per_expert", mutates_args=())
def _kth_largest_per_expert(
    values_TE: Tensor, rank: Tensor, valid_T: Tensor | None, count: int, most: int | None
) -> Tensor:
    if values_TE.device.type == "cpu" and values_TE.dtype in (torch.float32, torch.float64):
        return _kth_largest_numpy(values_TE, rank, valid_T, count)
    if triton_serves(values_TE, only=torch.float32) and values_TE.numel():
        from moerouters.kernels.gpu.order_statistic import kth_largest_per_expert as on_gpu

        return on_gpu(values_TE, rank, valid_T, count)
    return kth_largest_per_expert_torch(values_TE, rank, valid_T=valid_T, count=count, most=most)


@_kth_largest_per_expert.register_fake
def _(values_TE: Tensor, rank: Tensor, valid_T: Tensor | None, count: int, most: int | None) -> Tensor:
    return values_TE.new_empty(count, values_TE.shape[1])


def kth_largest_per_expert_torch(
    values_TE: Tensor, rank: Tensor, *, valid_T: Tensor | None = None, count: int = 1, most: int | None = None
) -> Tensor:
    """Reference of `kth_largest_per_expert`: sorts as far as `most`."""
    T, E = values_TE.shape
    values_TE = values_TE if valid_T is None else torch.where(valid_T.unsqueeze(1), values_TE, LOWEST)
    # A row more, so that there is one to read without tokens.
    padded_ET = torch.cat([values_TE, values_TE.new_full((1, E), LOWEST)]).t()
    sorted_ET = padded_ET.topk(T + 1 if most is None else min(T, most + 1) + 1, dim=-1).values
    places_E = (values_TE > LOWEST).sum(dim=0)
    at_EN = torch.minimum(
        rank - 1 + torch.arange(count, device=rank.device), (places_E - 1).clamp_min(0).unsqueeze(1)
    ).clamp(0, sorted_ET.shape[1] - 1)
    return torch.where(places_E > 0, sorted_ET.gather(1, at_EN).t(), 0.0)


def _kth_largest_numpy(values_TE: Tensor, rank: Tensor, valid_T: Tensor | None, count: int) -> Tensor:
    if valid_T is not None and not bool(valid_T.all()):
        values_TE = values_TE[valid_T]
    # A copy in any case: partitioning works in place.
    values_ET = values_TE.t().clone(memory_format=torch.contiguous_format).numpy()
    return torch.from_numpy(falling_in_place(values_ET, int(rank) - 1, count)[0])


def falling_in_place(values_ET: Array, place: int, count: int) -> tuple[Array, Array]:
    """[count, E] values at `place` (0 is the largest) and after, and bool [E] which experts have any; count 1 or 2.

    Reorders `values_ET`. numpy's partition takes an eighth of torch.kthvalue's time and a fifth of torch.topk's
    (T = 65536, rank T / 8, one CPU core).
    """
    E, T = values_ET.shape
    found = np.zeros((count, E), values_ET.dtype)
    if T == 0:
        return found, np.zeros(E, bool)
    places = [min(max(place + n, 0), T - 1) for n in range(count)]
    pivot = T - 1 - places[-1]
    values_ET.partition(pivot, axis=1)
    found[-1] = values_ET[:, pivot]
    if count == 2:
        found[0] = found[1] if places[0] == places[1] else values_ET[:, pivot + 1 :].min(axis=1)
    any_E = np.ones(E, bool)
    for e in np.flatnonzero(found[-1] == LOWEST):  # fewer values than asked for, or none
        falling = -np.sort(-values_ET[e][values_ET[e] > LOWEST])
        any_E[e] = falling.size > 0
        found[:, e] = [falling[min(at, falling.size - 1)] for at in places] if any_E[e] else 0
    return found, any_E
