"""What `import moerouters` costs, and that names are there when they are used."""

import json
import pkgutil
import subprocess
import sys

import pytest

import moerouters

SCRIPT = """
import json, sys
import moerouters
loaded = {name.partition(".")[0] for name in sys.modules}
ours = [name for name in sys.modules if name.startswith("moerouters.")]
print(json.dumps({"loaded": sorted(loaded), "submodules": ours}))
"""
HEAVY = {"triton", "matplotlib", "jinja2", "typer", "rich", "transformers", "hypothesis", "pytest", "ray", "scipy"}


def loaded_after(statement: str) -> set[str]:
    """Top-level packages and our submodules in a fresh interpreter after a statement, which must print nothing."""
    code = SCRIPT.replace("import moerouters\n", f"import moerouters\n{statement}\n", 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    return set(report["loaded"]) | set(report["submodules"])


def test_listing_plugins_waits_for_nothing() -> None:
    loaded = loaded_after("moerouters.available()")
    assert loaded & (HEAVY | {"torch", "numpy"}) == set()


def test_the_core_imports_nothing_heavy_and_no_plugin() -> None:
    loaded = loaded_after("from moerouters import *")
    assert {"torch", "moerouters.layer"} <= loaded
    assert loaded & HEAVY == set()
    assert {name for name in loaded if name.startswith("moerouters_")} == set()
    rooms = {name.split(".")[1] for name in loaded if name.startswith("moerouters.")}
    assert rooms & {"lab", "cli", "bench", "swap", "pipeline", "builtin"} == set()


def test_no_public_name_is_a_module() -> None:
    """Importing a submodule sets it as an attribute of the package, over a name that is looked up lazily."""
    modules = {module.name for module in pkgutil.iter_modules(moerouters.__path__)}
    assert modules & set(moerouters.__all__) == set()


def test_public_names_are_listed_and_others_are_refused() -> None:
    assert set(moerouters.__all__) <= set(dir(moerouters))
    with pytest.raises(AttributeError, match="module 'moerouters' has no attribute 'Routter'"):
        moerouters.Routter  # noqa: B018
