"""Which gatings a router is checked with."""

import pytest
import torch

from moerouters import Gating, RouterConfig, Selection
from moerouters.errors import ConfigError
from moerouters_conformance import check_router
from moerouters_conformance.mutants.healthy import Plain
from moerouters_conformance.subject import FAMILIES, Subject
from moerouters_conformance.text import report_text
from moerouters_conformance.violation import Violation


class OnlyRelu(Plain):
    """Every expert of a positive score, under relu alone."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        super().__init__(gating, config)
        if gating.settings.score != "relu" or gating.settings.renormalize:
            raise ConfigError("relu scores are needed.")

    def select(self, adjusted_TE, ctx):
        E = self.gating.num_experts
        return Selection.slots(torch.where(adjusted_TE > 0, torch.arange(E), E))


class Nothing(Plain):
    """Refuses whatever there is."""

    def __init__(self, gating: Gating, config: RouterConfig = RouterConfig()) -> None:
        raise ConfigError("no gating will do.")


def test_a_rare_gating_is_for_those_who_take_no_other() -> None:
    assert Subject.of("topk").families == tuple(FAMILIES)
    assert Subject.of(OnlyRelu).families == ("relu",)
    with pytest.raises(Violation, match=r"it refuses every gating; tried were softmax, .*, relu"):
        Subject.of(Nothing).families  # noqa: B018


def test_its_weights_are_compared_with_the_oracle() -> None:
    report = check_router(OnlyRelu, profile="smoke", only=["C01", "C12", "W03", "W04", "W05", "W11", "G01", "G03"])
    assert report.totals["failed"] == 0, report_text(report)
    ran = {check.id for check in report.checks if check.status == "passed"}
    # Weights that are not divided by their sum have none to check, and the number of experts follows from the logits.
    assert ran == {"C01", "W04", "W05", "W11", "G01", "G03"}
