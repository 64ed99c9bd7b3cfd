"""What a study does: its models, their budget, and how closely step times must agree. Plain data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moerouters.errors import ConfigError
from moerouters.lab.overrides import parse_changes
from moerouters.lab.settings import Settings
from moerouters.registry.configs import field_errors

Knob = Literal["expert_size", "num_layers"]
_OF_A_ROW = ("router", "shared_experts", "knob")
"""What a user can set of a MoE model beside its settings."""


class Record(BaseModel):
    """Base of every record of a study: closed and frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(Record):
    """One row of the table. A dense model stands for itself; a MoE model gets the step time of its dense partner."""

    name: str
    router: str | None = None
    """As an item of `--routers`; None: dense."""
    partner: str | None = None
    """The dense model whose step time it is to have, and whose width, depth and heads it starts from."""
    settings: dict[str, Any] = {}
    """What differs from the study's settings, or from the partner's."""
    shared_experts: int = Field(default=0, ge=0)
    """Experts that see every token, as wide together as so many routed ones."""
    knob: Knob = "expert_size"
    """What the search adjusts."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.router is None) != (self.partner is None):
            raise ValueError(f"model {self.name!r} needs both a router and a partner, or neither")
        return self

    def changed(self, fields: Mapping[str, Any]) -> Self:
        """With other values of some fields. Raises ConfigError for values that cannot be."""
        try:
            return self.model_validate({**self.model_dump(), **fields})
        except ValidationError as error:
            problems = "\n".join(field_errors(error))
            raise ConfigError(
                f"the model {self.name!r} of the study cannot be.", where="--set", why=problems
            ) from error


class Budget(Record):
    """How long a model trains."""

    amount: float = Field(gt=0)
    unit: Literal["tokens_per_parameter", "seconds"] = "tokens_per_parameter"
    """Training tokens for each active parameter; or seconds of training steps."""

    @classmethod
    def parse(cls, text: str) -> Budget:
        """20 (tokens per active parameter) or 90s. Raises ConfigError for anything else."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(s?)\s*", text)
        if found is None or float(found[1]) == 0:
            raise ConfigError(
                f"cannot read the budget {text!r}.",
                where="--budget",
                why="it is a number of tokens per active parameter, or of seconds",
                fix="--budget 20, or --budget 90s",
            )
        return cls(amount=float(found[1]), unit="seconds" if found[2] else "tokens_per_parameter")

    def __str__(self) -> str:
        return f"{self.amount:g} {'seconds' if self.unit == 'seconds' else 'tokens per active parameter'}"

    def steps(self, *, active_parameters: int, batch_tokens: int, step_s: float) -> int:
        """Optimizer steps that come closest to it; at least one."""
        steps = self.amount / step_s
        if self.unit == "tokens_per_parameter":
            steps = self.amount * active_parameters / batch_tokens
        return max(1, round(steps))


class Plan(Record):
    """Everything that decides the numbers of a study."""

    preset: str
    settings: Settings
    """Of all models, as far as they do not say otherwise; `steps` follows from the budget."""
    models: tuple[ModelSpec, ...]
    budget: Budget
    seeds: tuple[int, ...] = Field(min_length=1)
    rounds: int = Field(default=15, ge=5)
    """Interleaved rounds of a timing; up to four times as many where it stays undecided."""
    band: tuple[float, float] = (0.95, 1.05)
    """Where the 95% interval of MoE over dense step time must lie."""
    tries: int = Field(default=8, ge=1)
    """Sizes that the search looks at."""
    multiple: int = Field(default=4, ge=1)
    """Expert widths are multiples of it: matrix products of odd widths are slow."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"two models have one name: {', '.join(names)}")
        dense = {model.name for model in self.models if model.router is None}
        for model in self.models:
            if model.partner is not None and model.partner not in dense:
                raise ValueError(f"the partner {model.partner!r} of {model.name!r} is no dense model of the study")
        return self

    def model(self, name: str) -> ModelSpec:
        """The model of that name."""
        return next(model for model in self.models if model.name == name)

    def settings_of(self, spec: ModelSpec) -> Settings:
        """Of a model before its size is searched; a MoE model starts with the active width of its partner's MLP."""
        if spec.partner is None:
            return self.settings.override(spec.settings)
        partner = self.model(spec.partner)
        inherited = self.settings.override({**partner.settings, **spec.settings})
        return inherited.override({"dense_size": 0})

    def selected(self, names: str | None) -> Plan:
        """The plan with these models alone, and the dense partners that they need. ConfigError for an unknown name."""
        if names is None:
            return self
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        known = [model.name for model in self.models]
        unknown = [name for name in wanted if name not in known]
        if unknown or not wanted:
            raise ConfigError(
                f"the study has no model {unknown[0]!r}." if unknown else "--models names no model.",
                where="--models",
                why=f"preset {self.preset} has: {', '.join(known)}",
                fix="name some of these, with commas between them",
            )
        needed = {*wanted, *(self.model(name).partner for name in wanted)}
        return self.model_copy(update={"models": tuple(model for model in self.models if model.name in needed)})

    def changed(self, items: tuple[str, ...]) -> Plan:
        """With `NAME=VALUE` set for all models, `MODEL.NAME=VALUE` for one, whose `router`, `shared_experts` and `knob`
        can be set too. Raises ConfigError for what cannot be."""
        changes = parse_changes(items, where="--set")
        everyone = {name: value for name, value in changes.items() if "." not in name}
        dense_only = {name: everyone.pop(name) for name in ("dense_size",) if name in everyone}
        models = []
        for model in self.models:
            own = {
                name.partition(".")[2]: value for name, value in changes.items() if name.partition(".")[0] == model.name
            }
            row = {name: own.pop(name) for name in _OF_A_ROW if name in own}
            kept = {name: value for name, value in model.settings.items() if name not in everyone}
            widths = dense_only if model.router is None else {}
            models.append(model.changed(row | {"settings": kept | widths | own}))
        known = {model.name for model in self.models}
        strangers = [name for name in changes if "." in name and name.partition(".")[0] not in known]
        if strangers:
            raise ConfigError(
                f"the study has no model {strangers[0].partition('.')[0]!r}.",
                where=f"--set {strangers[0]}",
                why=f"there is: {', '.join(sorted(known))}",
                fix="--set NAME=VALUE is for all models, --set MODEL.NAME=VALUE for one",
            )
        plan = self.model_copy(update={"settings": self.settings.override(everyone), "models": tuple(models)})
        for model in plan.models:
            plan.settings_of(model)
        return plan
