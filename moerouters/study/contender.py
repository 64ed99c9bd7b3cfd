"""A model of the study, ready to be built: its settings, its router, and what is active of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moerouters.capabilities import AssignmentKind
from moerouters.lab.corpus import Corpus
from moerouters.lab.ranks import Ranks
from moerouters.lab.roster import Entrant, named_roster
from moerouters.lab.settings import Settings
from moerouters.lab.train import Trainer
from moerouters.layer import MoELayer
from moerouters.study.plan import ModelSpec, Plan


@dataclass(frozen=True)
class Contender:
    """Fresh trainers of one model, all with the same weights for the same seed."""

    spec: ModelSpec
    settings: Settings
    entrant: Entrant | None
    """Its router; None: dense."""

    @classmethod
    def of(cls, plan: Plan, spec: ModelSpec) -> Contender:
        """At the size where its search starts. Raises where its router cannot be had, before anything is timed."""
        settings = plan.settings_of(spec)
        entrant = None if spec.router is None else named_roster(spec.router, settings)[0]
        start = cls(spec, settings, entrant)
        if spec.partner is None:
            return start
        width = plan.settings_of(plan.model(spec.partner)).dense_size
        experts = start.active_experts + spec.shared_experts
        return start._wide(max(1, round(width / experts / plan.multiple)) * plan.multiple)

    def sized(self, value: int) -> Contender:
        """With another value of what its search adjusts."""
        if self.spec.knob == "expert_size":
            return self._wide(value)
        return self.resolved(self.settings.override({self.spec.knob: value}))

    def _wide(self, expert_size: int) -> Contender:
        shared_size = self.spec.shared_experts * expert_size
        return self.resolved(self.settings.override({"expert_size": expert_size, "shared_size": shared_size}))

    def resolved(self, settings: Settings) -> Contender:
        """With these settings, as an earlier search found them."""
        return replace(self, settings=settings)

    def trainer(self, *, seed: int, corpus: Corpus, device: torch.device, ranks: Ranks = Ranks()) -> Trainer:  # noqa: B008
        """A fresh one."""
        return Trainer(self.entrant, seed=seed, settings=self.settings, corpus=corpus, device=device, ranks=ranks)

    @property
    def active_experts(self) -> int:
        """That compute each token in training; all of them where training is dense."""
        if self.entrant is None:
            return 0
        router = self.entrant.build(self.settings)
        dense = router.capabilities.assignment is AssignmentKind.DENSE
        return self.settings.num_experts if dense else self.settings.top_k

    def active_parameters(self, trainer: Trainer) -> int:
        """Of one of its trainers: those that each token meets in training, on the mean."""
        layers = [module for module in trainer.model.modules() if isinstance(module, MoELayer)]
        in_experts = sum(parameter.numel() for layer in layers for parameter in layer.experts.parameters())
        idle = self.settings.num_experts - self.active_experts if layers else 0
        return trainer.num_parameters - in_experts * idle // self.settings.num_experts
