"""Every Python block of these pages runs as it stands, each page as one session."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.markdown import code_blocks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/dataflow.md", "docs/swapping.md"])
def test_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = [block for block in code_blocks(ROOT / page) if block.language == "python"]
    assert snippets, f"{page} shows no Python"
    names: dict[str, object] = {}
    for block in snippets:
        exec(compile(block.text, f"{page}:{block.line}", "exec"), names)


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
)
def test_relative_links_lead_somewhere(page: str) -> None:
    import re

    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [
        t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t and not t.startswith("#")
    ]
    missing = [t for t in targets if not ((ROOT / page).parent / t).exists()]
    assert not missing, f"{page} links to {missing}"
