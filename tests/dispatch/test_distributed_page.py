"""The Python of docs/distributed.md runs as it stands on four ranks, as one session."""

from __future__ import annotations

from pathlib import Path

import pytest

from moerouters_conformance.pool import rank_pool
from support.markdown import code_blocks

from . import page_jobs as jobs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"


@pytest.mark.dist
def test_snippets_run_and_do_what_the_page_says(tmp_path: Path) -> None:
    scripts = {block.title: block.text for block in code_blocks(PAGE) if block.language == "python"}
    first, *others = rank_pool().run(jobs.run_page, scripts, str(tmp_path))
    assert first["load"] == 4 * 16 * 2  # pairs of all ranks
    for other in others:
        assert other["load"] == first["load"]
        assert other["shared"] == first["shared"]  # what every rank has stayed alike
        assert other["own"] != first["own"]
    for rank in (first, *others):
        # FSDP2's gradients are those of the mean of the four losses, in one process.
        assert rank["fsdp"] == pytest.approx(first["alone"], rel=1e-4)
        assert rank["mesh3d"] == pytest.approx(first["mesh3d alone"], rel=1e-4)
    assert (tmp_path / ".metadata").is_file()
