"""docs/models.md from docs/benchmarks/models.json, which the survey wrote.

    python -m tests.swap.survey_page docs

Needs neither torch nor transformers, so `make docs` runs it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

ROUTERS = ("topk", "loss-controlled", "bip", "loss-free")


class Verdict(BaseModel):
    """Whether something holds; None where it does not apply. Unless it holds, `why` says what stands against it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    holds: bool | None
    why: str = ""

    def __str__(self) -> str:
        return {True: "yes", False: "**no**", None: "-"}[self.holds]


class Row(BaseModel):
    """What holds for one router class of transformers, seen in a tiny model that runs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    router: str
    """The class that chooses experts."""
    architecture: str
    """The folder of its model in transformers."""
    model: str = ""
    gating: str = ""
    """As read from the first router of the class."""
    modules: int = 0
    """Routers of this class in the model, of which so many were found and swapped."""
    found: int = 0
    swapped: int = 0
    exact: dict[str, Verdict] = {}
    """By what the model runs in: float32, bfloat16, and float32 in training mode."""
    trained: dict[str, Verdict] = {}
    """By router plug-in."""
    generated: Verdict | None = None
    checkpoint: Verdict | None = None
    reason: str = ""
    """Why the class is refused."""

    @property
    def proven(self) -> bool:
        """Found, swapped and bit-identical wherever the stock model runs."""
        complete = self.modules == self.found == self.swapped > 0
        return complete and bool(self.exact) and all(verdict.holds is not False for verdict in self.exact.values())

    def verdicts(self) -> Iterator[tuple[str, Verdict]]:
        """Everything that was tried, by name."""
        yield from ((f"exact in {name}", verdict) for name, verdict in self.exact.items())
        yield from ((f"trained with {name}", verdict) for name, verdict in self.trained.items())
        yield from (("generated", self.generated),) if self.generated else ()
        yield from (("checkpoint", self.checkpoint),) if self.checkpoint else ()


class Survey(BaseModel):
    """docs/benchmarks/models.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transformers: str
    torch: str
    rows: tuple[Row, ...]

    def row(self, router: str) -> Row | None:
        """That of a router class."""
        return next((row for row in self.rows if row.router == router), None)


def read(folder: Path) -> Survey:
    """The committed survey."""
    return Survey.model_validate_json((folder / "benchmarks" / "models.json").read_bytes())


def write(folder: Path, survey: Survey) -> None:
    """Write the survey and its page."""
    text = survey.model_dump_json(indent=1, exclude_defaults=True)
    (folder / "benchmarks" / "models.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / "models.md").write_text(page(survey), encoding="utf-8")


INTRODUCTION = """# Models of Hugging Face whose router can be swapped

`moerouters.swap(model, "bip")` gives the choice of experts to another router, after proving that the stock router was
understood. This page is generated (`make docs-models`): a test finds every class of transformers {transformers}
(torch {torch}) that chooses experts, builds a tiny random model around it, and tries what the columns say.
{proven} of {classes} classes are proven.

* **gating**: what was read from the stock router of the tiny model; sizes and options are those of its config.
* **swapped**: routers of the class, of those in the model.
* **exact**: with `topk` in the stock router's place all outputs keep their bits - logits, hidden states, router logits,
  losses - for a padded batch, in float32 (eval and training mode) and in bfloat16.
* **trained**, by router: two optimizer steps; gates move, biases learn, valid tokens count K times and padding never.
* **generated**: greedy decoding with a cache gives the same tokens and logits under `topk`.
* **checkpoint**: saved after training with `loss-free`, loaded in stock transformers; no tensor missing or left over.
  Where the gating adds a tensor "to choose", the stock model has the logits of the balanced one; else of the unswapped.

A dash: the stock model cannot do it either, or it does not apply. What is no yes has its reason below the table. CI
tries transformers {oldest} as well; all of 5 is accepted, as every swap is proven on the model at hand."""

OLDEST = "5.21.1"
"""The oldest release that CI tries."""


def page(survey: Survey) -> str:
    """docs/models.md."""
    proven = sum(row.proven for row in survey.rows)
    text = INTRODUCTION.format(
        transformers=survey.transformers,
        torch=survey.torch,
        classes=len(survey.rows),
        proven=proven,
        oldest=OLDEST,
    )
    head = ("architecture", "router class", "gating as read", "swapped", "exact", *(f"`{name}`" for name in ROUTERS))
    lines = [text, "", *_table((*head, "generated", "checkpoint"), map(_cells, survey.rows))]
    lines += ["", "## Refused", ""]
    lines += [f"* `{row.router}` ({row.architecture}): {row.reason}." for row in survey.rows if row.reason]
    lines += ["", "## Everything else that is not a yes", ""]
    rest = [
        f"* `{row.router}`, {name}: {verdict.why}."
        for row in survey.rows
        for name, verdict in row.verdicts()
        if not verdict.holds
    ]
    return "\n".join([*lines, *(rest or ["Nothing."]), ""])


def _cells(row: Row) -> tuple[str, ...]:
    exact = str(Verdict(holds=None)) if row.reason else str(Verdict(holds=row.proven))
    after = (row.generated, row.checkpoint)
    return (
        row.architecture,
        f"`{row.router}`",
        row.gating or "refused",
        f"{row.swapped} of {row.modules}" if row.modules else "-",
        exact,
        *(str(row.trained.get(name, Verdict(holds=None))) for name in ROUTERS),
        *(str(verdict or Verdict(holds=None)) for verdict in after),
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def main() -> None:
    """Write the page anew."""
    parser = argparse.ArgumentParser(prog="python -m tests.swap.survey_page")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "models.md").write_text(page(read(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
