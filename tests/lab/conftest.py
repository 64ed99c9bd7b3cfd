from collections.abc import Iterator
from pathlib import Path

import pytest

from moerouters import registry
from moerouters.lab.corpus import Corpus
from support.lab import BALANCED, small_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A few kilobytes of text."""
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def balanced() -> Iterator[None]:
    """Offers the router `balanced`, which has a loss, a stat and a state."""
    with registry.temporary(BALANCED):
        yield


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where a comparison writes."""
    return tmp_path / "out"
