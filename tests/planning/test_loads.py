"""Loads from every kind of file that knows them, against counting by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moerouters.errors import ConfigError
from moerouters.inspecting.logits_trace import About, LayerLogits, LogitsTrace
from moerouters.lab.history import History
from moerouters.planning.loads import LoadHistory, dump_loads, read_loads
from moerouters.swapping.reading import Projection, Reading
from moerouters.trace import RoutingTrace

from .histories import steady, topics


def counted(ids_TK: torch.Tensor, num_experts: int, steps: int) -> list[list[int]]:
    """By loop: neighbouring tokens, the first steps one longer where they cannot be equal."""
    rows = [[0] * num_experts for _ in range(steps)]
    each, more = divmod(len(ids_TK), steps)
    for token, ids in enumerate(ids_TK.tolist()):
        longer = more * (each + 1)
        step = token // (each + 1) if token < longer else more + (token - longer) // each
        for expert in ids:
            if expert < num_experts:
                rows[step][expert] += 1
    return rows


def test_a_trace_of_logits_is_routed_by_its_own_gating(tmp_path: Path, generator: torch.Generator) -> None:
    logits_TE = torch.randn(50, 6, generator=generator)
    reading = Reading(num_experts=6, top_k=2, projection=Projection(weight="weight"), score="softmax", finish=())
    layer = LayerLogits(
        logits_TE=logits_TE,
        reading=reading,
        weight_dtype=torch.float32,
        hidden_dtype=torch.float32,
        tensors={},
        stock_class="Gate",
    )
    path = tmp_path / "trace.safetensors"
    LogitsTrace(layers={"0.gate": layer}, about=About(model="tiny", text="words.txt")).save(path)
    history = read_loads(path, steps=4)
    assert history.layers["0.gate"].tolist() == counted(logits_TE.topk(2).indices, 6, 4)
    assert history.source == "tiny on words.txt, 50 tokens"
    assert read_loads(path).steps == 32
    with pytest.raises(ConfigError, match="50 tokens cannot be split in 51 steps"):
        read_loads(path, steps=51)


def test_a_routing_trace_counts_no_empty_slot(tmp_path: Path) -> None:
    ids_TK = torch.tensor([[0, 2], [1, 3], [3, 3], [2, 0], [1, 1]], dtype=torch.int16)
    path = tmp_path / "routing.safetensors"
    RoutingTrace(expert_ids={"moe": ids_TK}, num_experts={"moe": 3}).save(path)
    assert read_loads(path, steps=2).layers["moe"].tolist() == counted(ids_TK, 3, 2) == [[1, 1, 1], [1, 2, 1]]


def test_a_history_of_a_comparison_has_its_own_steps(tmp_path: Path) -> None:
    rest = dict.fromkeys(("micro_max_vio", "train_loss", "step_ms", "router_ms"), torch.zeros(2, dtype=torch.float64))
    history = History.of({"loads": torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]), **rest})
    path = tmp_path / "history.safetensors"
    history.save(path)
    read = read_loads(path)
    assert {name: rows.tolist() for name, rows in read.layers.items()} == {"0": [[1, 2], [5, 6]], "1": [[3, 4], [7, 8]]}
    with pytest.raises(ConfigError, match="steps of its own"):
        read_loads(path, steps=2)


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    path = tmp_path / "loads.json"
    path.write_text(dump_loads(topics()))
    read = read_loads(path)
    for name, loads_SE in topics().layers.items():
        assert np.array_equal(read.layers[name], loads_SE)


def test_csv_may_leave_out_zeros(tmp_path: Path) -> None:
    path = tmp_path / "loads.csv"
    path.write_text("layer,step,expert,load,more\na,0,2,7,x\na,1,0,3,x\nb,0,1,5,x\n")
    read = read_loads(path)
    assert {name: rows.tolist() for name, rows in read.layers.items()} == {
        "a": [[0, 0, 7], [3, 0, 0]],
        "b": [[0, 5], [0, 0]],
    }


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "layer,step,load\na,0,1\n", "(?s)line 2.*missing column 'expert'"),
        ("a.csv", "layer,step,expert,load\na,0,one,1\n", "(?s)line 2.*invalid literal"),
        ("a.csv", "layer,step,expert,load\na,0,1,1\na,0,1,2\n", "(?s)line 3.*stand once"),
        ("a.csv", "layer,step,expert,load\n", "these are no loads"),
        ("a.json", '{"schema": "moerouters.loads/1", "layers": {"a": [[1, 2], [3]]}}', "rows differ in length"),
        ("a.json", '{"schema": "moerouters.loads/1", "layers": {"a": [[1]], "b": [[1], [2]]}}', r"\[1, 2\] steps"),
        ("a.json", '{"schema": "moerouters.loads/1", "layers": {"a": [[1, -1]]}}', "'a' has no or negative counts"),
        ("a.json", '{"schema": "moerouters.loads/1", "layers": {"a": [[0, 0]]}}', "these are no loads"),
        ("a.json", '{"layers": {"a": [[1, 2]]}}', "schema: required"),
        ("a.txt", "", "ends neither in .safetensors"),
        ("a.safetensors", "", "cannot read"),
    ],
)
def test_what_is_no_file_of_loads_is_told(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_loads(tmp_path / name)


def test_other_tensors_and_missing_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"schema": "other/1"})
    with pytest.raises(ConfigError, match="its schema is 'other/1'"):
        read_loads(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="there is no file"):
        read_loads(tmp_path / "y.safetensors")
    History().save(tmp_path / "empty.safetensors")
    with pytest.raises(ConfigError, match="holds no step"):
        read_loads(tmp_path / "empty.safetensors")


def test_parts_of_a_history() -> None:
    history = steady([1, 2, 3], steps=5)
    assert history.steps == 5 and history.part(slice(3, None)).steps == 2
    with pytest.raises(ConfigError, match="these are no loads"):
        LoadHistory(layers={})
