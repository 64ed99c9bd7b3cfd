"""A training run that is interrupted in every way, beside one that is not; hypothesis looks for a way that matters."""

from __future__ import annotations

from copy import deepcopy

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from moerouters import Router
from moerouters_conformance.case import Batch, make_batch, warm_up_logits
from moerouters_conformance.profile import Profile
from moerouters_conformance.readings import expect_same_bits, state_of
from moerouters_conformance.strategies import gatings
from moerouters_conformance.subject import Subject, blame
from moerouters_conformance.violation import Violation

STEPS = 6
"""Things that happen in one run; runs that fail shrink to two or three."""


def resume_machine(subject: Subject, profile: Profile) -> None:
    """Run the machine; raise Violation with the shortest run that ends in another state."""

    kinds = st.integers(0, 2)

    class Run(RuleBasedStateMachine):
        """One router to which everything happens, and its shadow, to which only the training steps do."""

        @initialize(data=st.data())
        def build(self, data: st.DataObject) -> None:
            self.story: list[str] = []
            self.gating = data.draw(gatings(subject, min_experts=2, spare=1))
            self.router = subject.build(self.gating).train()
            self.shadow = self._copied()

        # Every rule ends in a training step: what got lost shows in what is learned next.

        @rule(kind=kinds)
        def train(self, kind: int) -> None:
            self._train(kind, after="")

        @rule(kind=kinds, seen=kinds)
        def evaluate(self, kind: int, seen: int) -> None:
            subject.route(self.router.eval(), self._batch(seen))
            self.router.train()
            self._train(kind, after=f"evaluate on batch {seen}, ")

        @rule(kind=kinds)
        def save_and_restore(self, kind: int) -> None:
            saved = state_of(self.router)
            self.router = subject.build(self.gating).train()
            self.router.load_state_dict(saved)
            self._train(kind, after="save and restore into a fresh router, ")

        @rule(kind=kinds)
        def cast(self, kind: int) -> None:
            kept = {name: value.detach().clone() for name, value in self.router.named_parameters()}
            self.router = self.router.to(torch.bfloat16).float()
            with torch.no_grad():  # the model's own parameters are rounded, as they should be
                for name, value in self.router.named_parameters():
                    value.copy_(kept[name])
            self._train(kind, after="cast to bfloat16 and back, ")

        @rule(kind=kinds)
        def copy(self, kind: int) -> None:
            self.router = self._copied()
            self._train(kind, after="deep copy, ")

        @invariant()
        def same_state(self) -> None:
            if not hasattr(self, "story"):
                return
            try:
                expect_same_bits(_state(self.router), _state(self.shadow), when="here")
            except Violation as violation:
                run = "; ".join(self.story)
                raise Violation(f"{violation.saw} in a run that only trains\n  here: {run}") from None

        def _copied(self) -> Router:
            try:
                return deepcopy(self.router)
            except Exception as error:
                raise Violation(f"a deep copy raised {blame(error)}") from error

        def _train(self, kind: int, *, after: str) -> None:
            for router in (self.router, self.shadow):
                subject.update(router, dict(subject.route(router, self._batch(kind)).stats))
            self.story.append(f"{after}train on batch {kind}")

        def _batch(self, kind: int) -> Batch:
            """One of three batches of different sizes, the first with the other experts in favour."""
            E = self.gating.num_experts
            logits_TE = warm_up_logits(kind, E, tokens=(6, 9, 16)[kind])
            return make_batch(logits_TE if kind else logits_TE.flip(1), hidden_size=subject.hidden_size)

    chosen = settings(profile.settings(examples=max(3, profile.examples // 5)), stateful_step_count=STEPS)
    run_state_machine_as_test(Run, settings=chosen)


def _state(router: Router) -> dict[str, torch.Tensor]:
    return {name: getattr(router, name).detach().clone() for name in router.state_names()}
