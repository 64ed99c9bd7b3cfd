"""Fenced code blocks of a Markdown page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(
    r'^```(?P<language>[a-z]*)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeBlock:
    """One block: its language, the file it is meant for if it names one, its text and its first line's number."""

    language: str
    title: str | None
    text: str
    line: int


def code_blocks(page: Path) -> list[CodeBlock]:
    """All fenced blocks of a page, in order."""
    source = page.read_text(encoding="utf-8")
    return [
        CodeBlock(
            language=found["language"],
            title=found["title"],
            text=found["text"],
            line=source.count("\n", 0, found.start()) + 2,
        )
        for found in _FENCE.finditer(source)
    ]
