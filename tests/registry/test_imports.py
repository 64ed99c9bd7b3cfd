"""The plugin system and the command line stay light: neither brings torch along, nor anything of a plugin."""

import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "moerouters"
# The package's own __init__ imports torch for its users; a stand-in shows what the modules themselves need.
WITHOUT_INIT = """
import sys, types
package = types.ModuleType("moerouters")
package.__path__ = [{package!r}]
sys.modules["moerouters"] = package
{statement}
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a new interpreter after `statement`."""
    code = WITHOUT_INIT.format(package=str(PACKAGE), statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "statement",
    [
        "import moerouters.registry",
        "from moerouters.registry import plugins; assert plugins()",
        "from moerouters.registry import available; assert available()",
    ],
)
def test_registry_needs_little(statement: str) -> None:
    loaded = loaded_by(statement)
    assert "pluggy" in loaded
    assert not loaded & {"torch", "numpy", "triton", "typer", "rich", "matplotlib", "jinja2"}
    assert not {name for name in loaded if name.startswith("moerouters_")}


@pytest.mark.parametrize("arguments", [["--help"], ["plugins", "--json"]])
def test_command_line_needs_no_torch_to_answer(arguments: list[str]) -> None:
    call = f"from moerouters.cli import app\ntry:\n    app({arguments!r})\nexcept SystemExit:\n    pass"
    loaded = loaded_by(call)
    assert "typer" in loaded
    assert not loaded & {"torch", "matplotlib", "jinja2"}
