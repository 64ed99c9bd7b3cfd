"""A check sees the same inputs whatever else is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
{imports}
from moerouters_conformance.case import Case
from moerouters_conformance.forall import forall
from moerouters_conformance.profile import find_profile
from moerouters_conformance.strategies import cases, distinct_cases
from moerouters_conformance.subject import Subject

seen = []
for strategy in (cases, distinct_cases):
    @forall(strategy)
    def look(subject, case):
        seen.append(case)
    look(Subject.of("topk"), find_profile("default"))
print(len(seen), [case.logits for case in seen])
"""


def examples(folder: Path, imports: str) -> str:
    code = SCRIPT.format(imports=imports)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder).stdout


def test_local_modules_change_no_example(tmp_path: Path) -> None:
    numbers = ", ".join(str(number) for number in range(-500, 500, 7))
    (tmp_path / "mine.py").write_text(f"NUMBERS = ({numbers})\n", encoding="utf-8")
    alone = examples(tmp_path, "")
    assert int(alone.split()[0]) >= 90
    assert examples(tmp_path, "import mine") == alone
