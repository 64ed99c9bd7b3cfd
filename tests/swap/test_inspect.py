"""`moerouters inspect`: what it reads from a config, what it counts on a text, and what it says when it cannot."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DeepseekV3Config, LlamaConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner, Result

from moerouters import swap
from moerouters.cli import app
from moerouters.inspecting.inspection import Inspection, folded, inspect_routers, layer_number, pattern, ranges
from moerouters.inspecting.outline import outline
from moerouters.metrics import dead_experts, load_cv, max_violation, min_violation

from .checkpoints import TEXT, build, deepseek, qwen, saved, windows
from .zoo import RouterClass, tiny_model

PNG = b"\x89PNG\r\n\x1a\n"


def inspect(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["inspect", *map(str, arguments)])


def refused(result: Result, *messages: str) -> None:
    assert result.exit_code == 2, result.output
    assert all(message in result.stderr for message in messages), result.stderr


def test_a_folder_with_weights(folder: Path, tmp_path: Path) -> None:
    result = inspect(folder, "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "tiny-qwen: Qwen3MoeForCausalLM, its own weights" in result.stdout
    line = next(line for line in result.stdout.splitlines() if "Qwen3MoeTopKRouter" in line)
    assert line.split() == ["0-3", "Qwen3MoeTopKRouter", "8", "2", "proven", "model.layers.*.mlp.gate"]
    assert "softmax over 8, top 2" in result.stdout
    assert "4 of 4 routers can be swapped." in result.stdout
    found = Inspection.model_validate_json((tmp_path / "found.json").read_text("utf-8"))
    assert found.schema_version == 1
    assert [row.name for row in found.routers] == [f"model.layers.{i}.mlp.gate" for i in range(4)]
    assert found.routers[0].reading is not None and found.routers[0].reading.top_k == 2
    assert found.loads is None


def test_a_config_at_real_sizes(tmp_path: Path) -> None:
    config = DeepseekV3Config(num_hidden_layers=6, dtype="bfloat16")
    assert (config.hidden_size, config.n_routed_experts) == (7168, 256)
    (tmp_path / "config.json").write_text(config.to_json_string(), "utf-8")
    result = inspect(tmp_path / "config.json", "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "random weights: only the config was read" in result.stdout
    line = next(line for line in result.stdout.splitlines() if "DeepseekV3TopkRouter" in line)
    assert line.split()[:5] == ["3-5", "DeepseekV3TopkRouter", "256", "8", "proven"]
    row = json.loads((tmp_path / "found.json").read_text("utf-8"))["routers"][2]
    assert (row["name"], row["correction_bias"]) == ("model.layers.5.mlp.gate", "e_score_correction_bias")
    assert row["reading"]["groups"]["fill"] == "-Infinity"


def test_an_outline_gives_memory_to_one_router_of_a_kind() -> None:
    config = deepseek()
    config.num_hidden_layers = 8
    real = build(config)
    model, alike = outline(type(real), config)
    assert alike == {"model.layers.1": tuple(f"model.layers.{i}" for i in range(2, 8))}
    assert {name for name, tensor in model.state_dict().items() if not tensor.is_meta} == {
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
    }
    assert model.get_parameter("model.layers.1.mlp.gate.weight").std() > 0
    assert inspect_routers(model, alike) == inspect_routers(real)


def test_config_only_leaves_weights_alone(folder: Path) -> None:
    result = inspect(folder, "--config-only")
    assert result.exit_code == 0, result.output
    assert "random weights" in result.stdout and "4 of 4 routers can be swapped." in result.stdout


def test_loads_are_those_of_the_models_own_router_logits(folder: Path, text: Path, tmp_path: Path) -> None:
    result = inspect(folder, "--text", text, "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert f"load on times.txt: {len(TEXT)} tokens, tokenizer bytes modulo the vocabulary" in result.stdout
    assert "The model has no tokenizer" in result.stdout
    loads = Inspection.model_validate_json((tmp_path / "found.json").read_text("utf-8")).loads
    assert loads is not None and loads.tokens == len(TEXT) and not loads.left_out

    model = Qwen3MoeForCausalLM.from_pretrained(folder).eval()
    expected_LE = torch.zeros(4, 8, dtype=torch.int64)
    with torch.no_grad():
        for ids_BS in windows():
            for layer, logits_TE in enumerate(model(ids_BS, output_router_logits=True).router_logits):
                ids_TK = logits_TE.softmax(dim=-1).topk(2, dim=-1).indices
                expected_LE[layer] += torch.bincount(ids_TK.flatten(), minlength=8)
    assert [list(layer.load) for layer in loads.layers] == expected_LE.tolist()
    for found, load_E in zip(loads.layers, expected_LE, strict=True):
        assert found.max_vio == float(max_violation(load_E)) and found.min_vio == float(min_violation(load_E))
        assert found.dead_experts == int(dead_experts(load_E)) and found.cv == float(load_cv(load_E))
        assert f"{found.max_vio:.3f}   {found.min_vio:.3f}" in result.stdout
    # The map: a row per layer, a place per expert, the most loaded ones darkest.
    rows = [line for line in result.stdout.splitlines() if line.endswith("|")]
    assert [len(row.partition("|")[2]) for row in rows] == [9] * 4
    assert "load / mean load" in result.stdout


def test_pictures(folder: Path, text: Path, tmp_path: Path) -> None:
    picture, page = tmp_path / "map.png", tmp_path / "out" / "page.html"
    result = inspect(folder, "--text", text, "--tokens", "100", "--picture", picture, "--html", page)
    assert result.exit_code == 0, result.output
    assert not [line for line in result.stdout.splitlines() if line.endswith("|")]
    assert picture.read_bytes().startswith(PNG)
    assert page.with_suffix(".png").read_bytes() == picture.read_bytes()
    html = page.read_text("utf-8")
    assert "softmax over 8, top 2" in html and "data:image/png;base64," in html and "100 tokens" in html
    assert "http" not in html.replace("http-equiv", "")
    assert f"page: {page}" in result.stdout and f"picture: {page.with_suffix('.png')}" in result.stdout


def test_a_page_without_a_text_has_no_map(folder: Path, tmp_path: Path) -> None:
    assert inspect(folder, "--config-only", "--html", tmp_path / "page.html").exit_code == 0
    assert "data:image" not in (tmp_path / "page.html").read_text("utf-8")
    assert not (tmp_path / "page.png").exists()


def test_the_tokenizer_of_the_folder(text: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = saved(qwen(), tmp_path / "model")
    words = Tokenizer(WordLevel({"it": 0, "was": 1, "the": 2, "best": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    result = inspect(folder, "--text", text)
    assert result.exit_code == 0, result.output
    assert "load on times.txt: 112 tokens, tokenizer of the model" in result.stdout  # 14 in every repetition
    assert "no tokenizer" not in result.stdout


def test_missing_weights_are_said_aloud(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.gate.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    result = inspect(tmp_path)
    assert result.exit_code == 0, result.output
    assert "missing in the checkpoint, so random: model.layers.2.mlp.gate.weight" in result.stdout


def test_a_refused_layer_is_a_row_of_its_own_and_no_failure() -> None:
    model = build(qwen())
    gate = model.get_submodule("model.layers.2.mlp.gate")
    gate.forward = gate.forward
    rows = folded(inspect_routers(model))
    assert [(ranges([row.layer or 0 for row in each]), each[0].status) for each in rows] == [
        ("0-1, 3", "proven"),
        ("2", "refused"),
    ]
    assert rows[1][0].reason is not None and "replaced on the instance" in rows[1][0].reason


def test_routers_that_cannot_be_swapped_or_counted(text: Path, tmp_path: Path) -> None:
    tiny_model(RouterClass("NllbMoeTop2Router", "nllb_moe")).save_pretrained(tmp_path / "model")
    result = inspect(tmp_path / "model", "--text", text)
    assert result.exit_code == 0, result.output
    assert "NllbMoeTop2Router   -   -   skipped" in result.stdout
    assert "0 of 6 routers can be swapped." in result.stdout
    assert "model.encoder.layers.0.ffn.router is not counted: it returns" in result.stdout


@pytest.mark.parametrize(
    "router",
    [
        RouterClass("MiniMaxM2TopKRouter", "minimax_m2"),  # the block hands in a correction bias
        RouterClass("HunYuanMoEV1Gate", "hunyuan_v1_moe"),  # its projection stays in float32
        RouterClass("DeepseekV4HashRouter", "deepseek_v4"),  # a table of integers; two kinds of routers
    ],
    ids=str,
)
def test_an_outline_tells_what_the_model_tells(router: RouterClass) -> None:
    real = tiny_model(router, dtype=torch.bfloat16)
    assert inspect_routers(*outline(type(real), real.config)) == inspect_routers(real)


def test_swapped_routers_are_named() -> None:
    model = build(qwen())
    swap(model, "topk", layers=[1])
    rows = inspect_routers(model)
    assert [row.router for row in rows] == [None, "topk", None, None]
    assert {row.stock_class for row in rows} == {"Qwen3MoeTopKRouter"}


def test_a_model_without_routers(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(LlamaConfig(**sizes, num_hidden_layers=1).to_json_string(), "utf-8")
    result = inspect(tmp_path)
    assert result.exit_code == 0, result.output
    assert "It has no routers" in result.stdout


@pytest.mark.parametrize(
    ("numbers", "written"),
    [
        (range(3, 61), "3-60"),
        ([0, 2, 3, 4, 9], "0, 2-4, 9"),
        (range(1, 48, 2), "1, 3, ..., 47"),
        ([1, 3], "1, 3"),
        ([5], "5"),
        ([], ""),
    ],
)
def test_ranges(numbers: range | list[int], written: str) -> None:
    assert ranges(list(numbers)) == written


def test_names() -> None:
    assert (pattern("encoder.block.3.layer.1.mlp.router"), layer_number("encoder.block.3.layer.1.mlp.router")) == (
        "encoder.block.*.layer.1.mlp.router",
        3,
    )
    assert layer_number("gate") is None


def test_wrong_usage(folder: Path, text: Path, tmp_path: Path) -> None:
    refused(inspect(folder, "--picture", tmp_path / "map.png"), "--picture needs --text")
    refused(inspect(folder, "--tokens", "5"), "--tokens needs --text")
    refused(inspect(folder, "--text", text, "--config-only"), "exclude each other")
    refused(inspect(folder, "--text", tmp_path / "none.txt"), "cannot read the text")
    (tmp_path / "empty.txt").touch()
    refused(inspect(folder, "--text", tmp_path / "empty.txt"), "it is empty")
    refused(inspect(folder / "config.json", "--text", text), "there are no weights")
    refused(inspect(tmp_path), "the folder has no config.json")


@pytest.mark.parametrize(
    ("written", "messages"),
    [
        ("{", ["is no config of a model"]),
        ('{"hidden_size": 8}', ["is no config of a model", "model_type"]),
        ('{"model_type": "no_such_type"}', ["cannot read", "model_type 'no_such_type'", "update transformers"]),
        ('{"model_type": "clipseg_vision_model"}', ["has no model for 'clipseg_vision_model'"]),
    ],
)
def test_configs_that_cannot_be_read(written: str, messages: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(written, "utf-8")
    refused(inspect(tmp_path), *messages)


def test_weights_that_cannot_be_loaded(text: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(qwen().to_json_string(), "utf-8")
    (tmp_path / "model.safetensors").write_text("no safetensors", "utf-8")
    result = inspect(tmp_path, "--text", text)
    assert result.exit_code == 1
    assert "transformers cannot load" in result.stderr
    assert inspect(tmp_path, "--config-only").exit_code == 0


def test_a_tokenizer_that_cannot_be_loaded(text: Path, tmp_path: Path) -> None:
    saved(qwen(), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{", "utf-8")
    result = inspect(tmp_path / "model", "--text", text)
    assert result.exit_code == 1
    assert "cannot load the tokenizer" in result.stderr


def test_a_model_that_needs_more_than_token_ids(folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needy(self: object, input_ids: object, sound: object) -> None: ...

    monkeypatch.setattr(Qwen3MoeForCausalLM, "forward", needy)
    result = inspect(folder, "--text", text)
    assert result.exit_code == 1
    assert "cannot be run on token ids alone" in result.stderr and "sound" in result.stderr


def test_a_hub_name_is_read_by_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name: qwen())
    result = inspect("some/model")
    assert result.exit_code == 0, result.output
    assert "some/model: Qwen3MoeForCausalLM, random weights" in result.stdout


def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise OSError(f"We couldn't connect to load {name}.\nCheck your connection.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    refused(inspect("some/model"), "there is no model 'some/model'", "couldn't connect", "while there is a network")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = inspect(folder)
    assert result.exit_code == 1
    assert 'pip install "moerouters[hf]"' in result.stderr
