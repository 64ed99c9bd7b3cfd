"""Dispatchers of plug-ins, from the hook to the tokens of four ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from moerouters_conformance.pool import rank_pool
from support.markdown import code_blocks

from . import plugin_jobs as jobs
from .parity import Case, expect_parity

ROOT = Path(__file__).resolve().parents[2]
GOOD = jobs.Plugin(str(ROOT / "tests/plugins/good/src"), "moerouters_good.plugin", ("good", "good-louder"))
PIGEON = Case("pigeon", (5, 0), shared=True)


def test_a_dispatcher_of_a_plugin_gives_what_one_process_gives() -> None:
    found = rank_pool().run(jobs.after_naming_it, GOOD, PIGEON)
    assert [offered for offered, _ in found] == [["pigeon"]] * 4
    expect_parity(PIGEON, [result for _, result in found])


def test_its_factory_is_called_with_the_site_of_each_layer() -> None:
    found = rank_pool().run(jobs.made_per_layer, GOOD, PIGEON)
    assert found == [("Pigeon", f"rank {rank % 2} of 2, back-end 'pigeon'", 2) for rank in range(4)]


def test_it_is_offered_once_its_plugin_is_in_use() -> None:
    for message in rank_pool().run(jobs.without_naming_it, GOOD, PIGEON):
        assert message == (
            "there is no dispatcher 'pigeon'.\n"
            "  cause  built in are all_gather, all_to_all, auto, deepep, hierarchical, mesh3d, padded, tensor_sliced\n"
            "  fix    choose one of these; a plug-in's is offered once a router of the same plug-in has been named"
        )


def test_the_dispatcher_of_the_guide_runs(tmp_path: Path) -> None:
    blocks = code_blocks(ROOT / "docs" / "plugin-guide.md")
    (hook,) = (block.text for block in blocks if not block.title and "moerouters_dispatchers" in block.text)
    for block in blocks:
        if block.title and block.title.startswith("src/"):
            target = tmp_path / block.title
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text + (hook if target.name == "plugin.py" else ""), encoding="utf-8")
    share = jobs.Plugin(str(tmp_path / "src"), "moerouters_share.plugin", ("share",))
    case = Case("brief", (5, 3), dtype=torch.float32)
    found = rank_pool().run(jobs.after_naming_it, share, case)
    # Hidden states and their gradients are rounded to 8 bits once each.
    expect_parity(case, [result for _, result in found], limit=2 * torch.finfo(torch.bfloat16).eps)
    assert [offered for offered, _ in found] == [["brief"]] * 4
