"""Top-k of every row with a defined order of ties."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moerouters.kernels.threads import share_out

SMALL = 4096
"""Up to this many values a stable sort is faster than numpy's ten calls: a decoded token is not to wait for them."""
SMALLEST_SHARE, LARGEST_SHARE = 1 << 17, 1 << 19
"""Values that one thread looks at in one go. Of fewer there are more calls, each of which waits for the interpreter
(20.4 ms with 2**17, 18.1 with 2**19 for routing 65536 x 64 logits in two threads); more leave the cache."""


def topk_lowest_id(values_TE: Tensor, k: int) -> Tensor:
    """int64 [T, k]: the columns of the k largest values of each row, falling; among equal values the lowest column.

    torch.topk leaves the order of ties open, and it differs between devices; ties are common in routing (equal logits
    of a fresh gate, saturated sigmoids, bf16). NaN ranks below every number except -inf; -0.0 equals 0.0.
    """
    if values_TE.device.type != "cpu":
        return topk_lowest_id_torch(values_TE, k)
    if torch.compiler.is_compiling() or type(values_TE) not in (Tensor, torch.nn.Parameter):
        ids_Tk: Tensor = _topk_op(values_TE.detach(), k)  # for tracers numpy is out of sight
        return ids_Tk
    return _topk_cpu(values_TE.detach(), k)


def topk_lowest_id_torch(values_TE: Tensor, k: int) -> Tensor:
    """Reference of `topk_lowest_id`: a stable sort of every row."""
    lowest = torch.finfo(values_TE.dtype).min
    ranked_TE = torch.nan_to_num(values_TE, nan=lowest, posinf=float("inf"), neginf=-float("inf"))
    return ranked_TE.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@torch.library.custom_op("moerouters::topk_lowest_id_cpu", mutates_args=(), device_types="cpu")
def _topk_op(values_TE: Tensor, k: int) -> Tensor:
    return _topk_cpu(values_TE, k).contiguous()


@_topk_op.register_fake
def _(values_TE: Tensor, k: int) -> Tensor:
    return values_TE.new_empty((*values_TE.shape[:-1], k), dtype=torch.int64)


def _topk_cpu(values_TE: Tensor, k: int) -> Tensor:
    if values_TE.numel() <= SMALL or values_TE.dim() != 2 or values_TE.dtype == torch.float64 or k == 0:
        return topk_lowest_id_torch(values_TE, k)
    T, E = values_TE.shape
    wide_TE = values_TE.float().numpy()
    ids_Tk = torch.empty(T, k, dtype=torch.int64)
    out_Tk, lowest = ids_Tk.numpy(), torch.finfo(values_TE.dtype).min
    rows = max(min(LARGEST_SHARE // E, -(-T // torch.get_num_threads())), SMALLEST_SHARE // E, 1)
    parts = [slice(start, start + rows) for start in range(0, T, rows)]

    def run(some: Iterable[slice]) -> None:
        for part in some:
            out_Tk[part] = _topk_rows(wide_TE[part], k, lowest)

    share_out(run, parts)
    return ids_Tk


def _topk_rows(values_TE: NDArray[np.float32], k: int, lowest: float) -> NDArray[np.int64]:
    """As `topk_lowest_id`, NaN counting as `lowest`."""
    ids_Tk = None
    # Where k passes of argmax and a partition take the same time: k = 3 at E = 16, 8 at E = 64, 12 at E = 128.
    if k <= min(3 + values_TE.shape[1] // 16, 16):
        ids_Tk = _by_argmax(values_TE, k)
    if ids_Tk is None:
        ids_Tk = _by_partition(values_TE, k, lowest)
    return ids_Tk


def _by_argmax(values_TE: NDArray[np.float32], k: int) -> NDArray[np.int64] | None:
    """The largest, k times over; argmax takes the first of equals. None on meeting NaN, or -inf, which marks the taken.

    22 ms at T = 16384, E = 256, k = 8 for a partition (one core), 14 for this, 46 for torch.topk.
    """
    T, E = values_TE.shape
    left_TE = np.array(values_TE, order="C")  # so that its flat view is no second copy
    left_N, starts_T = left_TE.reshape(-1), np.arange(0, T * E, E)
    ids_Tk = np.empty((T, k), np.int64)
    for slot in range(k):
        ids_T = left_TE.argmax(axis=-1)
        ids_Tk[:, slot] = ids_T
        flat_T = starts_T + ids_T
        if not (left_N[flat_T] > -np.inf).all():
            return None
        left_N[flat_T] = -np.inf
    return ids_Tk


def _by_partition(values_TE: NDArray[np.float32], k: int, lowest: float) -> NDArray[np.int64]:
    """As `topk_lowest_id`, NaN counting as `lowest`. All that reaches the k-th largest value of its row, then sorted.

    21 ms at T = 65536, E = 64, k = 8 (one core), of which 12 are the partition; torch.topk takes 59, a stable sort 191.
    A partition of 64-bit keys of value and column needs no repair of ties, and takes 26 of itself.
    """
    T, E = values_TE.shape
    best_Tk = np.partition(values_TE, E - k, axis=-1)[:, E - k :]  # NaN goes last
    if np.isnan(best_Tk).any():
        return _by_partition(np.where(np.isnan(values_TE), np.float32(lowest), values_TE), k, lowest)
    cut_T1 = best_Tk[:, :1]
    chosen_TE = values_TE >= cut_T1
    flat_N = np.flatnonzero(chosen_TE)
    if len(flat_N) > T * k:  # some rows hold the cut more often than there is room
        tied = np.flatnonzero(np.count_nonzero(chosen_TE, axis=-1) > k)
        above_tE, equal_tE = values_TE[tied] > cut_T1[tied], values_TE[tied] == cut_T1[tied]
        room_t1 = k - np.count_nonzero(above_tE, axis=-1, keepdims=True)
        chosen_TE[tied] = above_tE | (equal_tE & (equal_tE.cumsum(axis=-1) <= room_t1))
        flat_N = np.flatnonzero(chosen_TE)
    # Keys that rise as values fall and then as columns rise: the bits of a float, those below the sign flipped where it
    # is set, rise with the float. Adding 0 makes 0.0 of -0.0.
    bits_N = (values_TE.reshape(-1)[flat_N] + np.float32(0)).view(np.int32)
    falling_N = ~(bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF))
    keys_Tk = ((falling_N.astype(np.int64) << 32) | flat_N).reshape(T, k)
    keys_Tk.sort(axis=-1)
    return (keys_Tk & 0xFFFFFFFF) - np.arange(0, T * E, E)[:, None]
