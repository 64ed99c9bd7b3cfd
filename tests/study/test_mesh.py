"""Layouts of ranks, their measurement under torchrun, and projections."""

from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from moerouters.errors import ConfigError
from moerouters.lab.ranks import Ranks
from moerouters.study.contender import Contender
from moerouters.study.mesh import Layout, layouts, measure_mesh
from moerouters.study.mesh_command import print_mesh
from moerouters.study.projection import project
from moerouters.study.results import MeshRow, StudyResults
from support.lab import small_corpus
from support.study import CPU, PLAN, TOPK, around, three_seeds


def test_layouts() -> None:
    two = list(layouts(2, 8))
    assert two[0] == Layout(1, "local")
    assert {layout.dispatcher for layout in two[1:]} == {"all_to_all", "all_gather", "tensor_sliced", "mesh3d"}
    assert {layout.expert for layout in layouts(4, 8)} == {1, 2, 4}
    assert {layout.expert for layout in layouts(4, 6)} == {1, 2}
    assert list(layouts(4, 5)) == [Layout(1, "local")]


def test_one_rank_has_no_mesh(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one rank has no mesh"):
        measure_mesh(
            Contender.of(PLAN, TOPK), seed=0, corpus=small_corpus(tmp_path), device=CPU, ranks=Ranks(), rounds=5
        )


def test_projections_are_of_every_cluster() -> None:
    settings = Contender.of(PLAN, TOPK).settings.override({"num_experts": 8})
    even = project("topk", settings, avg_max_vio=None)
    uneven = project("topk", settings, avg_max_vio=0.5)
    assert {each.load for each in even} == {"uniform"}
    assert {each.load for each in uneven} == {"uniform", "lognormal:max_vio=0.5"}
    assert {each.cluster for each in even} == {"h100-nvl8-ib400", "v100-nvl8-ib100"}
    assert "tensor_sliced" in {each.backend for each in even}
    assert all(each.ms > 0 for each in uneven)


def test_what_is_printed() -> None:
    row = MeshRow(
        model="topk", data=2, expert=2, dispatcher="all_to_all", ms=around(9.0), over_first=around(1.5),
        tokens_per_s=1234.0, idle=0.25, anatomy=None,
    )  # fmt: skip
    console = Console(record=True, width=120, file=StringIO())
    print_mesh(console, three_seeds().model_copy(update={"mesh": (row,)}))
    words = console.export_text().split()
    assert all(cell in words for cell in ("all_to_all", "9.0", "1.50", "1,234", "25%"))


@pytest.mark.dist
@pytest.mark.slow
def test_under_torchrun_every_layout_is_timed(tmp_path: Path) -> None:
    small_corpus(tmp_path)
    changes = [f"--set={name}={value}" for name, value in (("hidden_size", 16), ("micro_batch_size", 2))]
    changes += ["--set=sequence_length=8", "--set=num_experts=4", "--set=dense_size=16"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moerouters"]
    command += ["study", "--mesh", "--device", "cpu", "--rounds", "5", "--models", "topk-m", *changes]
    command += ["--text", str(tmp_path / "text"), "--output", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = StudyResults.load(tmp_path / "out")
    assert found is not None and found.projections
    shapes = [(row.data, row.expert, row.cut, row.dispatcher) for row in found.mesh]
    assert shapes == [
        (2, 1, 1, "local"),
        (1, 2, 1, "all_to_all"),
        (1, 2, 1, "all_gather"),
        (1, 2, 1, "tensor_sliced"),
        (1, 1, 2, "mesh3d"),
    ]
    assert found.mesh[0].over_first.value == 1 and found.mesh[0].idle == 0
    assert all(0 <= row.idle < 1 and row.ms.value > 0 for row in found.mesh)
    spread = [row.anatomy for row in found.mesh if row.anatomy is not None and row.expert * row.cut > 1]
    assert spread and all(anatomy.parts_ms["communication"] > 0 for anatomy in spread)
    assert done.stdout.count("report: ") == 1
    assert "Over ranks, measured" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
