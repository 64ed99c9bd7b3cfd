import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moerouters import RouterSpec, registry
from moerouters.errors import ConfigError
from moerouters.lab.compare import environment
from moerouters.lab.corpus import Corpus, from_path
from moerouters.lab.history import History
from moerouters.lab.interrupt import StopRequest
from moerouters.lab.ranks import Ranks
from moerouters.lab.results import Results
from moerouters.lab.run import run_name
from support.balanced import Balanced
from support.lab import CPU, SMALL, Listener, run_comparison, timeless


def files(output: Path) -> list[str]:
    return sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())


def test_results_are_what_is_written(output: Path, corpus: Corpus, balanced: None) -> None:
    listener = Listener()
    results = run_comparison(output, corpus, "topk,balanced", listener=listener)
    assert Results.load(output) == results
    assert results.status == "completed"
    assert [run.label for run in results.runs] == ["topk", "balanced"]
    assert listener.ended == list(results.runs)
    assert listener.started == [("topk", 0, 0), ("balanced", 0, 0)]
    assert files(output) == [
        "results.json",
        "runs/balanced-seed0/history.safetensors",
        "runs/topk-seed0/history.safetensors",
    ]
    assert not torch.are_deterministic_algorithms_enabled()


def test_results_json_has_what_others_read(output: Path, corpus: Corpus) -> None:
    run_comparison(output, corpus)
    content = json.loads((output / "results.json").read_text("utf-8"))
    assert content["schema_version"] == 1
    assert content["corpus"]["sha256"] == corpus.info.sha256
    assert content["settings"]["steps"] == SMALL.steps
    run = content["runs"][0]
    numbers = ("perplexity", "avg_max_vio", "sup_max_vio", "min_vio", "dead_experts", "step_ms", "router_share")
    assert all(isinstance(run[name], (int, float)) for name in numbers)
    assert run["router"] == "topk"
    assert run["provenance"]["distribution"] == "moerouters"
    assert len(run["layers"]["avg_max_vio"]) == SMALL.num_layers


def test_the_balancer_balances(output: Path, corpus: Corpus, balanced: None) -> None:
    settings = SMALL.override({"steps": 20})
    topk, even = run_comparison(output, corpus, "topk,balanced", settings=settings).runs
    assert even.avg_max_vio is not None
    assert topk.avg_max_vio is not None
    assert even.avg_max_vio < topk.avg_max_vio


def test_seeds_differ_and_routers_share_them(output: Path, corpus: Corpus, balanced: None) -> None:
    results = run_comparison(output, corpus, "topk,balanced", seeds=(0, 1))
    assert [(run.label, run.seed) for run in results.runs] == [
        ("topk", 0),
        ("balanced", 0),
        ("topk", 1),
        ("balanced", 1),
    ]
    first = [float(History.load(output / str(run.history)).train_loss[0]) for run in results.runs]
    assert first[0] == pytest.approx(first[1], abs=1e-12)  # before the first update they are the same model
    assert first[0] != pytest.approx(first[2], abs=1e-6)


def interrupt_at(step: int) -> Listener:
    """Presses Ctrl-C in the run that reaches this step."""

    def press(history: History) -> None:
        if len(history) == step:
            os.kill(os.getpid(), signal.SIGINT)

    return Listener(press)


def test_interrupt_and_resume_give_the_same_numbers(
    output: Path, tmp_path: Path, corpus: Corpus, balanced: None
) -> None:
    with StopRequest() as stop:
        partial = run_comparison(output, corpus, "balanced,topk", listener=interrupt_at(3), stop=stop)
    assert stop.signal == signal.SIGINT
    assert (partial.status, [run.status for run in partial.runs]) == ("interrupted", ["interrupted"])
    run = partial.runs[0]
    assert (run.steps, run.perplexity) == (3, None)
    assert run.avg_max_vio is not None
    assert "runs/balanced-seed0/checkpoint.pt" in files(output)

    listener = Listener()
    resumed = run_comparison(output, corpus, "balanced,topk", listener=listener, resume=True)
    assert listener.started == [("balanced", 0, 3), ("topk", 0, 0)]
    whole = run_comparison(tmp_path / "whole", corpus, "balanced,topk")
    assert timeless(resumed) == timeless(whole)
    for run in whole.runs:
        one, two = (History.load(folder / str(run.history)).tensors() for folder in (output, tmp_path / "whole"))
        assert all(torch.equal(one[name], two[name]) for name in ("loads", "micro_max_vio", "train_loss"))
    assert "runs/balanced-seed0/checkpoint.pt" not in files(output)


def test_resume_trains_only_what_is_missing(output: Path, corpus: Corpus, balanced: None) -> None:
    run_comparison(output, corpus, "topk")
    listener = Listener()
    results = run_comparison(output, corpus, "balanced,topk", listener=listener, resume=True, seeds=(0, 1))
    assert listener.started == [("balanced", 0, 0), ("balanced", 1, 0), ("topk", 1, 0)]
    assert len(results.runs) == 4


def test_an_interrupted_comparison_is_not_thrown_away(output: Path, corpus: Corpus) -> None:
    with StopRequest() as stop:
        run_comparison(output, corpus, listener=interrupt_at(2), stop=stop)
    with pytest.raises(ConfigError, match="add --resume to continue it, --overwrite to start again"):
        run_comparison(output, corpus)
    listener = Listener()
    assert run_comparison(output, corpus, listener=listener, overwrite=True).status == "completed"
    assert listener.started == [("topk", 0, 0)]


def test_a_finished_comparison_is_replaced(output: Path, corpus: Corpus, balanced: None) -> None:
    run_comparison(output, corpus, "balanced")
    assert [run.label for run in run_comparison(output, corpus, "topk").runs] == ["topk"]
    assert files(output) == ["results.json", "runs/topk-seed0/history.safetensors"]


def test_resume_on_other_text_is_refused_before_training(output: Path, tmp_path: Path, corpus: Corpus) -> None:
    run_comparison(output, corpus)
    (tmp_path / "other.txt").write_text("something else " * 50, encoding="utf-8")
    with pytest.raises(ConfigError, match="measured on different text"):
        run_comparison(output, from_path(tmp_path / "other.txt"), resume=True)
    with pytest.raises(ConfigError, match="steps: 6 and 7"):
        run_comparison(output, corpus, resume=True, settings=SMALL.override({"steps": 7}))


def test_resume_and_overwrite_exclude_each_other(output: Path, corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        run_comparison(output, corpus, resume=True, overwrite=True)
    assert not output.exists()


def test_too_little_text_is_refused(output: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short " * 20, encoding="utf-8")
    with pytest.raises(ConfigError, match="a window needs 9"):
        run_comparison(output, from_path(tmp_path / "short.txt"))


class Breaks(Balanced):
    """Raises in its second update."""

    def __init__(self, gating: Any) -> None:
        super().__init__(gating)
        self.updates = 0

    def update(self, stats: Mapping[str, Tensor]) -> None:
        self.updates += 1
        if self.updates == 2:
            raise ZeroDivisionError("a bug of the plugin")


def test_a_run_that_fails_does_not_stop_the_others(output: Path, corpus: Corpus) -> None:
    spec = RouterSpec(name="breaks", summary="s", factory=lambda gating, config: Breaks(gating), api="0.1")
    spec = spec.model_copy(update={"capabilities": Balanced.capabilities})
    with registry.temporary(spec):
        results = run_comparison(output, corpus, "breaks,topk")
    assert results.status == "failed"
    assert [(run.label, run.status, run.steps) for run in results.runs] == [
        ("breaks", "failed", 1),
        ("topk", "completed", SMALL.steps),
    ]
    assert results.runs[0].error == "ZeroDivisionError: a bug of the plugin"
    assert "in update" in (output / "runs" / "breaks-seed0" / "error.txt").read_text("utf-8")


def test_exploding_weights_fail_naming_the_layer(output: Path, corpus: Corpus) -> None:
    settings = SMALL.override({"learning_rate": 1e38, "warmup_steps": 0})
    results = run_comparison(output, corpus, settings=settings)
    assert results.runs[0].status == "failed"
    assert str(results.runs[0].error).startswith("NonFiniteLogits: the gate of layer 'blocks.0.moe' gave NaN")
    assert Results.load(output) == results


def test_with_many_ranks_a_bug_ends_the_job(output: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank that goes on alone would wait for the others for ever."""

    def broken(self: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("moerouters.lab.train.Trainer.train_step", broken)
    monkeypatch.setattr(Ranks, "sum", lambda self, value: value)
    with pytest.raises(ZeroDivisionError):
        run_comparison(output, corpus, ranks=Ranks(0, 2))


def test_only_the_first_rank_writes(output: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: object) -> None:
        raise ConfigError("symmetric on all ranks")

    monkeypatch.setattr("moerouters.lab.train.Trainer.train_step", failing)
    monkeypatch.setattr(Ranks, "sum", lambda self, value: value)
    assert run_comparison(output, corpus, ranks=Ranks(1, 2)).status == "failed"
    assert not output.exists()


def test_run_names() -> None:
    assert run_name("loss-free", 3) == "loss-free-seed3"
    names = [run_name(label, 0) for label in ("a:x=1", "a:x=2", "a:x=1;y=/../..", "A", "a-x-1")]
    assert len(set(names)) == 5
    assert all("/" not in name and not name.startswith(".") for name in names)


def test_environment_names_no_machine() -> None:
    found = environment(CPU, SMALL, Ranks())
    assert (found.device, found.ranks, found.autocast, found.deterministic) == ("cpu", 1, None, True)
    assert os.uname().nodename not in found.platform
