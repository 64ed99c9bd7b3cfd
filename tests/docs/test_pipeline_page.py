"""docs/pipeline.md, followed by a reader who runs every block in one folder, and its table made anew."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moerouters.cli import app
from moerouters_conformance.pool import rank_pool
from support import pipeline_jobs
from support.markdown import code_blocks
from support.pipeline_page import rendered

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pipeline.md"


def test_the_table_is_what_the_simulator_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert rendered(page) == page, "stale: run `python -m support.pipeline_page docs/pipeline.md` in tests/"
    assert "| `dualpipev-filled` | 8 | 51 | 0.0588 | 9, 9, 9, 9 | 25.5 |" in page


def test_the_blocks_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    printed, compared = "", 0
    for block in code_blocks(PAGE):
        if block.title is not None:
            continue
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block.text, f"pipeline.md:{block.line}", "exec"), names)
            printed = out.getvalue()
        elif block.language == "console":
            command, _, shown = block.text.partition("\n")
            result = CliRunner(env={"COLUMNS": "100"}).invoke(app, shlex.split(command.removeprefix("$ moerouters ")))
            assert result.exit_code == 0, result.output
            lines = [line.rstrip() for line in result.stdout.splitlines()]
            if shown:
                assert lines == shown.splitlines(), command
                compared += 1
        elif block.text.startswith("rank,position"):
            assert (tmp_path / "zb.csv").read_text().startswith(block.text)
        else:
            assert printed == block.text
            compared += 1
    assert compared == 4
    assert (tmp_path / "best.csv").is_file()


@pytest.mark.dist
def test_the_script_of_the_page_trains() -> None:
    (script,) = [block.text for block in code_blocks(PAGE) if block.title == "train.py"]
    *others, last = rank_pool().run(pipeline_jobs.run_script, script)
    assert not any(others)
    assert len(last) == 20 and sum(last[-5:]) < sum(last[:5])


@pytest.mark.dist
@pytest.mark.slow
def test_the_driver_of_the_page_trains(tmp_path: Path) -> None:
    (script,) = [block.text for block in code_blocks(PAGE) if block.title == "drive.py"]
    (tmp_path / "drive.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "drive.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loss 0.") and done.stdout.endswith("weights of 2 ranks\n")
