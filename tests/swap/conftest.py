"""A model on disk and a text, for the commands that look into models."""

from pathlib import Path

import pytest

from .checkpoints import TEXT, qwen, saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(qwen(), tmp_path_factory.mktemp("models") / "tiny-qwen")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "times.txt"
    path.write_bytes(TEXT)
    return path
