"""Evaluate routers offline: route the recorded logits of a model, with an update after every batch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moerouters.capabilities import StateAlgebra
from moerouters.errors import ConfigError
from moerouters.inspecting.logits_trace import LayerLogits, LogitsTrace
from moerouters.inspecting.offline_report import LayerOffline, OfflineReport, RouterOffline
from moerouters.inspecting.offline_routers import BASELINE, PLAIN, Chosen
from moerouters.metrics import RunBalance, max_violation
from moerouters.router import Router
from moerouters.swapping.gating import ModelGating
from moerouters.types import Assignment, RouteContext

STEPS = 32
"""Batches that a trace is split in, unless somebody asks for others."""


def default_steps(trace: LogitsTrace) -> int:
    """STEPS, or as many as there are tokens."""
    return min(STEPS, *(layer.logits_TE.shape[0] for layer in trace.layers.values()))


@torch.no_grad()
def evaluate(
    trace: LogitsTrace, routers: Sequence[Chosen], *, steps: int, device: torch.device | str = "cpu"
) -> OfflineReport:
    """Split the tokens in `steps` batches and let every router route them in train mode, as in a training that does not
    change the gate. Raises ConfigError for fewer tokens than steps."""
    fewest = min(layer.logits_TE.shape[0] for layer in trace.layers.values())
    if not 1 <= steps <= fewest:
        raise ConfigError(
            f"{fewest} tokens cannot be split in {steps} steps.",
            where="--steps",
            why="every step needs a token",
            fix="take fewer steps, or record more tokens",
        )
    device = torch.device(device)
    # topk always runs: it is what the others are measured against.
    plain = next((each for each in routers if each.name == BASELINE and not each.overrides), PLAIN)
    everyone = {each.label: each for each in (*routers, plain)}
    times: dict[str, Tensor] = {label: torch.zeros(steps, dtype=torch.float64) for label in everyone}
    layers: dict[str, list[LayerOffline]] = {label: [] for label in everyone}
    for number, (name, layer) in enumerate(trace.layers.items()):
        runs = {label: _Run(each.build(layer, device), device) for label, each in everyone.items()}
        for step, place in enumerate(_places(layer, steps)):
            logits_TE, ctx = layer.logits_TE[place].to(device), _context(trace, layer, place, (step, number), device)
            labels = list(everyone)
            turn = step % len(labels)
            for label in labels[turn:] + labels[:turn]:  # nobody is always first
                times[label][step] += runs[label].step(logits_TE, ctx, warm=step > 0)
            gating = runs[plain.label].router.gating
            assert isinstance(gating, ModelGating)
            scores_TE = _scores(gating, logits_TE)
            for run in runs.values():
                run.measure(scores_TE, runs[plain.label].chosen_TE)
        for label, run in runs.items():
            layers[label].append(run.result(name, runs[plain.label]))
    baseline_ms = float(times[plain.label].median())
    return OfflineReport(
        recorded=trace.about,
        tokens=trace.tokens,
        steps=steps,
        routers=tuple(
            RouterOffline(
                label=each.label,
                name=each.name,
                overrides=dict(each.overrides),
                **_means(layers[each.label]),
                step_ms=float(times[each.label].median()),
                relative_time=float(times[each.label].median()) / baseline_ms,
                layers=tuple(layers[each.label]),
            )
            for each in routers
        ),
    )


class _Run:
    """One router in one layer, over the steps."""

    def __init__(self, router: Router, device: torch.device) -> None:
        self.router = router
        self.chosen_TE = torch.empty(0)
        """bool: the choice of the last step."""
        self._device = device
        self._loads: list[Tensor] = []
        self._score = self._changed = self._pairs = 0.0

    def step(self, logits_TE: Tensor, ctx: RouteContext, *, warm: bool) -> float:
        """Route and update; returns the milliseconds. The first time it is done once before, for allocators."""
        if not warm:
            self.router(logits_TE, ctx)
        start = self._now()
        assignment: Assignment = self.router(logits_TE, ctx)
        if assignment.stats and self.router.capabilities.state is not StateAlgebra.STATELESS:
            self.router.update(assignment.stats)
        spent = 1e3 * (self._now() - start)
        token_ids_N, expert_ids_N, _ = assignment.pairs()
        chosen = torch.zeros(assignment.num_tokens, assignment.num_experts + 1, dtype=torch.bool, device=self._device)
        chosen[token_ids_N, expert_ids_N] = True
        self.chosen_TE = chosen[:, :-1]
        self._loads.append(assignment.load_E.cpu())
        return spent

    def measure(self, scores_TE: Tensor, plain_TE: Tensor) -> None:
        """Compare the last choice with that of plain topk."""
        self._score += float(scores_TE[self.chosen_TE].sum())
        self._changed += int((self.chosen_TE & ~plain_TE).sum())
        self._pairs += int(self.chosen_TE.sum())

    def result(self, name: str, plain: _Run) -> LayerOffline:
        loads_SLE = torch.stack(self._loads).unsqueeze(1)
        balance = RunBalance.of(loads_SLE)
        return LayerOffline(
            name=name,
            avg_max_vio=balance.avg_max_vio[0],
            sup_max_vio=balance.sup_max_vio[0],
            last_max_vio=float(max_violation(loads_SLE[-1, 0])),
            kept_score=self._score / plain._score if plain._score else 1.0,
            changed=self._changed / max(self._pairs, 1),
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _scores(gating: ModelGating, logits_TE: Tensor) -> Tensor:
    """float64 [T, E], what a choice keeps of; logits as scores may be negative, and their softmax is taken."""
    prepared_TE = gating.prepare(logits_TE)
    identity = gating.reading.score == "identity"
    return (prepared_TE.softmax(dim=-1) if identity else gating.score(prepared_TE)).double()


def _places(layer: LayerLogits, steps: int) -> Iterator[slice]:
    """The batches: neighbouring tokens, the same number of them or one more."""
    for tokens in torch.arange(layer.logits_TE.shape[0]).tensor_split(steps):
        yield slice(int(tokens[0]), int(tokens[-1]) + 1)


def _context(
    trace: LogitsTrace, layer: LayerLogits, place: slice, key: tuple[int, int], device: torch.device
) -> RouteContext:
    noise_key = torch.tensor(key, device=device)
    if layer.logits_TE.shape[0] != trace.tokens:  # whose tokens these are is not known
        return RouteContext(noise_key=noise_key)
    sequence_ids_T, sequences = None, None
    if trace.sequence_ids_T is not None:
        sequence_ids_T = (trace.sequence_ids_T[place] - trace.sequence_ids_T[place.start]).to(device)
        sequences = int(sequence_ids_T[-1]) + 1
    return RouteContext(
        sequence_ids_T=sequence_ids_T,
        num_sequences=sequences,
        token_ids_T=None if trace.token_ids_T is None else trace.token_ids_T[place].to(device),
        noise_key=noise_key,
    )


def _means(layers: Sequence[LayerOffline]) -> dict[str, float]:
    names = ("avg_max_vio", "sup_max_vio", "last_max_vio", "kept_score", "changed")
    return {name: sum(getattr(layer, name) for layer in layers) / len(layers) for name in names}
