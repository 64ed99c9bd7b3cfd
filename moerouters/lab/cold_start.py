"""From a cold start on skewed scores: how fast does each router balance, and what does that cost?

The gate does not learn: logits_TE = x_TD @ w_DE + skew * z_E, with x and z standard normal and w ~ N(0, 1 / D); every
step draws new tokens x, while w and the popularity z stay. So a router that balances by a loss alone shows what plain
top-k does: its loss would have to move the gate.

    python -m moerouters.lab.cold_start record docs/benchmarks/cold-start.json --machine "2 cores of ..."
    python -m moerouters.lab.cold_start render docs/benchmarks/cold-start.json docs/images/cold-start.svg
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moerouters import registry
from moerouters.capabilities import StateAlgebra
from moerouters.gating import Gating
from moerouters.lab.files import write_text
from moerouters.lab.overrides import parse_routers
from moerouters.lab.showcase import fingerprint
from moerouters.metrics import max_violation
from moerouters.router import Router
from moerouters.types import Assignment, RouteContext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "topk"


class Recipe(BaseModel):
    """What is routed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(default=4096, ge=1)
    sequences: int = Field(default=8, ge=1)
    num_experts: int = Field(default=64, ge=1)
    top_k: int = Field(default=8, ge=1)
    width: int = Field(default=64, ge=1)
    """D."""
    skew: float = 1.0
    steps: int = Field(default=60, ge=1)
    seed: int = 0
    vocabulary: int = Field(default=32768, ge=1)
    """Token ids follow Zipf's law over that many; only routers that look at ids see them."""

    def router(self, name: str, config: Mapping[str, Any]) -> Router:
        """In train mode, under softmax and top-k, what most open models have, or under what its method prescribes."""
        gating = Gating.of(self.num_experts, self.top_k, **registry.info(name).spec.gating)
        return registry.build(name, gating, config=config).train()

    def batches(self) -> Iterator[Batch]:
        """`steps` training batches, and one more."""
        generator = torch.Generator().manual_seed(self.seed)
        w_DE = torch.randn(self.width, self.num_experts, generator=generator) / self.width**0.5
        z_E = torch.randn(self.num_experts, generator=generator)
        frequencies = 1 / torch.arange(1, self.vocabulary + 1, dtype=torch.float64)
        sequence_ids_T = torch.arange(self.tokens) * self.sequences // self.tokens
        for step in range(self.steps + 1):
            x_TD = torch.randn(self.tokens, self.width, generator=generator)
            token_ids_T = torch.multinomial(frequencies, self.tokens, replacement=True, generator=generator)
            ctx = RouteContext(
                hidden_TD=x_TD,
                token_ids_T=token_ids_T,
                sequence_ids_T=sequence_ids_T,
                num_sequences=self.sequences,
                noise_key=torch.tensor([self.seed, step]),
            )
            yield Batch(x_TD @ w_DE + self.skew * z_E, ctx)


@dataclass(frozen=True)
class Batch:
    """What a router gets."""

    logits_TE: Tensor
    ctx: RouteContext


class RouterStart(BaseModel):
    """One router, over all steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    max_vio: tuple[float, ...]
    """Of every training batch, with an update after each."""
    eval_max_vio: float
    """Of one more batch, in eval mode."""
    experts_per_token: float
    """In the last step; K for routers that always take K."""
    kept_score: float
    """In the last step: mean softmax score of the chosen pairs, over that of plain top-k."""
    ms: float
    """Of a forward in training mode and the update after it, median over the steps, one thread."""
    relative_ms: float
    """The same over plain top-k's."""


class ColdStart(BaseModel):
    """The committed result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    machine: str
    recipe: Recipe
    routers: tuple[RouterStart, ...]


@torch.no_grad()
def run(recipe: Recipe, routers: str, *, machine: str = "") -> ColdStart:
    """Route the same batches by each of `routers` (as in `compare --routers`); top-k always takes part."""
    named = {label: (name, changes) for label, name, changes in parse_routers(f"{BASELINE},{routers}")}
    runs = {label: _Run(recipe.router(name, changes)) for label, (name, changes) in named.items()}
    order = list(runs)
    for step, batch in enumerate(recipe.batches()):
        if step == recipe.steps:
            return ColdStart(
                machine=machine,
                recipe=recipe,
                routers=tuple(each.result(label, batch, runs[BASELINE]) for label, each in runs.items()),
            )
        turn = step % len(order)
        for label in order[turn:] + order[:turn]:  # nobody is always first
            runs[label].step(batch)
    raise AssertionError("there is always one batch more")


class _Run:
    """One router on the way."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.max_vio: list[float] = []
        self.ms: list[float] = []
        self.pairs = 0
        self.score = 0.0
        """Mean score of the chosen pairs of the latest step."""

    def step(self, batch: Batch) -> None:
        if not self.ms:
            self.router(batch.logits_TE, batch.ctx)  # allocators and caches
        start = time.perf_counter()
        assignment: Assignment = self.router(batch.logits_TE, batch.ctx)
        if assignment.stats and self.router.capabilities.state is not StateAlgebra.STATELESS:
            self.router.update(assignment.stats)
        self.ms.append(1e3 * (time.perf_counter() - start))
        self.max_vio.append(float(max_violation(assignment.load_E)))
        token_ids_N, expert_ids_N, _ = assignment.pairs()
        real_N = expert_ids_N < assignment.num_experts
        chosen_N = batch.logits_TE.softmax(dim=-1)[token_ids_N[real_N], expert_ids_N[real_N]]
        self.pairs, self.score = chosen_N.numel(), float(chosen_N.double().mean())

    def result(self, label: str, after: Batch, baseline: _Run) -> RouterStart:
        served = self.router.eval()(after.logits_TE, after.ctx)
        ms = _median(self.ms)
        return RouterStart(
            label=label,
            max_vio=tuple(round(value, 4) for value in self.max_vio),
            eval_max_vio=round(float(max_violation(served.load_E)), 4),
            experts_per_token=round(self.pairs / after.logits_TE.shape[0], 3),
            kept_score=round(self.score / baseline.score, 4),
            ms=round(ms, 3),
            relative_ms=round(ms / _median(baseline.ms), 2),
        )


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def draw(start: ColdStart) -> Figure:
    """MaxVio per step on a log scale, a line per router."""
    from matplotlib.figure import Figure

    from moerouters.lab.pictures import line_style

    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    axes = figure.subplots()
    # A perfect batch has MaxVio 0, which a log scale cannot show: it is drawn below one token too many.
    smallest = start.recipe.num_experts / (start.recipe.tokens * start.recipe.top_k)
    for index, router in enumerate(start.routers):
        colour, style = line_style(index)
        curve = [max(value, smallest / 2) for value in router.max_vio]
        axes.plot(range(1, len(curve) + 1), curve, color=colour, linestyle=style, linewidth=1.6, label=router.label)
    axes.set(yscale="log", xlabel="step", ylabel="MaxVio")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.01)
    figure.legend(loc="outside right upper")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """The two commands of the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m moerouters.lab.cold_start")
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("json", type=Path)
    recording.add_argument("--machine", required=True)
    recording.add_argument("--routers", help="as in `moerouters compare`; default: all that are installed")
    recording.add_argument("--steps", type=int, default=Recipe().steps)
    rendering = commands.add_parser("render")
    rendering.add_argument("json", type=Path)
    rendering.add_argument("svg", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "record":
        torch.set_num_threads(1)
        routers = options.routers or ",".join(registry.available())
        start = run(Recipe(steps=options.steps), routers, machine=options.machine)
        write_text(options.json, start.model_dump_json() + "\n")
        return
    import matplotlib

    from moerouters.lab.pictures import STYLE

    data = options.json.read_bytes()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "moerouters"}):
        options.svg.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Description": fingerprint(data)}
        draw(ColdStart.model_validate_json(data)).savefig(
            options.svg, format="svg", bbox_inches="tight", metadata=metadata
        )


if __name__ == "__main__":
    main()
