"""Profiles have the MaxVio that was asked for; measured loads come from a comparison's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moerouters.errors import ConfigError
from moerouters.lab.showcase import Showcase
from moerouters.planning.load_models import LoadModel, load_models, profile

SHOWCASE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "compare-tiny.json"


@given(st.sampled_from(["zipf", "lognormal"]), st.integers(2, 300), st.floats(0.01, 0.95))
def test_the_largest_share_is_what_max_vio_says(kind: str, num_experts: int, part: float) -> None:
    max_vio = part * (num_experts - 1)
    shares_E = profile(kind, num_experts, max_vio)
    assert shares_E.sum() == pytest.approx(1)
    assert shares_E[0] * num_experts - 1 == pytest.approx(max_vio, rel=1e-6)
    assert (np.diff(shares_E) <= 1e-15).all() and (shares_E >= 0).all()


def test_zipf_is_a_power_law() -> None:
    shares_E = profile("zipf", 8, 1.5)
    ratios = np.log(shares_E[0] / shares_E[1:]) / np.log(np.arange(2, 9))
    assert np.allclose(ratios, ratios[0])
    assert profile("uniform", 4, 0.0).tolist() == profile("zipf", 4, 0.0).tolist() == [0.25] * 4


def test_layers_differ_in_which_expert_is_hot() -> None:
    shares_LE = LoadModel("x", "zipf", 2.0).shares(16, 50, np.random.default_rng(0))
    assert shares_LE.shape == (50, 16)
    assert np.allclose(np.sort(shares_LE, axis=1)[:, ::-1], profile("zipf", 16, 2.0))
    assert len(set(shares_LE.argmax(axis=1))) > 8


def test_items_of_a_list() -> None:
    found = load_models("uniform, zipf:max_vio=1,lognormal:0.5")
    assert [(each.label, each.profile, each.max_vio) for each in found] == [
        ("uniform", "uniform", 0.0),
        ("zipf:max_vio=1", "zipf", 1.0),
        ("lognormal:0.5", "lognormal", 0.5),
    ]


@pytest.mark.parametrize("text", ["zipf", "uniform:max_vio=1", "normal", "zipf:max_vio=-1", "zipf:vio", "zipf:inf"])
def test_what_is_no_load_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the load"):
        load_models(text)


def test_impossible_max_vio_and_empty_lists() -> None:
    with pytest.raises(ConfigError, match="MaxVio cannot be 9 with 8 experts"):
        profile("zipf", 8, 9.0)
    with pytest.raises(ConfigError, match="names no load"):
        load_models(" , ")


def test_the_max_vio_of_a_comparison() -> None:
    by_label: dict[str, list[float]] = {}
    for run in Showcase.model_validate_json(SHOWCASE.read_bytes()).results.runs:
        by_label.setdefault(run.label, []).append(run.avg_max_vio or 0.0)
    found = load_models(str(SHOWCASE))
    assert [each.label for each in found] == list(by_label)
    for each in found:
        assert each.max_vio == pytest.approx(sum(by_label[each.label]) / len(by_label[each.label]))
    assert [each.label for each in load_models(f"uniform,{SHOWCASE}:bip")] == ["uniform", "bip"]
    with pytest.raises(ConfigError, match=r"(?s)no load.*:sinkhole.*completed runs of the file: .*bip"):
        load_models(f"{SHOWCASE}:sinkhole")


def test_loads_of_a_comparison_where_experts_are_as_many(tmp_path: Path) -> None:
    from moerouters.lab.history import History

    results = Showcase.model_validate_json(SHOWCASE.read_bytes()).results
    rest = dict.fromkeys(("micro_max_vio", "train_loss", "step_ms", "router_ms"), torch.zeros(1, dtype=torch.float64))
    History.of({"loads": torch.tensor([[[1, 3], [2, 2]]]), **rest}).save(tmp_path / "history.safetensors")
    run = results.runs[0].model_copy(update={"history": "history.safetensors"})
    results.model_copy(update={"runs": (run,)}).save(tmp_path)
    (found,) = load_models(str(tmp_path / "results.json"))
    shares_LE = found.shares(2, 20, np.random.default_rng(0))
    assert {tuple(row) for row in shares_LE.tolist()} == {(0.25, 0.75), (0.5, 0.5)}
    assert found.shares(4, 3, np.random.default_rng(0)).shape == (3, 4)  # of its AvgMaxVio


def test_files_that_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"(?s)there is no load.*required"):
        load_models(str(tmp_path / "a.json"))
    with pytest.raises(ConfigError, match="No such file"):
        load_models(str(tmp_path / "b.json"))
