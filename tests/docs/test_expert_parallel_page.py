"""docs/expert-parallel.md shows the committed measurement, and says of it what is so."""

from __future__ import annotations

from pathlib import Path

from support.expert_parallel_page import LIMIT, ROWS, load, measured, rendered

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_shows_the_committed_result() -> None:
    page = (DOCS / "expert-parallel.md").read_text(encoding="utf-8")
    assert rendered(page, load(DOCS)) == page, "stale: run `python -m support.expert_parallel_page render docs`"


def test_what_the_page_says() -> None:
    """All agree but the auxiliary loss of a rank's own tokens, which does where all ranks hold the same tokens."""
    parity = load(DOCS)
    names = measured(parity)
    assert {"all_gather", "all_to_all", "padded", "tensor_sliced"} <= set(names)
    assert [row.model_copy(update={"apart": {}}) for row in parity.rows] == list(ROWS)
    for row in parity.rows:
        agreeing = {name for name in names if row.apart[name] <= LIMIT}
        assert agreeing == ({"tensor_sliced"} if row.router == "loss-controlled" else set(names)), row
