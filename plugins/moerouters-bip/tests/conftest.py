"""Fixtures of this distribution's tests, which also run on their own, outside the repository."""

import pytest
import torch


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
