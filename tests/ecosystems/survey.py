"""Run the tests of this folder that need a real package, each with that package on the path.

    python -m tests.ecosystems.survey docs                  # fetches the packages without what they depend on
    python -m tests.ecosystems.survey docs --packages DIR   # they lie in DIR/NAME already

Writes docs/benchmarks/ecosystems.json and docs/ecosystems.md. vLLM's wheel has 340 MB, of which a few files are read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .page import Check, Ran, Survey, write
from .signatures import version

ROOT = Path(__file__).resolve().parents[2]
_ENGINES = """
aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 apache-tvm-ffi==0.1.15.post2 attrs==26.1.0
frozenlist==1.8.0 msgspec==0.23.0 multidict==7.2.1 propcache==0.5.4 pybase64==1.5.1 pyzmq==27.3.0
starlette==1.10.0 yarl==1.25.1
"""
_VLLM = """
cachetools==8.0.2 cbor2==6.3.0 cloudpickle==3.1.3 fastapi==0.165.0 openai==3.57.0 openai-harmony==0.0.8
prometheus-client==0.26.0 py-cpuinfo==9.0.0 sniffio==1.3.1 uvloop==0.23.0 xgrammar==0.2.9
"""
_SGLANG = """
dill==0.4.1 ipython==9.18.1 orjson==3.13.0 traitlets==5.16.1
"""
PACKAGES = {
    "megatron-core": ("megatron-core==0.16.1",),
    "torchtitan": ("torchtitan==0.3.0", "spmd-types==0.2.3", "tyro==1.0.17", "docstring-parser==0.18.0"),
    "vllm": ("vllm==0.33.0", *_ENGINES.split(), *_VLLM.split()),
    "sglang": ("sglang==0.5.23", *_ENGINES.split(), *_SGLANG.split()),
}
"""What lies on the path, installed without dependencies: torch and the rest are those of the environment."""
TESTS = {name: f"tests/ecosystems/test_{name.removesuffix('-core')}.py" for name in PACKAGES}


def fetch(name: str, folder: Path) -> Path:
    """Put a package and the little that it needs to be imported into folder/name."""
    target = folder / name
    command = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-compile")
    wanted = ("--root-user-action=ignore", "--no-cache-dir", "--target", str(target), *PACKAGES[name])
    done = subprocess.run([sys.executable, *command, *wanted], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run(name: str, package: Path) -> Ran:
    """Run the tests of a framework against its package in a process of their own."""
    path = os.pathsep.join((str(package), str(ROOT / "tests"), str(ROOT)))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "tests.ecosystems.recorder", str(report), TESTS[name]]
        environ = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=900, check=False)
        assert report.is_file(), done.stdout + done.stderr
        outcomes: dict[str, str] = json.loads(report.read_text(encoding="utf-8"))
    assert outcomes and "skipped" not in outcomes.values(), done.stdout
    return Ran(version=version(name, package), checks=tuple(summed(outcomes.items())))


def summed(outcomes: Iterable[tuple[str, str]]) -> Iterable[Check]:
    """Checks in their order, from (test, outcome); cases of one test are counted together."""
    checks: dict[str, Check] = {}
    for test, outcome in outcomes:
        name = test.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
        seen = checks.get(name, Check(name=name, cases=0))
        failed = seen.failed + (outcome != "passed")
        checks[name] = Check(name=name, cases=seen.cases + 1, failed=failed)
    return checks.values()


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(prog="python -m tests.ecosystems.survey")
    parser.add_argument("docs", type=Path)
    parser.add_argument("--packages", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ran = {
            name: run(name, asked.packages / name if asked.packages else fetch(name, Path(folder))) for name in PACKAGES
        }
    write(asked.docs, Survey(torch=torch.__version__.partition("+")[0], ran=ran))


if __name__ == "__main__":
    main()
