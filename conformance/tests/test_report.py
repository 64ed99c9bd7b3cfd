"""The engine and its report."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from moerouters import RouteContext, Selection
from moerouters.errors import ConfigError
from moerouters_conformance import ConformanceFailure, Report, Status, check_router, iter_checks
from moerouters_conformance.checks import all_rules, find_rule
from moerouters_conformance.mutants.healthy import Plain
from moerouters_conformance.rule import STANDS_ON, Group
from moerouters_conformance.text import report_text


class Twice(Plain):
    """Sends every token to its best expert K times."""

    def select(self, adjusted_TE: Tensor, ctx: RouteContext) -> Selection:
        ids_TK = super().select(adjusted_TE, ctx).expert_ids
        return Selection.slots(ids_TK[:, :1].expand_as(ids_TK))


FAILURE = """\
FAIL C04 experts_are_distinct   (docs/conformance.md, rule C04)
  rule    No expert stands twice at one token.
  saw     expert 0 stands twice at token 0: its experts are [0, 0]
  input   T=1, E=2, K=2, softmax, eval
          logits_TE = [[0.0, 0.0]]
  repro   python - <<'PY'
          import torch, moerouters
          gating = moerouters.Gating.softmax(2, 2)
          from test_report import Twice
          router = Twice(gating, moerouters.RouterConfig())
          router.eval()
          logits_TE = torch.tensor([[0.0, 0.0]])
          assignment = router(logits_TE)
          print(assignment)
          PY"""


def test_a_failure_shows_the_smallest_input_and_a_script() -> None:
    report = check_router(Twice, only=["C04"])
    assert FAILURE in report_text(report).replace(Twice.__module__, "test_report")
    assert report.exit_code == 1
    with pytest.raises(ConformanceFailure, match="expert 0 stands twice at token 0"):
        report.raise_for_failures()


def test_a_script_runs_and_shows_it() -> None:
    (result,) = check_router("topk", profile="smoke", only=["C04"]).checks
    assert result.status is Status.PASSED
    report = check_router(Twice, only=["C04"])
    script = report.checks[0].repro.replace(f"from {Twice.__module__} import Twice", "from moerouters.builtin import *")
    assert "moerouters.Gating.softmax(2, 2)" in script


def test_repro_of_an_installed_router_runs_as_it_stands() -> None:
    from moerouters_conformance.case import Case
    from moerouters_conformance.subject import Subject

    subject = Subject.of("topk")
    case = Case(
        settings=subject.settings(num_experts=3, top_k=2, family="sigmoid, scaled"),
        logits=((0.0, 1.0, 2.0), (1e4, -1.0, 0.5)),
        valid=(True, False),
        training=False,
        dtype="float64",
    )
    ran = subprocess.run(
        [sys.executable, "-c", case.repro(subject)], capture_output=True, text=True, check=True, timeout=120
    )
    assert "expert_ids=tensor([[2, 1],\n        [3, 3]])" in ran.stdout


def test_a_report_survives_its_json() -> None:
    report = check_router(Twice, profile="smoke", only=["C01", "C04", "C21"])
    again = Report.from_json(report.to_json())
    assert again == report
    assert again.totals == {
        "passed": 1, "failed": 1, "expected_failure": 0, "not_applicable": 1, "blocked": 0, "error": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="schema"):
        Report.from_json(report.to_json().replace("moerouters.conformance/1", "moerouters.conformance/2"))


def test_groups_that_stand_on_a_failed_one_are_blocked() -> None:
    report = check_router(Twice, profile="smoke", only=["C04", "W01", "H02"])
    assert [result.status for result in report.checks] == [Status.FAILED, Status.BLOCKED, Status.PASSED]
    assert report.checks[1].reason == "blocked by C04"
    kept_going = check_router(Twice, profile="smoke", only=["C04", "W01"], keep_going=True)
    assert kept_going.totals["blocked"] == 0


def test_no_smallest_example_is_sought_for_an_expected_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    routed: list[int] = []
    select = Twice.select

    def counted(self: Twice, *arguments: Any) -> Any:
        routed.append(1)
        return select(self, *arguments)

    monkeypatch.setattr(Twice, "select", counted)
    check_router(Twice, profile="smoke", only=["C04"])
    sought = len(routed)
    check_router(Twice, profile="smoke", only=["C04"], expected_failures={"C04": "it likes them"})
    assert 0 < len(routed) - sought < sought / 2


def test_an_expected_failure_is_no_failure_and_blocks_nothing() -> None:
    report = check_router(Twice, profile="smoke", only=["C04", "W01"], expected_failures={"C04": "it likes them"})
    assert report.checks[0].status is Status.EXPECTED_FAILURE
    assert report.checks[0].reason == "it likes them"
    assert report.totals["blocked"] == 0


def test_an_expected_failure_that_holds_is_a_failure() -> None:
    report = check_router(Plain, profile="smoke", only=["C04"], expected_failures={"experts_are_distinct": "old bug"})
    assert report.checks[0].status is Status.FAILED
    assert report.checks[0].reason == "expected to fail (old bug), and it holds"


@pytest.mark.parametrize(
    ("expected", "message"),
    [({"C4": "x"}, "the suite has no check 'C4'"), ({"C04": " "}, "expected failures without a reason: C04")],
)
def test_expectations_have_to_make_sense(expected: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_router(Plain, profile="smoke", only=["C04"], expected_failures=expected)


def test_nothing_that_ran_is_not_ok() -> None:
    report = check_router(Plain, profile="smoke", only=["D01"])
    assert (report.ok, report.exit_code) == (False, 4)
    with pytest.raises(ConformanceFailure, match="no check"):
        report.raise_for_failures()


def test_checks_are_iterated_in_order_and_only_those_that_apply() -> None:
    every = [check.id for check in iter_checks()]
    assert every == [rule.id for rule in all_rules()]
    of_topk = [check.id for check in iter_checks("topk", profile="smoke")]
    assert "C04" in of_topk
    assert "C21" not in of_topk
    assert "D01" not in of_topk


def test_a_check_that_breaks_is_an_error_with_its_line() -> None:
    class Odd(Plain):
        @property
        def training(self) -> bool:
            raise KeyboardInterrupt if False else RuntimeError("odd")

        @training.setter
        def training(self, value: bool) -> None:
            pass

    report = check_router(Odd, profile="smoke", only=["C04"])
    assert report.checks[0].status in (Status.FAILED, Status.ERROR)
    assert "RuntimeError: odd" in report.checks[0].reason


def test_rules_are_well_formed() -> None:
    rules = all_rules()
    assert len(rules) >= 50
    assert len({rule.id for rule in rules}) == len({rule.name for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.text.endswith(".") and "\n" not in rule.text
        assert rule.why and len(rule.text) <= 130, rule.id
        assert find_rule(rule.id) is find_rule(rule.name) is rule
    for group, before in STANDS_ON.items():
        assert all(list(Group).index(earlier) < list(Group).index(group) for earlier in before)


def test_torch_state_is_as_before() -> None:
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
    check_router(Plain, profile="smoke")
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
    assert after == before
