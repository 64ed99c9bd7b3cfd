"""A comparison small enough for tests: seconds for a whole job, and every part of a large one in it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moerouters import RouteContext, Routing
from moerouters.lab.compare import Comparison
from moerouters.lab.corpus import Corpus, from_path
from moerouters.lab.history import History
from moerouters.lab.interrupt import StopRequest
from moerouters.lab.results import Results, RunResult
from moerouters.lab.roster import Entrant, named_roster
from moerouters.lab.settings import Settings
from moerouters.lab.train import Trainer
from moerouters.registry import RouterSpec
from support.balanced import Balanced

SMALL = Settings(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    num_experts=4,
    top_k=2,
    expert_size=8,
    shared_size=8,
    sequence_length=8,
    micro_batch_size=2,
    accumulation_steps=2,
    steps=6,
    learning_rate=1e-2,
    warmup_steps=2,
    validation_sequences=6,
    checkpoint_every=2,
)

BALANCED = RouterSpec(
    name="balanced",
    summary="Switch loss and sign rule.",
    factory=lambda gating, config: Balanced(gating),
    capabilities=Balanced.capabilities,
    api="0.1",
)

CPU = torch.device("cpu")


def write_text(folder: Path) -> Path:
    """A folder of text with a few files of different sizes; returns it."""
    for number in range(6):
        words = [f"{word * word} and {word}" for word in range(number, 40 + 9 * number)]
        path = folder / "text" / f"part{number}" / "words.txt"
        path.parent.mkdir(parents=True)
        path.write_text(", ".join(words), encoding="utf-8")
    return folder / "text"


def small_corpus(folder: Path) -> Corpus:
    """What `write_text` writes, as a corpus."""
    return from_path(write_text(folder))


def arguments(settings: Settings = SMALL) -> list[str]:
    """The settings as options of `moerouters compare`."""
    return [part for name, value in settings.model_dump().items() for part in ("--set", f"{name}={json.dumps(value)}")]


def entrant(item: str = "topk", settings: Settings = SMALL) -> Entrant:
    """The one router of a list."""
    return named_roster(item, settings)[0]


def trainer(corpus: Corpus, item: str = "topk", *, settings: Settings = SMALL, seed: int = 0, **more: Any) -> Trainer:
    """A fresh trainer on the CPU."""
    return Trainer(entrant(item, settings), seed=seed, settings=settings, corpus=corpus, device=CPU, **more)


class Listener:
    """Remembers what it is told; `at_step(history)` may act."""

    def __init__(self, at_step: Any = lambda history: None) -> None:
        self.started: list[tuple[str, int, int]] = []
        self.ended: list[RunResult] = []
        self.stepped = at_step

    def run_started(self, entrant: Entrant, seed: int, *, step: int) -> None:
        self.started.append((entrant.label, seed, step))

    def run_ended(self, result: RunResult) -> None:
        self.ended.append(result)


def run_comparison(
    output: Path,
    corpus: Corpus,
    items: str = "topk",
    *,
    settings: Settings = SMALL,
    listener: Listener | None = None,
    stop: StopRequest | None = None,
    seeds: tuple[int, ...] = (0,),
    **more: Any,
) -> Results:
    """Check and run a comparison."""
    comparison = Comparison(
        entrants=named_roster(items, settings),
        seeds=seeds,
        preset="tiny",
        settings=settings,
        corpus=corpus,
        device=CPU,
        output=output,
        **more,
    )
    comparison.check()
    return comparison.run(listener or Listener(), stop or StopRequest())


def timeless(results: Results) -> list[dict[str, Any]]:
    """The runs without what differs between two runs of the same: times."""
    return [run.model_dump(exclude={"step_ms", "router_share"}) for run in results.runs]


def history_of(steps: int = 5, *, layers: int = 2, experts: int = 4, seed: int = 0) -> History:
    """A made-up history with 40 routed pairs a step and layer."""
    generator = torch.Generator().manual_seed(seed)
    history = History()
    for step in range(steps):
        ids = torch.randint(experts, (layers, 40), generator=generator)
        history.loads.append(torch.stack([row.bincount(minlength=experts) for row in ids]))
        history.micro_max_vio.append(torch.rand(2, layers, generator=generator, dtype=torch.float64))
        history.train_loss.append(torch.tensor(5.0 / (step + 1), dtype=torch.float64))
        history.step_ms.append(torch.tensor(100.0 if step < 3 else 10.0, dtype=torch.float64))
        history.router_ms.append(torch.tensor(2.0, dtype=torch.float64))
    return history


class Even(Balanced):
    """The sign rule alone: an aux loss is one of the tokens of a rank, and is not the same on other slices."""

    def losses(self, routing: Routing, ctx: RouteContext) -> dict[str, Tensor]:
        return {}


class Straying(Even):
    """Breaks the contract: its state depends on the rank."""

    def update(self, stats: Mapping[str, Tensor]) -> None:
        self.b_E.add_(float(os.environ.get("RANK", "0")))


EVEN = BALANCED.model_copy(update={"name": "even", "factory": lambda gating, config: Even(gating)})
STRAYING = BALANCED.model_copy(update={"name": "straying", "factory": lambda gating, config: Straying(gating)})
