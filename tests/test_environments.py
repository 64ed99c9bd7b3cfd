"""The throw-away environments of the tests: third-party packages in, everything of ours out."""

from pathlib import Path

import pytest

from support.environments import Environment, make_environment
from support.workspace import PLUGINS

LIST_OURS = """
from importlib.metadata import distributions, entry_points, version
from importlib.util import find_spec
print(version("torch"), bool(find_spec("torch")))
print(sorted(found.name for found in distributions() if "moerouters" in found.name))
print(find_spec("moerouters"), list(entry_points(group="moerouters")))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return make_environment(tmp_path / "environment")


def test_nothing_of_ours_leaks_in(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PLUGINS[0].source_root))
    torch, ours, import_system = environment.run("-c", LIST_OURS).stdout.splitlines()
    assert torch.startswith("2.") and torch.endswith(" True")
    assert (ours, import_system) == ("[]", "None []")


def test_installing_a_source_folder_leaves_it_as_it_was(environment: Environment) -> None:
    plugin = PLUGINS[0]
    before = sorted(plugin.folder.rglob("*"))
    environment.install(plugin.folder)
    assert sorted(plugin.folder.rglob("*")) == before
    _, ours, _ = environment.run("-c", LIST_OURS).stdout.splitlines()
    assert ours == f"['{plugin.name}']"


def test_a_failing_command_shows_its_output(environment: Environment) -> None:
    with pytest.raises(AssertionError, match=r"exited with 3(.|\n)*half way"):
        environment.run("-c", "import sys; print('half way'); sys.exit(3)")
    assert environment.run("-c", "import sys; sys.exit(3)", check=False).returncode == 3
