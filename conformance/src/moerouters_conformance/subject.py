"""Subject: the router under test - how to build it, what it declares, and what it can be measured to do."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from moerouters import Assignment, Capabilities, Gating, Router, RouterConfig, RouterSpec, StateAlgebra
from moerouters.errors import ConfigError, ContextError, UnsupportedError
from moerouters.gating import GatingSettings
from moerouters.registry import API_VERSION, Provenance, info
from moerouters.registry.configs import make_config
from moerouters_conformance.case import Batch, Case, make_batch, warm_up_logits
from moerouters_conformance.violation import Refused, Violation

FAMILIES: dict[str, dict[str, Any]] = {
    "softmax": {"score": "softmax"},
    "softmax, not renormalised": {"score": "softmax", "renormalize": False},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, scaled": {"score": "sigmoid", "scale": 2.5},
    "sqrtsoftplus": {"score": "sqrtsoftplus"},
    "softmax after top-k": {"score": "identity", "softmax_after_topk": True, "renormalize": False},
    "sigmoid with a correction bias": {"score": "sigmoid", "correction_bias": True},
    "soft-capped softmax": {"score": "softmax", "soft_cap": 30.0},
}
"""The gatings of the field's models (Mixtral, OLMoE, GLM, DeepSeek-V3 and -V4, GPT-OSS, Grok), without groups."""

RARE_FAMILIES: dict[str, dict[str, Any]] = {"relu": {"score": "relu", "renormalize": False}}
"""Gatings of single methods, for routers that refuse all of `FAMILIES`: under relu a top-k also chooses experts whose
score is 0, and so is their gradient."""

ALL_FAMILIES = FAMILIES | RARE_FAMILIES

FACTORY_SUMMARY = "A factory handed to the suite."
"""The summary of what was handed in without a spec; rules about specs do not concern it."""

OPTIONAL_CONTEXT = ("sequence_ids_T", "token_ids_T", "hidden_TD", "noise_key")


class Subject:
    """One router with one config. Everything that the checks ask the router to do goes through it, so that an error
    raised by the router becomes a violation with the router's own line in it."""

    def __init__(
        self,
        spec: RouterSpec,
        *,
        config: Mapping[str, Any] | RouterConfig | None = None,
        hidden_size: int = 8,
        provenance: Provenance | None = None,
        label: str | None = None,
    ) -> None:
        self.spec = spec
        self.config = make_config(spec, config)
        self.hidden_size = hidden_size
        """Width of the hidden states that routers which look past the logits are given."""
        self.provenance = provenance
        """None for a spec or a factory that was handed in."""
        self.label = label or spec.name

    @classmethod
    def of(
        cls,
        router: str | RouterSpec | Callable[[Gating], Router],
        *,
        config: Mapping[str, Any] | RouterConfig | None = None,
        hidden_size: int = 8,
    ) -> Self:
        """From an installed name, a spec, or anything that makes a router of a gating.

        A name may carry settings, `name:key=value;key=value`, as in `moerouters compare --routers`.
        """
        if isinstance(router, RouterSpec):
            return cls(router, config=config, hidden_size=hidden_size)
        if isinstance(router, str):
            name, written = _split(router)
            found = info(name)
            merged = written if config is None else config
            return cls(found.spec, config=merged, hidden_size=hidden_size, provenance=found.provenance, label=router)
        return cls(_spec_of(router), config=config, hidden_size=hidden_size)

    def __getstate__(self) -> dict[str, Any]:
        """What ranks need to build the same subject; what was measured is measured there again."""
        return {name: self.__dict__[name] for name in ("spec", "config", "hidden_size", "provenance", "label")}

    # Building.

    def make(self, settings: GatingSettings) -> Router:
        """A fresh router; raises whatever the factory raises."""
        made = self.spec.factory(Gating(settings), self.config)
        if not isinstance(made, Router):
            raise Violation(f"the factory returned {type(made).__name__}; a moerouters.Router was expected")
        return made

    def build(self, settings: GatingSettings) -> Router:
        """A fresh router. Raises Refused for a gating that it refuses in due form."""
        try:
            return self.make(settings)
        except (ConfigError, UnsupportedError) as error:
            raise Refused(str(error)) from error
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"building it with this gating raised {blame(error)}") from error

    def prepared(self, case: Case) -> Router:
        """The case's router: built, warmed up, in the case's mode."""
        router = self.build(case.settings)
        self.warm_up(router, case.warm_up)
        return router.train(case.training)

    def warm_up(self, router: Router, steps: int) -> None:
        """Let the router learn from `steps` batches that favour the early experts."""
        router.train()
        for step in range(steps):
            logits_TE = warm_up_logits(step, router.gating.num_experts)
            batch = make_batch(logits_TE, hidden_size=self.hidden_size)
            self.update(router, dict(self.route(router, batch).stats))

    # Running.

    def route(self, router: Router, batch: Batch) -> Assignment:
        """One forward. Whatever the router raises is a violation: the input was legal."""
        try:
            assignment: object = router(batch.logits_TE, batch.ctx)
        except Exception as error:
            raise Violation(f"forward raised {blame(error)}") from error
        if not isinstance(assignment, Assignment):
            raise Violation(f"forward returned {type(assignment).__name__}; a moerouters.Assignment was expected")
        return assignment

    def run(self, case: Case) -> Assignment:
        """Build, warm up, and route the case's batch."""
        return self.route(self.prepared(case), case.batch(self))

    def update(self, router: Router, stats: Mapping[str, Tensor]) -> None:
        """One `Router.update`, as `attach` calls it: without gradients, and not at all where nothing was observed."""
        if router.capabilities.state is StateAlgebra.STATELESS or not stats:
            return
        try:
            with torch.no_grad():
                router.update(stats)
        except Exception as error:
            raise Violation(f"update raised {blame(error)}") from error

    # What it declares and does.

    @cached_property
    def example(self) -> Router:
        """A router of 4 experts, built with the first family of gatings that it accepts."""
        return self.build(self.settings(num_experts=4, top_k=2))

    @property
    def capabilities(self) -> Capabilities:
        """What the instance declares; for this config, that is."""
        return self.example.capabilities

    @property
    def stateful(self) -> bool:
        return self.capabilities.state is not StateAlgebra.STATELESS

    @property
    def precise(self) -> torch.dtype:
        """The widest dtype of logits that it takes: float64, or for some stock routers float32."""
        return torch.float64 if "float64" in self.capabilities.dtypes else torch.float32

    @property
    def api(self) -> str:
        return self.spec.api

    @cached_property
    def families(self) -> tuple[str, ...]:
        """Names of the families of gatings that the router accepts, of 4 experts, 2 a token."""
        accepted = self._accepted(FAMILIES) or self._accepted(RARE_FAMILIES)
        if not accepted:
            raise Violation(f"it refuses every gating; tried were {', '.join(ALL_FAMILIES)}")
        return accepted

    def _accepted(self, families: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
        accepted = []
        for name, family in families.items():
            try:
                self.make(GatingSettings(num_experts=4, top_k=2, **family))
            except (ConfigError, UnsupportedError):
                continue
            except Exception as error:
                raise Violation(f"building it with a gating of {name} raised {blame(error)}") from error
            accepted.append(name)
        return tuple(accepted)

    def settings(self, *, num_experts: int, top_k: int, family: str | None = None, **more: Any) -> GatingSettings:
        """Gating settings of an accepted family, the first one unless named."""
        return GatingSettings(num_experts=num_experts, top_k=top_k, **(ALL_FAMILIES[family or self.families[0]] | more))

    @cached_property
    def needs(self) -> frozenset[str]:
        """Context fields without which the router raises ContextError."""
        batch = make_batch(torch.zeros(3, 4), hidden_size=self.hidden_size)
        found = set()
        for name in OPTIONAL_CONTEXT:
            less = batch.with_context(**{name: None})
            if name == "sequence_ids_T":
                less = less.with_context(num_sequences=None)
            try:
                self.example.train()(less.logits_TE, less.ctx)
            except ContextError:
                found |= {name, "num_sequences"} if name == "sequence_ids_T" else {name}
            except Exception:
                continue  # H08 is the rule that reports this
        return frozenset(found)

    def reacts_to(self, name: str) -> bool:
        """Whether another value of a context field (noise_key, token_ids_T) changes anything the router returns."""
        batch = make_batch(warm_up_logits(0, 4), hidden_size=self.hidden_size)
        other = batch.with_context(**{name: getattr(batch.ctx, name) + 17})
        router = self.build(self.settings(num_experts=4, top_k=2))
        for training in (True, False):
            router.train(training)
            if _fingerprint(self.route(router, batch)) != _fingerprint(self.route(router, other)):
                return True
        return False

    @cached_property
    def draws_noise(self) -> bool:
        """Whether it draws noise, which goes by position, so that tokens cannot change places."""
        return self.reacts_to("noise_key")

    @cached_property
    def hashes_tokens(self) -> bool:
        """Whether vocabulary ids decide, so that experts have identities of their own."""
        return self.reacts_to("token_ids_T")

    @cached_property
    def follows_scores(self) -> bool:
        """Whether, before it has learned anything, in eval, it takes each token's K highest scores."""
        router = self.build(self.settings(num_experts=4, top_k=2)).eval()
        logits_TE = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 0.0, 2.0]])
        ids_TK, _ = self.route(router, make_batch(logits_TE, hidden_size=self.hidden_size)).with_slots()
        chosen = [sorted(e for e in row if e < 4) for row in ids_TK.tolist()]
        return chosen == [[0, 2], [2, 3], [1, 3]]

    @cached_property
    def has_losses(self) -> bool:
        """Whether it computes any loss in training."""
        batch = make_batch(warm_up_logits(0, 4), hidden_size=self.hidden_size)
        return bool(self.route(self.example.train(), batch).losses)

    @cached_property
    def fixed_slots(self) -> bool:
        """Whether every token gets exactly K experts, in flat and in steep batches too: slots, and as many of them
        filled as the gating says."""
        router = self.build(self.settings(num_experts=4, top_k=2)).eval()
        for steepness in (1.0, 0.0, 20.0):
            batch = make_batch(steepness * warm_up_logits(0, 4), hidden_size=self.hidden_size)
            ids = self.route(router, batch).expert_ids
            if ids.dim() != 2 or not bool(((ids < 4).sum(dim=1) == 2).all()):
                return False
        return True

    # How reports show it.

    def build_code(self) -> list[str]:
        """Lines that make the router of a variable `gating`, with public names."""
        changed = self.config.model_dump(mode="json", exclude_defaults=True)
        if self.provenance is not None:
            config = f", config={changed!r}" if changed else ""
            return [f"router = moerouters.build({self.spec.name!r}, gating{config})"]
        factory = self.spec.factory
        module, name = getattr(factory, "__module__", "?"), getattr(factory, "__qualname__", repr(factory))
        kind = type(self.config)
        if kind is RouterConfig:
            return [f"from {module} import {name}", f"router = {name}(gating, moerouters.RouterConfig())"]
        arguments = ", ".join(f"{key}={value!r}" for key, value in changed.items())
        return [
            f"from {module} import {name}",
            f"from {kind.__module__} import {kind.__qualname__}",
            f"router = {name}(gating, {kind.__qualname__}({arguments}))",
        ]

    def with_config(self, config: RouterConfig) -> Subject:
        """The same router with other settings."""
        return Subject(
            self.spec, config=config, hidden_size=self.hidden_size, provenance=self.provenance, label=self.label
        )


def blame(error: BaseException) -> str:
    """Type and text of an exception, and the last line outside torch and this suite that it passed through."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_foreign(f.filename)]
    if not frames:
        return shown
    last = frames[-1]
    return f"{shown}\n  at {Path(last.filename).name}:{last.lineno} in {last.name}: {last.line}"


def _is_foreign(filename: str) -> bool:
    own = str(Path(__file__).parent)
    return (filename.startswith(own + "/") and "/mutants/" not in filename) or f"{'/torch/'}" in filename


def _split(written: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = written.partition(":")
    pairs = (item.partition("=") for item in rest.split(";") if item)
    return name, {key: value for key, _, value in pairs}


def _spec_of(factory: Callable[..., Router]) -> RouterSpec:
    """A spec for a bare factory, as if a plugin had declared it."""

    def with_config(gating: Gating, config: RouterConfig) -> Router:
        return factory(gating)

    with_config.__module__ = getattr(factory, "__module__", "__main__")
    with_config.__qualname__ = getattr(factory, "__qualname__", "factory")
    name = getattr(factory, "__name__", "factory").strip("_<>").lower().replace("_", "-") or "factory"
    return RouterSpec(name=name, api=API_VERSION, summary=FACTORY_SUMMARY, factory=with_config)


def _fingerprint(assignment: Assignment) -> list[object]:
    tensors = [assignment.expert_ids, assignment.weights, *assignment.losses.values(), *assignment.stats.values()]
    return [tensor.tolist() for tensor in tensors]
