"""results.json of a study, as a versioned schema. A field changes its meaning only with a new version."""

from __future__ import annotations

from typing import Literal

from moerouters.bench.timing import Ratio
from moerouters.errors import ConfigError
from moerouters.lab.corpus import CorpusInfo
from moerouters.lab.results import Environment, SavedResults
from moerouters.lab.settings import Settings
from moerouters.study.matching import Match
from moerouters.study.plan import Plan, Record

PARTS = (
    "attention", "gate", "balance", "dispatch", "experts", "mlp", "combine", "communication", "optimizer", "other",
    "host",
)  # fmt: skip
"""Of a training step, in the order of the report; `mlp` is the dense model's, `host` a GPU's time without a kernel."""


class Step(Record):
    """A training step, timed in turn with all other models."""

    ms: Ratio
    """Median over rounds, with its 95% bootstrap interval."""
    over_partner: Ratio | None
    """Over the dense partner's, within each round; None of a dense model."""


class Anatomy(Record):
    """Where a training step goes, by torch's profiler."""

    parts_ms: dict[str, float]
    """By name of PARTS: forward and backward together, the mean of the profiled steps."""
    step_ms: float
    """Of these steps, by the clock."""
    error: float
    """Sum of the parts over `step_ms`, less 1; at most 5% either way, else there is no Anatomy."""
    slowdown: float
    """`step_ms` over the same step without the profiler, whose own cost falls on parts with many small operations."""


class Inference(Record):
    """Generating, without training: all models in turn."""

    prompt: int
    """Tokens of each sequence before the first one is generated."""
    decoded: int
    sequences: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    parameters_mib: float
    cache_mib: float
    """Keys and values of all sequences at their full length."""
    prefill_peak_mib: float
    """The most that was held at once beside the parameters; the cache is in it."""
    decode_peak_mib: float
    """The same for a step of decoding, where the cache exists already and is not in it."""
    peer: str | None
    """The dense model of nearest perplexity; None of a dense model."""
    prefill_over_peer: Ratio | None
    """Time over the peer's."""
    decode_over_peer: Ratio | None


class ModelResult(Record):
    """One row of the table."""

    name: str
    router: str | None
    partner: str | None
    settings: Settings
    """As it was trained; `steps` follows from the budget."""
    parameters: int
    active_parameters: int
    """That each token meets in training."""
    match: Match | None
    """None of a dense model."""
    step_s: float
    """When the size was searched; budgets and estimates of time follow from it."""
    step: Step | None = None
    """Measured again when everything was trained."""
    anatomy: Anatomy | None = None
    anatomy_failed: str | None = None
    inference: Inference | None = None

    @property
    def tokens(self) -> int:
        """That it is trained on."""
        return self.settings.steps * self.settings.batch_tokens

    def unmeasured(self) -> ModelResult:
        """As it is before anything of the trained model is measured."""
        return self.model_copy(update={"step": None, "anatomy": None, "anatomy_failed": None, "inference": None})


class TrainingRun(Record):
    """One model, one seed. Numbers are None where a run did not reach its last step."""

    model: str
    seed: int
    status: Literal["completed", "interrupted", "failed"]
    error: str | None = None
    steps: int
    perplexity: float | None = None
    """exp of the mean cross-entropy per byte of held-out text, in eval mode."""
    train_loss: float | None = None
    """Cross-entropy in nats per byte, mean over the last tenth of the steps."""
    avg_max_vio: float | None = None
    """MaxVio of the training batches, mean over batches and layers; None of a dense model."""
    seconds: float
    """In training steps."""


class MeshRow(Record):
    """One MoE model over the ranks of a torchrun job, by one layout."""

    model: str
    data: int
    """Groups that hold all experts each."""
    expert: int
    """Ranks of a group, over which its experts are spread."""
    cut: int = 1
    """Ranks that cut each expert."""
    dispatcher: str
    """tensor_sliced is PPMoE's; `local` where every rank has all experts."""
    ms: Ratio
    """A training step of the slowest rank."""
    over_first: Ratio
    """Over that of the first layout, within each round."""
    tokens_per_s: float
    """Of all ranks together."""
    idle: float
    """1 - mean / largest number of rows that a group's ranks have for their experts, mean over layers and first steps:
    the part of its experts' time that the mean rank waits for the slowest."""
    anatomy: Anatomy | None
    """Of the first rank, whose waiting for others is communication."""
    anatomy_failed: str | None = None


class Projected(Record):
    """A layer of one MoE model on a cluster, by formula: a projection, nothing was measured."""

    model: str
    cluster: str
    ranks: int
    backend: str
    load: str
    ms: float
    """Of a layer, forward and backward."""
    idle: float
    dropped: float = 0.0
    """Part of the pairs of token and expert that a capacity takes away; only `padded` has one."""


class StudyResults(SavedResults):
    """The whole file."""

    schema_version: Literal[1] = 1
    status: Literal["running", "completed", "interrupted", "failed"]
    started: str
    """ISO 8601, UTC."""
    plan: Plan
    corpus: CorpusInfo
    environment: Environment
    models: tuple[ModelResult, ...] = ()
    runs: tuple[TrainingRun, ...] = ()
    mesh: tuple[MeshRow, ...] = ()
    projections: tuple[Projected, ...] = ()

    @property
    def unfinished(self) -> bool:
        """Whether `--resume` has something to continue."""
        return self.status in ("running", "interrupted")

    def model(self, name: str) -> ModelResult | None:
        """The one of that name, if it is there."""
        return next((model for model in self.models if model.name == name), None)

    def runs_of(self, name: str) -> dict[int, TrainingRun]:
        """The completed runs of a model, by seed."""
        return {run.seed: run for run in self.runs if run.model == name and run.status == "completed"}

    def with_model(self, model: ModelResult) -> StudyResults:
        """With this model in the place of an earlier one of its name; in the order of the plan."""
        found = {each.name: each for each in (*self.models, model)}
        ordered = tuple(found[spec.name] for spec in self.plan.models if spec.name in found)
        return self.model_copy(update={"models": ordered})

    def with_run(self, run: TrainingRun) -> StudyResults:
        """With this run in the place of an earlier one."""
        found = {(each.model, each.seed): each for each in (*self.runs, run)}
        return self.model_copy(update={"runs": tuple(found.values())})


def require_same(earlier: StudyResults, plan: Plan, corpus: CorpusInfo) -> None:
    """Raise ConfigError unless an earlier study can be continued by this one, which may have more seeds and models."""
    if earlier.corpus.sha256 != corpus.sha256:
        raise ConfigError(
            "the study to resume was begun on other text.",
            where="\n".join(f"{text.name}: sha256 {text.sha256}" for text in (earlier.corpus, corpus)),
            why="its perplexities would not be comparable",
            fix="pass the same --text, or another --output",
        )
    ours, theirs = plan.model_dump(), earlier.plan.model_dump()
    differing = [name for name in ours if ours[name] != theirs[name]]
    if plan.seeds[: len(earlier.plan.seeds)] == earlier.plan.seeds:
        differing = [name for name in differing if name != "seeds"]
    if set(map(str, earlier.plan.models)) <= set(map(str, plan.models)):
        differing = [name for name in differing if name != "models"]
    if differing:
        raise ConfigError(
            "the study to resume was begun with another plan.",
            why="\n".join(f"{name}: {theirs[name]} there, {ours[name]} here" for name in differing),
            fix="repeat the command that was interrupted, with --resume; or pass another --output",
        )
