"""What `import moerouters` costs."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys
import moerouters
loaded = {name.partition(".")[0] for name in sys.modules}
ours = [name for name in sys.modules if name.startswith("moerouters.")]
print(json.dumps({"loaded": sorted(loaded), "submodules": ours}))
"""
HEAVY = {"triton", "matplotlib", "jinja2", "typer", "rich", "transformers", "hypothesis", "pytest", "ray", "scipy"}


def test_importing_the_core_imports_nothing_heavy_and_no_plugin() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    loaded = set(report["loaded"])
    assert "torch" in loaded
    assert loaded & HEAVY == set()
    assert {name for name in loaded if name.startswith("moerouters_")} == set()
    rooms = {name.split(".")[1] for name in report["submodules"]}
    assert rooms & {"lab", "cli", "bench", "swap", "pipeline", "builtin"} == set()
    assert done.stderr == ""
