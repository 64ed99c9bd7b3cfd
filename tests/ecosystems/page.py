"""docs/ecosystems.md from docs/benchmarks/ecosystems.json, which the survey wrote, and the texts in this folder.

    python -m tests.ecosystems.page docs

Needs no torch, so `make docs` runs it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from moerouters.lab.pages import markdown_table

from .signatures import RELIED_ON
from .signatures import read as facts

TEXT = Path(__file__).with_name("page.md")


class Check(BaseModel):
    """One test, and for how many cases."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    cases: int
    failed: int = 0


class Ran(BaseModel):
    """What ran against one real package."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    checks: tuple[Check, ...]

    @property
    def cases(self) -> int:
        return sum(check.cases for check in self.checks)

    @property
    def failed(self) -> int:
        return sum(check.failed for check in self.checks)


class Survey(BaseModel):
    """docs/benchmarks/ecosystems.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    torch: str
    ran: dict[str, Ran]
    """By distribution."""


def load(folder: Path) -> Survey:
    """The committed survey."""
    return Survey.model_validate_json((folder / "benchmarks" / "ecosystems.json").read_bytes())


def write(folder: Path, survey: Survey) -> None:
    """Write the survey and its page."""
    text = survey.model_dump_json(indent=1, exclude_defaults=True)
    (folder / "benchmarks" / "ecosystems.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / "ecosystems.md").write_text(page(survey), encoding="utf-8")


def page(survey: Survey) -> str:
    """docs/ecosystems.md: the text, with the table and the lists of checks in their places."""
    text = TEXT.read_text(encoding="utf-8").replace("<!-- table -->", _table(survey))
    for name in RELIED_ON:
        text = text.replace(f"<!-- ran {name} -->", _ran(survey, name)).replace(f"{{{name}}}", survey.ran[name].version)
    return text


PARTS = {
    "megatron-core": "`MoELayer` in training, on one rank and on two",
    "torchtitan": "`MoE` in training, on one rank and on two, its override and optimizers",
    "vllm": "the plug-in loader, `FusedMoEFactory` up to the experts, routing",
    "sglang": "the plug-in loader, its hook, `TopK` with `select_experts`",
}
"""What of a package a CPU runs."""


def _table(survey: Survey) -> str:
    rows = []
    for name, relied_on in RELIED_ON.items():
        ran = survey.ran[name]
        held = f"{ran.cases} of {ran.cases}" if not ran.failed else f"**{ran.cases - ran.failed} of {ran.cases}**"
        rows.append([name, ran.version, f"{PARTS[name]}: {held} checks hold", f"{len(relied_on)} declarations"])
    run = f"run for real, torch {survey.torch} on a CPU"
    return markdown_table(["framework", "version", run, "compared with its source"], rows)


def _ran(survey: Survey, name: str) -> str:
    ran = survey.ran[name]
    assert ran.version == facts(name)["version"], f"{name}: the survey and the facts are of different versions"
    return "\n".join(map(_line, ran.checks))


def _line(check: Check) -> str:
    cases = f" ({check.cases} cases)" if check.cases > 1 else ""
    return f"* {check.name}{cases}" + (" **fails**" if check.failed else "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ecosystems.page")
    parser.add_argument("docs", type=Path)
    folder = parser.parse_args().docs
    (folder / "ecosystems.md").write_text(page(load(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
