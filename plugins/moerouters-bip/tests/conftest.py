"""Fixtures of this distribution's tests, which also run on their own, outside the repository."""

import sys
from pathlib import Path

import pytest
import torch

# Ranks are processes that import what they run by name, and get this path when they start.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
