"""What holds for every test of the core. Plugin tests see nothing of it: they travel with their own distribution."""

import os

# One thread everywhere, also in the processes that tests start: how a reduction is split over threads decides its last
# bits, and several ranks on a small machine would otherwise wait for each other's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from moerouters_conformance import pool

# Fixed examples and no deadline: the first torch call of a process can take seconds, and a flaky test is a bug.
settings.register_profile("moerouters", deadline=None, derandomize=True)
settings.load_profile("moerouters")

if not torch.cuda.is_available():
    # Read when a module with @triton.jit is imported, so it has to stand before the first of them.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def patient_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two test processes with four ranks each share two cores, and a job may compile: it hangs if it takes minutes."""
    monkeypatch.setattr(pool, "TIMEOUT_S", 300.0)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded CPU generator, fresh for every test."""
    return torch.Generator().manual_seed(0)
