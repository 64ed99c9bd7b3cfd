"""A hash of integers that gives the same bits on every machine: 32-bit words in int64, without any overflow.

What a seed does to tokens is part of a trained model, so nothing here may follow torch's or Python's own generators.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
"""2**32 over the golden ratio: multiples of it are far apart."""

Words = TypeVar("Words", int, Tensor)


def mix(x: Words) -> Words:
    """A word in [0, 2**32) for each such word, one to one; every bit of it depends on every bit of x.

    prospector32 of Wellons' hash-prospector. Its factors are below 2**30, so no product leaves int64.
    """
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & WORD
    x = ((x ^ (x >> 12)) * 0x297A2D39) & WORD
    return x ^ (x >> 15)


def draws(token_ids_T: Tensor, count: int, *, seed: int) -> Tensor:
    """int64 [T, count] in [0, 2**32): the numbers that each vocabulary id draws. Only its low 32 bits count."""
    state_T1 = mix((token_ids_T.unsqueeze(1) & WORD) ^ mix(seed ^ GOLDEN))
    places_C = torch.arange(1, count + 1, device=token_ids_T.device) * GOLDEN & WORD
    return mix(state_T1 ^ places_C)


def distinct(draws_TC: Tensor, below: int, count: int) -> Tensor:
    """int64 [T, count]: different numbers in [0, below), every set as likely as every other, and in each place every
    number. draws_TC holds count + 1 words for each row.

    Floyd's sampling (Bentley, CACM 30:9, 1987): in turn i a number up to below - count + i, or just that one if the
    number is taken. The last draw turns all of them round, since the largest would never come first.
    """
    chosen_Tk = draws_TC[:, :0]
    for turn, highest in enumerate(range(below - count, below)):
        number_T1 = draws_TC[:, turn : turn + 1] % (highest + 1)
        taken_T1 = (chosen_Tk == number_T1).any(dim=1, keepdim=True)
        chosen_Tk = torch.cat([chosen_Tk, torch.where(taken_T1, highest, number_T1)], dim=1)
    return (chosen_Tk + draws_TC[:, count : count + 1]) % below


def hashed_experts(
    token_ids_T: Tensor, *, num_experts: int, top_k: int, seed: int, num_groups: int = 1, kept_groups: int = 1
) -> Tensor:
    """int64 [T, K]: K different experts of each vocabulary id, inside kept_groups of the num_groups groups."""
    draws_TC = draws(token_ids_T, top_k + kept_groups + 2, seed=seed)
    size = num_experts // num_groups
    places_TK = distinct(draws_TC, kept_groups * size, top_k)
    if kept_groups == num_groups:
        return places_TK
    groups_TG = distinct(draws_TC[:, top_k + 1 :], num_groups, kept_groups)
    return groups_TG.gather(1, places_TK // size) * size + places_TK % size
