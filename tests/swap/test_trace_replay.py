"""`moerouters trace` and `moerouters replay`: logits recorded as the model computes them, routers evaluated on them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3MoeForCausalLM
from typer.testing import CliRunner, Result

from moerouters import registry, swap
from moerouters.cli import app
from moerouters.errors import ConfigError, TraceError, UnsupportedError
from moerouters.inspecting.logits_trace import LayerLogits, LogitsTrace
from moerouters.inspecting.offline import evaluate
from moerouters.inspecting.offline_report import OfflineReport, RouterOffline
from moerouters.inspecting.offline_routers import PLAIN, Chosen, chosen_routers
from moerouters.inspecting.recording import record_logits
from moerouters.swapping.module import SwappedRouter
from moerouters.swapping.reading import Projection, Reading

from .checkpoints import TEXT, build, deepseek, windows
from .life import batch, prepared, tiny
from .zoo import RouterClass, tiny_inputs, tiny_model

TOKENS = 4000
EXPERTS, CHOSEN = 8, 2


@pytest.fixture(scope="module")
def skewed() -> LogitsTrace:
    """Two layers whose first experts are liked best."""
    generator = torch.Generator().manual_seed(0)
    reading = Reading(
        num_experts=EXPERTS, top_k=CHOSEN, projection=Projection(weight="weight"), score="softmax", finish=()
    )
    layers = {}
    for name in ("0.gate", "1.gate"):
        logits_TE = torch.randn(TOKENS, EXPERTS, generator=generator) + torch.linspace(1, 0, EXPERTS)
        layers[name] = LayerLogits(
            logits_TE=logits_TE,
            reading=reading,
            weight_dtype=torch.float32,
            hidden_dtype=torch.float32,
            tensors={},
            stock_class="Gate",
        )
    return LogitsTrace(layers=layers, sequence_ids_T=torch.arange(TOKENS) // 100)


def command(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [*map(str, arguments)])


def routed(layer: LayerLogits) -> Tensor:
    """[T, K]: what topk makes of the recorded logits."""
    with torch.no_grad():
        ids_TK = PLAIN.build(layer).eval()(layer.logits_TE).expert_ids_TK
    assert isinstance(ids_TK, Tensor)
    return ids_TK


def chosen_ids(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], LogitsTrace]:
    """What the gates of a model hand out in one forward, and the trace of it."""
    ids: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, results: ids.__setitem__(name, results[2])

    with torch.no_grad(), record_logits(model) as recorder:
        hooks = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if n.endswith("mlp.gate")]
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return ids, recorder.trace()


def test_the_trace_holds_what_the_model_computes(folder: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "trace.safetensors"
    result = command("trace", folder, "--text", text, "--output", output)
    assert result.exit_code == 0, result.output
    assert f"{output}, {len(TEXT)} tokens, 4 routers, float32 logits" in result.stdout
    assert "bytes modulo the vocabulary" in result.stdout
    trace = LogitsTrace.load(output)
    assert (trace.tokens, trace.about.model, trace.about.text) == (len(TEXT), "tiny-qwen", "times.txt")
    model = Qwen3MoeForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        passes = [model(ids_BS, output_router_logits=True).router_logits for ids_BS in windows()]
    for number, layer in enumerate(trace.layers.values()):
        assert torch.equal(layer.logits_TE, torch.cat([router_logits[number] for router_logits in passes]))
    assert trace.token_ids_T is not None and trace.sequence_ids_T is not None
    assert trace.token_ids_T.tolist() == [byte % 128 for byte in TEXT]
    assert torch.equal(trace.sequence_ids_T, torch.arange(len(TEXT)) // 64)


def test_tokens_bound_the_trace(folder: Path, text: Path, tmp_path: Path) -> None:
    assert command("trace", folder, "--text", text, "--output", tmp_path / "t", "--tokens", "70").exit_code == 0
    assert LogitsTrace.load(tmp_path / "t").tokens == 70


def test_topk_gives_the_models_own_choice(tmp_path: Path) -> None:
    """With a correction bias, groups and 16-bit weights: the very ids, in their order."""
    model = build(deepseek())
    ids, trace = chosen_ids(model, {"input_ids": torch.cat(windows()[:1])})
    trace.save(tmp_path / "trace.safetensors")
    loaded = LogitsTrace.load(tmp_path / "trace.safetensors")
    assert loaded.layers.keys() == ids.keys() == {f"model.layers.{i}.mlp.gate" for i in (1, 2)}
    for name, layer in loaded.layers.items():
        assert layer.tensors["e_score_correction_bias"].abs().sum() > 0
        assert layer.weight_dtype == torch.bfloat16
        assert torch.equal(routed(layer), ids[name])


@pytest.mark.parametrize(
    "router",
    [
        RouterClass("DbrxRouter", "dbrx"),
        RouterClass("Gemma4TextRouter", "gemma4"),
        RouterClass("InklingTopkRouter", "inkling"),
        RouterClass("PhimoeTopKRouter", "phimoe"),
        RouterClass("SwitchTransformersTop1Router", "switch_transformers"),
    ],
    ids=str,
)
def test_routers_with_adapters_of_their_own_are_recorded(router: RouterClass, tmp_path: Path) -> None:
    from moerouters.inspecting.expert_loads import LoadCounter

    model = tiny_model(router, dtype=torch.bfloat16)
    with torch.no_grad(), record_logits(model) as recorder, LoadCounter(model) as counter:
        model(**tiny_inputs(model))
    recorder.trace().save(tmp_path / "trace.safetensors")
    for name, layer in LogitsTrace.load(tmp_path / "trace.safetensors").layers.items():
        load_E = torch.bincount(routed(layer).flatten(), minlength=layer.reading.num_experts)
        assert torch.equal(load_E, counter.loads[name].long())


def test_padding_is_left_out() -> None:
    model = tiny("qwen")
    inputs = batch(padding="left")
    del inputs["labels"]
    ids, trace = chosen_ids(model, inputs)
    valid_T = inputs["attention_mask"].bool().reshape(-1)
    assert trace.tokens == int(valid_T.sum()) == 20
    assert trace.sequence_ids_T is not None and torch.bincount(trace.sequence_ids_T).tolist() == [12, 8]
    for name, layer in trace.layers.items():
        assert torch.equal(routed(layer), ids[name][valid_T])


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
def test_every_token_counts_once_with_activation_checkpointing(checkpointing: str) -> None:
    model = prepared(tiny("qwen"), checkpointing=checkpointing)
    with record_logits(model) as recorder:
        for seed in (1, 2):
            model(**batch(seed)).loss.backward()
    assert {len(layer.logits_TE) for layer in recorder.trace().layers.values()} == {48}
    assert next(model.parameters()).grad is not None


def test_noise_of_a_model_in_training_is_made_once() -> None:
    model = tiny_model(RouterClass("PhimoeTopKRouter", "phimoe")).train()
    for module in model.modules():
        if hasattr(module, "input_jitter_noise"):
            module.input_jitter_noise = 0.1

    def loss() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            found = model(**tiny_inputs(model), labels=tiny_inputs(model)["input_ids"]).loss
        assert isinstance(found, Tensor)
        return found

    alone = loss()
    with record_logits(model) as recorder:
        assert torch.equal(loss(), alone)
    assert recorder.trace().tokens == 24


def test_the_model_stays_what_it_was() -> None:
    model = tiny("qwen")
    before = {name: type(module) for name, module in model.named_modules()}
    with record_logits(model):
        pass
    assert before == {name: type(module) for name, module in model.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_swapped_model_gives_the_bias_of_the_stock_one() -> None:
    model = build(deepseek())
    stock_E = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").clone()
    swap(model, "loss-free", config={"rate": 0.1})
    gate = model.get_submodule("model.layers.1.mlp.gate")
    assert isinstance(gate, SwappedRouter)
    with torch.no_grad():
        gate.router.update({"load_E": torch.arange(16)})
        gate.learned()
        assert not torch.equal(model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias"), stock_E)
        with record_logits(model) as recorder:
            model(torch.cat(windows()[:1]))
    layer = recorder.trace().layers["model.layers.1.mlp.gate"]
    assert torch.equal(layer.tensors["e_score_correction_bias"], stock_E)
    assert layer.stock_class == "DeepseekV3TopkRouter"


def test_what_cannot_be_recorded() -> None:
    model = tiny("qwen")
    gate = model.get_submodule("model.layers.1.mlp.gate")
    gate.forward = gate.forward
    with record_logits(model) as recorder, pytest.raises(TraceError, match="no router has seen a token"):
        recorder.trace()
    assert list(recorder.left_out) == ["model.layers.1.mlp.gate"]
    with pytest.raises(UnsupportedError, match="can be recorded"), record_logits(nn.Linear(1, 1)):
        pass


def rows(trace: LogitsTrace, routers: str, steps: int) -> dict[str, RouterOffline]:
    chosen, skipped = chosen_routers(routers, trace)
    assert not skipped
    return {row.label: row for row in evaluate(trace, chosen, steps=steps).routers}


def test_balancers_balance_and_pay_for_it(skewed: LogitsTrace) -> None:
    found = rows(skewed, "loss-free:rate=0.01,bip,bip:iterations=14,topk", 20)
    topk, free, bip = found["topk"], found["loss-free:rate=0.01"], found["bip"]
    assert (topk.kept_score, topk.changed, topk.relative_time) == (1.0, 0.0, 1.0)
    assert free.last_max_vio < 0.6 * topk.last_max_vio and free.avg_max_vio < topk.avg_max_vio
    assert bip.sup_max_vio < 0.6 * topk.avg_max_vio
    assert 0.7 < bip.kept_score < 1 and 0.05 < bip.changed < 0.9
    assert found["bip:iterations=14"].overrides == {"iterations": 14}
    assert all(row.step_ms > 0 for row in found.values())
    assert [layer.name for layer in bip.layers] == ["0.gate", "1.gate"]
    assert bip.avg_max_vio == pytest.approx(sum(layer.avg_max_vio for layer in bip.layers) / 2)


def test_the_numbers_of_one_step_by_hand(skewed: LogitsTrace) -> None:
    bip = rows(skewed, "bip", 1)["bip"]
    assert bip.relative_time > 0  # topk ran although nobody asked for it
    for layer, result in zip(skewed.layers.values(), bip.layers, strict=True):
        with torch.no_grad():
            ids_TK = registry.build("bip", layer.gating()).train()(layer.logits_TE).expert_ids_TK.tolist()
        plain_TK = routed(layer).tolist()
        scores_TE = layer.logits_TE.softmax(dim=-1).double()
        kept = sum(float(scores_TE[t, e]) for t, row in enumerate(ids_TK) for e in row)
        best = sum(float(scores_TE[t, e]) for t, row in enumerate(plain_TK) for e in row)
        new = sum(len(set(row) - set(plain)) for row, plain in zip(ids_TK, plain_TK, strict=True))
        loads = [sum(e in row for row in ids_TK) for e in range(EXPERTS)]
        assert result.kept_score == pytest.approx(kept / best)
        assert result.changed == pytest.approx(new / (TOKENS * CHOSEN))
        assert result.avg_max_vio == result.last_max_vio == pytest.approx(max(loads) * EXPERTS / sum(loads) - 1)


def test_replay_prints_a_table_and_writes_json(skewed: LogitsTrace, tmp_path: Path) -> None:
    skewed.save(tmp_path / "trace.safetensors")
    arguments = ("--routers", "topk,bip:iterations=8;variant=published", "--steps", "4", "--json", tmp_path / "r.json")
    result = command("replay", tmp_path / "trace.safetensors", *arguments)
    assert result.exit_code == 0, result.output
    assert "4000 tokens in 4 steps, 2 routers of the model" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("topk"))
    assert line.split()[4:] == ["1.0000", "0.0%", "1.00"]
    report = OfflineReport.model_validate_json((tmp_path / "r.json").read_text("utf-8"))
    assert (report.schema_version, report.steps, report.tokens) == (1, 4, TOKENS)
    assert report.routers[1].label == "bip:iterations=8;variant=published"


def test_the_default_is_every_router_that_can_serve(skewed: LogitsTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "available", lambda: ("bip", "nobody", "topk"))
    chosen, skipped = chosen_routers(None, skewed)
    assert [each.label for each in chosen] == ["bip", "topk"]
    assert "nobody" in skipped["nobody"]


def test_a_router_that_saw_fewer_tokens_is_replayed_on_them(skewed: LogitsTrace) -> None:
    first, second = skewed.layers.values()
    shorter = LayerLogits(**{**vars(second), "logits_TE": second.logits_TE[:5]})
    trace = LogitsTrace(layers={"text": first, "image": shorter}, sequence_ids_T=skewed.sequence_ids_T)
    assert trace.tokens == TOKENS
    row = evaluate(trace, [Chosen(label="bip", name="bip")], steps=5).routers[0]
    assert [layer.name for layer in row.layers] == ["text", "image"]
    with pytest.raises(ConfigError, match="5 tokens cannot be split in 6 steps"):
        evaluate(trace, [PLAIN], steps=6)


def refused(result: Result, *messages: str, status: int = 2) -> None:
    assert result.exit_code == status, result.output
    assert all(message in result.stderr for message in messages), result.stderr


@pytest.fixture
def saved_trace(skewed: LogitsTrace, tmp_path: Path) -> Iterator[Path]:
    skewed.save(tmp_path / "trace.safetensors")
    yield tmp_path / "trace.safetensors"


def test_wrong_usage(saved_trace: Path, folder: Path, tmp_path: Path) -> None:
    refused(command("replay", saved_trace, "--routers", "topk,topk"), "'topk' is named twice")
    refused(command("replay", saved_trace, "--routers", "nobody"), "nobody")
    refused(command("replay", saved_trace, "--routers", "bip:iteration=3"), "iteration")
    refused(command("replay", saved_trace, "--steps", "9999"), "4000 tokens cannot be split in 9999 steps")
    refused(command("trace", folder, "--output", tmp_path / "t"), "--text")
    refused(command("trace", folder, "--text", tmp_path / "none", "--output", tmp_path / "t"), "cannot read the text")


def test_files_that_are_no_trace(saved_trace: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    refused(command("replay", other), "cannot read the trace", status=1)
    other.write_text("no safetensors", "utf-8")
    refused(command("replay", other), "cannot read the trace", status=1)
    save_file({"x": torch.zeros(1)}, other, metadata={"schema": "moerouters.trace/1"})
    refused(command("replay", other), "expected 'moerouters.logits/1'", status=1)
    save_file(load_file(saved_trace), other, metadata={"schema": "moerouters.logits/1", "layers": "{}"})
    refused(command("replay", other), "damaged, or of a later release", status=1)
