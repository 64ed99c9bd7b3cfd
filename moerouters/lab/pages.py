"""Pages of docs/ with parts that are made of committed results, each between a pair of marks of its own."""

from __future__ import annotations

from collections.abc import Sequence


def with_part(page: str, mark: str, content: str) -> str:
    """Other content between `<!-- mark -->` and `<!-- /mark -->`. SystemExit unless the page holds each once."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise SystemExit(f"the page needs the marks {begin} and {end} once")
    return page[: page.index(begin)] + f"{begin}\n{content}\n" + page[page.index(end) :]


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; cells are taken as they are."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *rows))
