"""A history of loads: tokens per layer, step and expert, from whatever file knows them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moerouters.errors import ConfigError
from moerouters.registry.configs import field_errors

STEPS = 32
"""Batches that a recorded text is split in, unless somebody asks for others."""

Loads = NDArray[np.int64]
_COLUMNS = ("layer", "step", "expert", "load")


@dataclass(frozen=True, kw_only=True)
class LoadHistory:
    """The loads of S steps, the same for all layers."""

    layers: Mapping[str, Loads]
    """By name, int64 [S, E]."""
    source: str = ""
    """Where they are from, for people."""

    def __post_init__(self) -> None:
        steps = {len(loads_SE) for loads_SE in self.layers.values()}
        wrong = [name for name, loads_SE in self.layers.items() if loads_SE.ndim != 2 or (loads_SE < 0).any()]
        if not self.layers or wrong or len(steps) != 1 or not any(each.sum() for each in self.layers.values()):
            raise ConfigError(
                "these are no loads.",
                where=self.source,
                why=f"every layer has a row of counts for each step, and somewhere a token; here layers have "
                f"{sorted(steps)} steps" + (f", and {wrong[0]!r} has no or negative counts" if wrong else ""),
                fix="see `moerouters place --help` for the files it reads",
            )

    @property
    def steps(self) -> int:
        return len(next(iter(self.layers.values())))

    def part(self, steps: slice) -> LoadHistory:
        """Some of the steps."""
        return LoadHistory(layers={name: each[steps] for name, each in self.layers.items()}, source=self.source)


class LoadFile(BaseModel):
    """Loads as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["moerouters.loads/1"] = Field(alias="schema")
    layers: dict[str, list[list[int]]]
    """By layer, then by step, tokens of each expert."""


def read_loads(path: Path, *, steps: int | None = None) -> LoadHistory:
    """Loads from a trace of `moerouters trace`, a history of `moerouters compare`, a RoutingTrace (all safetensors),
    a JSON file of the schema moerouters.loads/1, or CSV with the columns layer, step, expert, load.

    steps: in how many batches the tokens of a trace are split, default 32; other files have steps of their own. Raises
    ConfigError or TraceError for a file that is none of these.
    """
    read = {".safetensors": _of_tensors, ".json": _of_json, ".csv": _of_csv}.get(path.suffix)
    if read is None:
        raise ConfigError(
            f"'{path}' is no file of loads.",
            why="it ends neither in .safetensors nor in .json or .csv",
            fix="rename it",
        )
    if not path.is_file():
        raise ConfigError(f"there is no file '{path}'.", fix="record one with `moerouters trace`")
    return read(path, steps)


def _of_tensors(path: Path, steps: int | None) -> LoadHistory:
    try:
        with safe_open(path, framework="pt") as file:
            schema = (file.metadata() or {}).get("schema")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read '{path}'.", why=str(error), fix="record it again") from error
    match schema:
        case "moerouters.logits/1":
            return _of_logits(path, steps)
        case "moerouters.trace/1":
            return _of_routing(path, steps)
        case "moerouters.history/1":
            return _of_history(path, steps)
    raise ConfigError(
        f"'{path}' holds no loads.",
        why=f"its schema is {schema!r}",
        fix="pass what `moerouters trace`, RoutingTrace.save or `moerouters compare` (runs/*/history) wrote",
    )


def _of_logits(path: Path, steps: int | None) -> LoadHistory:
    """Where the model's own gating sends the tokens that were recorded."""
    from moerouters.inspecting.logits_trace import LogitsTrace
    from moerouters.inspecting.offline_routers import PLAIN

    trace = LogitsTrace.load(path)
    layers = {}
    with torch.no_grad():
        for name, layer in trace.layers.items():
            router = PLAIN.build(layer).eval()
            logits = _split(layer.logits_TE, steps, path)
            layers[name] = np.stack([router(logits_TE).load_E.numpy() for logits_TE in logits])
    about = f"{trace.about.model or path.name}" + (f" on {trace.about.text}" if trace.about.text else "")
    return LoadHistory(layers=layers, source=f"{about}, {trace.tokens} tokens")


def _of_routing(path: Path, steps: int | None) -> LoadHistory:
    from moerouters.trace import RoutingTrace

    trace = RoutingTrace.load(path)
    layers = {}
    for name, ids_TK in trace.expert_ids.items():
        E = trace.num_experts[name]
        parts = _split(ids_TK.to(torch.int64), steps, path)
        layers[name] = np.stack([torch.bincount(ids.reshape(-1), minlength=E + 1)[:E].numpy() for ids in parts])
    return LoadHistory(layers=layers, source=path.name)


def _of_history(path: Path, steps: int | None) -> LoadHistory:
    from moerouters.lab.history import History

    _refuse_steps(path, steps)
    loads = History.load(path).loads
    if not loads:
        raise ConfigError(f"'{path}' holds no step.", why="its run ended before the first", fix="take another run's")
    loads_SLE = loads.stacked().numpy()
    return LoadHistory(layers={str(n): loads_SLE[:, n] for n in range(loads_SLE.shape[1])}, source=path.name)


def _of_json(path: Path, steps: int | None) -> LoadHistory:
    _refuse_steps(path, steps)
    try:
        read = LoadFile.model_validate_json(path.read_bytes())
        layers = {name: np.array(rows, dtype=np.int64) for name, rows in read.layers.items()}
    except ValueError as error:
        why = "\n".join(field_errors(error)[:5]) if isinstance(error, ValidationError) else "rows differ in length"
        raise ConfigError(f"cannot read loads from '{path}'.", why=why, fix=_JSON) from error
    return LoadHistory(layers=layers, source=path.name)


def _of_csv(path: Path, steps: int | None) -> LoadHistory:
    _refuse_steps(path, steps)
    found: dict[str, dict[tuple[int, int], int]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for number, row in enumerate(reader, 2):
            try:
                step, expert, load = (int(row[column]) for column in _COLUMNS[1:])
                cells = found.setdefault(row["layer"], {})
                if step < 0 or expert < 0 or (step, expert) in cells:
                    raise ValueError("a step and expert stand once, numbered from 0")
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"cannot read loads from '{path}'.",
                    where=f"line {number}",
                    why=f"missing column {error}" if isinstance(error, KeyError) else str(error),
                    fix=f"a header and rows of {', '.join(_COLUMNS)}; what is left out is 0",
                ) from error
            cells[step, expert] = load
    num_steps = 1 + max((step for cells in found.values() for step, _ in cells), default=0)
    return LoadHistory(layers={name: _table(cells, num_steps) for name, cells in found.items()}, source=path.name)


def _table(cells: Mapping[tuple[int, int], int], num_steps: int) -> Loads:
    loads_SE = np.zeros((num_steps, 1 + max(expert for _, expert in cells)), dtype=np.int64)
    for place, load in cells.items():
        loads_SE[place] = load
    return loads_SE


def _split(rows: Tensor, steps: int | None, path: Path) -> Sequence[Tensor]:
    steps = min(STEPS, len(rows)) if steps is None else steps
    if not 1 <= steps <= len(rows):
        raise ConfigError(
            f"{len(rows)} tokens cannot be split in {steps} steps.",
            where=str(path),
            why="every step needs a token",
            fix="take fewer --steps, or record more tokens",
        )
    return torch.tensor_split(rows, steps)


def _refuse_steps(path: Path, steps: int | None) -> None:
    if steps is not None:
        raise ConfigError(f"'{path}' has steps of its own.", where="--steps", fix="leave the option out")


def dump_loads(history: LoadHistory) -> str:
    """The history as JSON of the schema that `read_loads` reads."""
    layers = {name: loads_SE.tolist() for name, loads_SE in history.layers.items()}
    return json.dumps({"schema": "moerouters.loads/1", "layers": layers})


_JSON = '{"schema": "moerouters.loads/1", "layers": {"NAME": [[tokens of each expert], ... for each step]}}'
