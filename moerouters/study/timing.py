"""Whole training steps of several models, timed in turn: forward, backward, optimizer, on the batches of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

import torch

from moerouters.bench.timing import take_rounds, waiting
from moerouters.lab.train import Trainer

_SAMPLE_S = 0.05


def steps_of(trainer: Trainer) -> Callable[[], object]:
    """A call that makes one training step, each on its own batch. It trains the model."""
    numbers = count(trainer.step)
    return lambda: trainer.work(next(numbers))


def time_steps(trainers: Mapping[str, Trainer], *, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each model in each round; every model takes its turn in every round."""
    runs = {name: steps_of(trainer) for name, trainer in trainers.items()}
    return take_rounds(runs, wait=waiting(device), rounds=rounds, sample_s=_SAMPLE_S)
