"""Golden: every router class of the installed transformers does what docs/benchmarks/models.json says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moerouters import RouteContext
from moerouters.swapping.batch import Batch
from moerouters.swapping.module import SwappedRouter

from .survey import survey
from .survey_outputs import same_bits
from .survey_page import ROUTERS, page, read
from .zoo import RouterClass, router_classes

DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMITTED = read(DOCS)
DEEPSEEK = RouterClass("DeepseekV3TopkRouter", "deepseek_v3")
MIXTRAL = RouterClass("MixtralTopKRouter", "mixtral")


def of_a_new_form() -> Iterator[Any]:
    """All classes; slow those whose gating is that of one before in other numbers, which is most of them."""
    seen: set[str] = set()
    for router in router_classes():
        row = COMMITTED.row(router.name)
        form = re.sub(r"[0-9.]+|\S*bias\S*", "", row.gating or row.reason or "") if row else router.name
        yield pytest.param(router, id=str(router), marks=[pytest.mark.slow] if form in seen else [])
        seen.add(form)


@pytest.mark.parametrize("router", list(of_a_new_form()))
def test_the_row_is_the_committed_one(router: RouterClass) -> None:
    row, committed = survey(router), COMMITTED.row(router.name)
    assert committed is not None, f"{router} is new: run `make docs-models`"
    found, expected = (json.loads(each.model_dump_json()) for each in (row, committed))
    differ = {name: (expected[name], found[name]) for name in found if found[name] != expected[name]}
    assert not differ, f"(committed, found); if it is better now, run `make docs-models`: {differ}"


def test_the_survey_is_of_the_installed_release() -> None:
    assert COMMITTED.transformers == transformers.__version__, "run `make docs-models`"
    assert {row.router for row in COMMITTED.rows} == {router.name for router in router_classes()}


def test_nearly_all_are_proven() -> None:
    assert sum(row.proven for row in COMMITTED.rows) >= 72
    assert [row.router for row in COMMITTED.rows if not row.proven and not row.reason] == []
    assert [row.router for row in COMMITTED.rows if row.proven and row.reason] == []
    assert all(set(row.trained) == set(ROUTERS) for row in COMMITTED.rows if row.proven)


def test_what_is_no_yes_says_why() -> None:
    verdicts = [(row.router, name, each) for row in COMMITTED.rows for name, each in row.verdicts()]
    assert [(router, name) for router, name, each in verdicts if not each.holds and not each.why] == []


def test_the_page_is_fresh() -> None:
    assert (DOCS / "models.md").read_text(encoding="utf-8") == page(COMMITTED), "run `make docs`"


Spoil = Callable[[pytest.MonkeyPatch], None]


def weights_a_hundredth_larger(patch: pytest.MonkeyPatch) -> None:
    forward = SwappedRouter.forward

    def spoilt(self: SwappedRouter, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, weights_TK, ids_TK = forward(self, hidden_states)
        return logits_TE, 1.01 * weights_TK, ids_TK

    # By import_module, since the package has a function of the module's name.
    patch.setattr(import_module("moerouters.swapping.swap"), "prove", lambda *_: None)
    patch.setattr(SwappedRouter, "forward", spoilt)


def stock_aux_stays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("moerouters.swapping.surroundings._stock_aux", lambda _: ())


def padding_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Batch, "context", lambda batch, num_tokens, hidden_TD: RouteContext(hidden_TD=hidden_TD))


def bias_is_not_served(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SwappedRouter, "learned", lambda _: None)


def state_is_saved(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(SwappedRouter, "state_dict")


@pytest.mark.parametrize(
    ("spoil", "router", "wrong"),
    [
        (
            weights_a_hundredth_larger,
            MIXTRAL,
            {"exact in float32", "exact in training mode", "exact in bfloat16", "generated"},
        ),
        (stock_aux_stays, MIXTRAL, {"exact in float32"}),
        (padding_counts, MIXTRAL, {f"trained with {name}" for name in ROUTERS}),
        (bias_is_not_served, DEEPSEEK, {"checkpoint"}),
        (state_is_saved, MIXTRAL, {"checkpoint"}),
    ],
)
def test_the_survey_sees_what_is_wrong(
    spoil: Spoil, router: RouterClass, wrong: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    assert {name for name, verdict in survey(router).verdicts() if verdict.holds is False} == wrong


def test_bits_are_stricter_than_values() -> None:
    zero = torch.zeros(2)
    assert same_bits(zero, zero.clone()) and not same_bits(zero, -zero) and not same_bits(zero, zero.double())
    assert same_bits(zero / zero, zero / zero)
