from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_plugins import PluginModules, plugin_modules


@pytest.fixture
def modules(tmp_path: Path) -> Iterator[PluginModules]:
    """A folder on the import path, for plugin modules of one test."""
    with plugin_modules(tmp_path) as folder:
        yield folder


@pytest.fixture(autouse=True)
def host_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name the version of the installed core, which a test must not depend on."""
    monkeypatch.setattr("moerouters.registry.messages.host_version", lambda: "0.1.0")
