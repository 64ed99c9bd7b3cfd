"""results.json: what a comparison found, as a versioned schema. A field changes its meaning only with a new version."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moerouters.errors import ConfigError
from moerouters.lab.corpus import CorpusInfo
from moerouters.lab.files import write_text
from moerouters.lab.settings import Settings
from moerouters.registry import Provenance
from moerouters.registry.configs import field_errors


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SavedResults(_Record):
    """A record that lies in a folder as results.json."""

    def save(self, folder: Path) -> None:
        """Write results.json, atomically."""
        write_text(folder / "results.json", self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read results.json; None if there is none, ConfigError if it is damaged or of another schema."""
        path = folder / "results.json"
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            reasons = field_errors(error) if isinstance(error, ValidationError) else [str(error)]
            raise ConfigError(
                f"cannot read the results in '{path}'.",
                why="\n".join(reasons[:5]),
                fix="move the file away, or pass another --output",
            ) from error


class Environment(_Record):
    """Where it ran. Numbers are the same bits only where all of this is the same."""

    moerouters: str
    torch: str
    python: str
    platform: str
    device: str
    threads: int
    ranks: int
    expert_parallel: int = 1
    """Ranks over which the experts of a layer are spread."""
    dispatcher: str | None = None
    """The back-end that brings tokens to them."""
    pipeline: int = 1
    """Ranks over which the layers are spread."""
    schedule: str | None = None
    """Of that pipeline."""
    autocast: str | None
    deterministic: Literal[True] = True


class LayerBalance(_Record):
    """One value per layer, over the training batches; a batch is what one `update` sees."""

    avg_max_vio: tuple[float, ...]
    sup_max_vio: tuple[float, ...]
    min_vio: tuple[float, ...]
    """Of the last step."""
    dead_experts: tuple[int, ...]
    """Experts without a token in the last step."""
    micro_avg_max_vio: tuple[float, ...]
    """Mean over all forward passes, each of which sees one micro-batch."""
    micro_sup_max_vio: tuple[float, ...]


class WorstLayer(_Record):
    """The worst of the layers, each metric for itself."""

    avg_max_vio: float
    sup_max_vio: float
    min_vio: float
    dead_experts: int
    micro_avg_max_vio: float
    micro_sup_max_vio: float


class RunResult(_Record):
    """One router, one config, one seed. The balance metrics are means over layers; `dead_experts` is a sum.

    They are None where a run ended before its first step, `perplexity` where it did not reach its last.
    """

    router: str
    label: str
    config: dict[str, Any]
    """All fields of the router's config, defaults too."""
    seed: int
    status: Literal["completed", "interrupted", "failed"]
    error: str | None = None
    steps: int
    perplexity: float | None
    """exp of the mean cross-entropy per byte of held-out text."""
    bits_per_byte: float | None
    train_loss: float | None
    """Cross-entropy in nats per byte, mean over the last tenth of the steps."""
    avg_max_vio: float | None
    sup_max_vio: float | None
    min_vio: float | None
    dead_experts: int | None
    micro_avg_max_vio: float | None
    micro_sup_max_vio: float | None
    max_vio_global: float | None = None
    """Of the loads over all held-out text; None also in files that are older than the field."""
    worst_layer: WorstLayer | None
    layers: LayerBalance | None
    step_ms: float | None
    """Median over steps."""
    router_share: float | None
    """Part of a step spent in gate and router, forward and update (see moerouters.lab.clock)."""
    parameters: int
    history: str | None
    """Safetensors file beside results.json with loads, losses and times of every step."""
    provenance: Provenance


class SkippedRouter(_Record):
    """A router that is installed and took no part."""

    label: str
    reason: str


class Results(SavedResults):
    """The whole file."""

    schema_version: Literal[1] = 1
    status: Literal["running", "completed", "interrupted", "failed"]
    started: str
    """ISO 8601, UTC."""
    preset: str
    settings: Settings
    corpus: CorpusInfo
    environment: Environment
    runs: tuple[RunResult, ...] = ()
    skipped: tuple[SkippedRouter, ...] = ()

    @property
    def unfinished(self) -> bool:
        """Whether `--resume` has something to continue."""
        return self.status in ("running", "interrupted")


def require_comparable(first: Results, second: Results) -> None:
    """Raise ConfigError unless both were measured on the same text with the same settings."""
    if first.corpus.sha256 != second.corpus.sha256:
        raise ConfigError(
            "these results were measured on different text and are not comparable.",
            where="\n".join(f"{text.name}: sha256 {text.sha256}" for text in (first.corpus, second.corpus)),
            why="perplexity and balance depend on the text",
            fix="run both on the same text: --text PATH",
        )
    ours, theirs = first.settings.model_dump(), second.settings.model_dump()
    # How often a checkpoint is written changes no number.
    differing = [name for name in ours if ours[name] != theirs[name] and name != "checkpoint_every"]
    if differing:
        raise ConfigError(
            "these results were measured with different settings and are not comparable.",
            why="\n".join(f"{name}: {ours[name]} and {theirs[name]}" for name in differing),
            fix="repeat one of them with the settings of the other",
        )


def merge(first: Results, second: Results) -> Results:
    """The runs of both; where both have a run of one label and seed, that of `second`. Raises as require_comparable."""
    require_comparable(first, second)
    runs = {(run.label, run.seed): run for run in (*first.runs, *second.runs)}
    ran = {run.label for run in runs.values()}
    skipped = {item.label: item for item in (*first.skipped, *second.skipped) if item.label not in ran}
    return second.model_copy(
        update={"started": first.started, "runs": tuple(runs.values()), "skipped": tuple(skipped.values())}
    )
