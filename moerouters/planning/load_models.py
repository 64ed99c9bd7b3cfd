"""How tokens are spread over experts, where nobody has measured it at that scale: profiles, and loads of a comparison.

A profile says which share of the pairs each expert can expect in a layer; the pairs of a step are drawn from it. Its
parameter is what makes the largest share (1 + MaxVio) / E.

* uniform: all alike, so that only chance is uneven
* zipf: the share of the r-th expert is proportional to r^-s
* lognormal: ln of the shares has the quantiles of a normal distribution of some deviation
* measured: shares of the steps of a `moerouters compare`; where E is another there, lognormal with its AvgMaxVio
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist, fmean

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from moerouters.errors import ConfigError
from moerouters.lab.history import History
from moerouters.lab.results import Results, RunResult
from moerouters.lab.showcase import Showcase
from moerouters.registry.configs import field_errors

Floats = NDArray[np.float64]
PROFILES = ("uniform", "zipf", "lognormal")
_LOADS = "--load uniform,zipf:max_vio=1,lognormal:max_vio=0.5,results.json"


@dataclass(frozen=True)
class LoadModel:
    """Expected shares of experts, layer by layer."""

    label: str
    profile: str = "uniform"
    max_vio: float = 0.0
    measured: Floats | None = None
    """[steps * layers, E]: shares that were measured; rows of them are drawn where E fits."""

    def shares(self, num_experts: int, num_layers: int, random: np.random.Generator) -> Floats:
        """[L, E], each row adding up to 1; which expert is the hottest differs from layer to layer."""
        if self.measured is not None and self.measured.shape[1] == num_experts:
            return self.measured[random.integers(len(self.measured), size=num_layers)]
        shares_E = profile(self.profile, num_experts, self.max_vio)
        return random.permuted(np.tile(shares_E, (num_layers, 1)), axis=1)


@cache
def profile(kind: str, num_experts: int, max_vio: float) -> Floats:
    """[E]: falling shares of which the largest is (1 + max_vio) / E. Raises ConfigError where no such shares exist."""
    if kind == "uniform" or max_vio == 0:
        return np.full(num_experts, 1 / num_experts)
    if not 0 < max_vio < num_experts - 1:
        raise ConfigError(
            f"MaxVio cannot be {max_vio:g} with {num_experts} experts.",
            where=f"--load {kind}",
            why=f"it lies between 0 and {num_experts - 1}, where one expert gets everything",
            fix=f"--load {kind}:max_vio={min(1.0, (num_experts - 1) / 2):g}",
        )
    ranks = np.arange(1, num_experts + 1)
    normal = NormalDist()
    logs_E = -np.log(ranks) if kind == "zipf" else np.array([-normal.inv_cdf((r - 0.5) / num_experts) for r in ranks])

    def shares(power: float) -> Floats:
        weights_E = np.exp(power * (logs_E - logs_E[0]))
        shares_E: Floats = weights_E / weights_E.sum()
        return shares_E

    return shares(_solve(lambda power: float(shares(power)[0]) * num_experts - 1 - max_vio))


def _solve(rising: Callable[[float], float]) -> float:
    """The root of a rising function that is negative at 0."""
    low, high = 0.0, 1.0
    while rising(high) < 0:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high


def load_models(text: str) -> list[LoadModel]:
    """Of a list such as `uniform,zipf:max_vio=1,results.json`. A results file gives one per completed run, a file
    named `results.json:bip` that of one router. Raises ConfigError."""
    found: list[LoadModel] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        file = re.fullmatch(r"(.+?\.json)(?::(.+))?", item)
        found += [_profiled(item)] if file is None else _measured(Path(file[1]), wanted=file[2] or "")
    if not found:
        raise ConfigError("--load names no load.", why="the list is empty", fix=_LOADS)
    return found


def _profiled(item: str) -> LoadModel:
    name, _, rest = item.partition(":")
    try:
        max_vio = float(rest.removeprefix("max_vio=")) if rest else None
    except ValueError:
        max_vio = -1.0
    if name not in PROFILES or (name == "uniform") != (max_vio is None) or not 0 <= (max_vio or 0) < float("inf"):
        raise ConfigError(
            f"cannot read the load {item!r}.",
            where="--load",
            why="there is uniform, zipf and lognormal with a max_vio, and results.json of a comparison",
            fix=_LOADS,
        )
    return LoadModel(item, name, max_vio or 0.0)


def _measured(path: Path, *, wanted: str) -> list[LoadModel]:
    runs, folder = _runs(path)
    chosen = [run for run in runs if run.status == "completed" and wanted in ("", run.label)]
    if not chosen:
        raise ConfigError(
            f"there is no load '{path}{':' if wanted else ''}{wanted}'.",
            where="--load",
            why=f"there is: {', '.join(PROFILES)}, and completed runs of the file: "
            f"{', '.join(dict.fromkeys(run.label for run in runs)) or 'none'}",
            fix="name one of these",
        )
    labels = dict.fromkeys(run.label for run in chosen)
    return [_of_seeds([run for run in chosen if run.label == label], folder) for label in labels]


def _of_seeds(runs: Sequence[RunResult], folder: Path) -> LoadModel:
    """The runs of one router: their mean AvgMaxVio, and every row of loads that lies beside them."""
    files = [folder / run.history for run in runs if run.history is not None and (folder / run.history).exists()]
    measured = None
    if files:
        loads_RE = np.concatenate([History.load(file).loads.stacked().flatten(0, 1).numpy() for file in files])
        measured = loads_RE / np.maximum(loads_RE.sum(axis=1, keepdims=True), 1)
    return LoadModel(runs[0].label, "lognormal", fmean(run.avg_max_vio or 0.0 for run in runs), measured)


def _runs(path: Path) -> tuple[tuple[RunResult, ...], Path]:
    """Of results.json, or of the smaller file that a README's picture is drawn from."""
    try:
        data = path.read_bytes()
        kind: type[BaseModel] = Showcase if b'"max_vio":' in data and b'"results":' in data else Results
        read = kind.model_validate_json(data)
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"there is no load '{path}'.",
            where="--load",
            why="\n".join(field_errors(error)[:5])
            if isinstance(error, ValidationError)
            else f"it is none of {', '.join(PROFILES)}, and as a file: {error.strerror}",
            fix="pass the results.json of `moerouters compare`",
        ) from error
    results = read.results if isinstance(read, Showcase) else read
    assert isinstance(results, Results)
    return results.runs, path.parent
