"""The golden core on the oldest release that CI tries, installed beside the one of the environment; transformers 4.

5.12.0 is not tried: it cannot be imported beside what is installed, as it needs httpx and tokenizers up to 0.23.0.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from moerouters import swap
from moerouters.errors import UnsupportedError

from .survey_page import OLDEST, Row, Survey

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = (
    "MixtralTopKRouter",
    "Qwen3MoeTopKRouter",
    "DeepseekV3TopkRouter",
    "GptOssTopKRouter",
    "GraniteMoeTopKRouter",
    "Ernie4_5_MoeTopKRouter",
)

GOLDEN = """
import sys
import torch, transformers
version, *names = sys.argv[1:]
assert transformers.__version__ == version, transformers.__file__
from tests.swap.survey import golden
from tests.swap.survey_page import Survey
from tests.swap.zoo import router_classes
rows = tuple(golden(router) for router in router_classes() if not names or router.name in names)
print(Survey(transformers=version, torch=torch.__version__, rows=rows).model_dump_json())
"""


@pytest.fixture(scope="session")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the oldest transformers and nothing else; all that it needs comes from the environment."""
    folder = tmp_path_factory.mktemp("oldest")
    command = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-compile")
    wanted = ("--root-user-action=ignore", "--target", str(folder), f"transformers=={OLDEST}")
    done = subprocess.run([sys.executable, *command, *wanted], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def golden(folder: Path, *names: str) -> tuple[Row, ...]:
    """Rows of all router classes there, or of those named."""
    path = os.pathsep.join((str(folder), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GOLDEN, OLDEST, *names],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Survey.model_validate_json(done.stdout.splitlines()[-1]).rows


def wrong(rows: tuple[Row, ...]) -> list[tuple[str, str, str]]:
    return [(row.router, name, each.why) for row in rows for name, each in row.verdicts() if each.holds is False]


def test_the_main_families(oldest: Path) -> None:
    rows = golden(oldest, *FAMILIES)
    assert {row.router for row in rows} == {*FAMILIES}
    assert all(row.proven for row in rows) and wrong(rows) == []


@pytest.mark.slow
def test_every_architecture(oldest: Path) -> None:
    rows = golden(oldest)
    assert len(rows) == 71
    assert sum(row.proven for row in rows) >= 68
    assert [row.router for row in rows if not row.proven and not row.reason] == []
    assert [router for router, _, _ in wrong(rows)] == []


@pytest.mark.parametrize("version", ["4.0.0", "4.57.6"])
def test_transformers_4_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moerouters.swapping.guards.version", lambda distribution: version)
    with pytest.raises(UnsupportedError, match=rf"transformers {version} is too old"):
        swap(nn.Linear(2, 2), "topk")
