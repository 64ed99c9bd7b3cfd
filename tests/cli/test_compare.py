import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from moerouters import registry
from moerouters.cli import app
from moerouters.lab.history import History
from moerouters.lab.job import choose_device, set_threads
from moerouters.lab.results import Results
from support.lab import BALANCED, EVEN, SMALL, arguments, timeless, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def balanced() -> Iterator[None]:
    with registry.temporary(BALANCED):
        yield


def compare(text: Path, output: Path, *options: str) -> Result:
    command = ["compare", "--text", str(text), "--output", str(output), "--device", "cpu", *arguments(), *options]
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, command)


def refused(result: Result, *messages: str) -> None:
    """Exit status 2, the messages on standard error, nothing trained."""
    assert result.exit_code == 2, result.output
    assert all(message in result.stderr for message in messages), result.stderr
    assert "perplexity" not in result.stdout


def test_two_routers(text: Path, tmp_path: Path, balanced: None) -> None:
    result = compare(text, tmp_path, "--routers", "topk,balanced", "--seeds", "2")
    assert result.exit_code == 0, result.output
    assert "routers: topk, balanced" in result.stdout
    assert "preset tiny: 6 steps of 32 bytes, seeds 0, 1, on cpu" in result.stdout
    assert f"report: {tmp_path / 'report.html'}" in result.stdout
    found = Results.load(tmp_path)
    assert found is not None
    assert [(run.label, run.seed) for run in found.runs][:2] == [("topk", 0), ("balanced", 0)]
    assert found.corpus.sha256[:12] in result.stdout
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"max_vio.png", "loss.png", "load.png"}
    assert (tmp_path / "report.html").read_text("utf-8").startswith("<!DOCTYPE html>")


def test_default_is_every_router_that_loads(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.fake_plugins import entry

    builtin = entry("topk", "moerouters.builtin", distribution="moerouters")
    own = registry.Registry(discover=lambda: (entry("broken"), builtin), environ={})
    monkeypatch.setattr("moerouters.registry.default._registry", own)
    result = compare(text, tmp_path)
    assert result.exit_code == 0, result.output
    assert "routers: topk\n" in result.stdout
    assert "skipped broken: router 'broken' is installed, but its plugin cannot be loaded." in result.stdout
    assert "No module named &#39;fake_broken&#39;" in (tmp_path / "report.html").read_text("utf-8")


def test_options_override_the_preset(text: Path, tmp_path: Path) -> None:
    options = ["--steps", "2", "--learning-rate", "0.5", "--experts", "8", "--top-k", "3", "--checkpoint-every", "1"]
    names = ("steps", "learning_rate", "num_experts", "top_k", "checkpoint_every")
    others = [f"--set={name}={json.dumps(value)}" for name, value in SMALL.model_dump().items() if name not in names]
    command = ["compare", "--text", str(text), "--output", str(tmp_path), "--routers", "topk", *options, *others]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = Results.load(tmp_path)
    assert found is not None
    assert [getattr(found.settings, name) for name in names] == [2, 0.5, 8, 3, 1]


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--routers", "topc"], ["RouterNotFound", "did you mean 'topk'"]),
        (["--routers", "topk:x=1"], ["ConfigError", "x: unknown field"]),
        (["--set", "stepz=3"], ["did you mean 'steps'"]),
        (["--set", "steps"], ["it is not name=value"]),
        (["--steps", "7"], ["'steps' is given twice"]),
        (["--preset", "tinny"], ["did you mean 'tiny'"]),
        (["--device", "gpu"], ["no device named 'gpu'"]),
    ],
)
def test_bad_options(text: Path, tmp_path: Path, options: list[str], messages: list[str]) -> None:
    refused(compare(text, tmp_path, *options), *messages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["top_k=5"], "top_k 5 exceeds num_experts 4"),
        (["num_groups=3"], "num_experts 4 is not a multiple of num_groups 3"),
        (["num_heads=3"], "does not give 3 heads"),
        (["steps=0"], "steps: input should be greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit(text: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    settings = {name: value for name, value in SMALL.model_dump().items() if name != changes[0].split("=")[0]}
    sets = [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    sets += [f"--set={change}" for change in changes]
    result = CliRunner().invoke(app, ["compare", "--text", str(text), "--output", str(tmp_path), *sets])
    refused(result, message)


def test_bad_text_and_output(text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    refused(compare(empty, tmp_path / "out"), "there is no text in")
    refused(compare(tmp_path / "missing", tmp_path / "out"), "there is no text at")
    refused(compare(text, empty / "out"), "cannot write to the output folder")


def test_no_cuda(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(compare(text, tmp_path, "--device", "cuda"), "there is no CUDA device")
    assert choose_device("auto") == torch.device("cpu")


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto") == torch.device("cuda", 3)
    assert choose_device("cpu") == torch.device("cpu")
    assert chosen == [torch.device("cuda", 3)]


def test_one_thread_unless_openmp_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    set_threads()
    assert chosen == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    set_threads()
    assert chosen == [1]


def test_a_failed_run_is_reported_and_fails_the_command(text: Path, tmp_path: Path) -> None:
    settings = SMALL.override({"learning_rate": 1e38, "warmup_steps": 0})
    command = ["compare", "--text", str(text), "--output", str(tmp_path), "--routers", "topk", *arguments(settings)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1, result.output
    assert "the gate of layer 'blocks.0.moe' gave NaN" in result.stdout
    assert "the gate of layer &#39;blocks.0.moe&#39; gave NaN" in (tmp_path / "report.html").read_text("utf-8")


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, *, times: int) -> None:
    """Sends SIGINT to this process at the third step, every two seconds."""
    seconds = count(step=2)
    monkeypatch.setattr("moerouters.lab.interrupt.time.monotonic", lambda: float(next(seconds)))
    from moerouters.lab.console import ConsoleProgress

    stepped = ConsoleProgress.stepped

    def press(self: ConsoleProgress, history: History) -> None:
        stepped(self, history)
        if len(history) == 3:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ConsoleProgress, "stepped", press)


def test_ctrl_c_writes_partial_results_and_report(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, times=1)
        result = compare(text, tmp_path, "--routers", "topk")
    assert result.exit_code == 130, result.output
    assert "interrupted; the same command with --resume continues" in result.stdout
    found = Results.load(tmp_path)
    assert found is not None
    assert (found.status, found.runs[0].status, found.runs[0].steps) == ("interrupted", "interrupted", 3)
    assert "This comparison is not finished" in (tmp_path / "report.html").read_text("utf-8")
    refused(compare(text, tmp_path, "--routers", "topk"), "add --resume to continue it")
    assert compare(text, tmp_path, "--routers", "topk", "--resume").exit_code == 0


def test_a_second_ctrl_c_leaves_at_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    press_ctrl_c(monkeypatch, times=2)
    result = compare(text, tmp_path, "--routers", "topk")
    assert result.exit_code == 130
    assert not (tmp_path / "report.html").exists()
    found = Results.load(tmp_path)
    assert found is not None
    assert found.status == "running"


def test_the_lab_is_not_imported_with_the_library() -> None:
    program = (
        "import sys, moerouters, moerouters.cli; "
        "print([name for name in sys.modules if name.startswith(('moerouters.lab', 'matplotlib', 'jinja2'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


KILLED = """
import os, signal
from moerouters.cli import main
from moerouters.lab.console import ConsoleProgress

def die(self, history, stepped=ConsoleProgress.stepped):
    stepped(self, history)
    if len(history) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

ConsoleProgress.stepped = die
main()
"""


@pytest.mark.dist
def test_sigkill_and_resume_give_the_same_numbers(text: Path, tmp_path: Path) -> None:
    options = ["--text", str(text), "--device", "cpu", "--routers", "topk", *arguments()]
    command = [sys.executable, "-c", KILLED, "compare", "--output", str(tmp_path / "killed"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = CliRunner().invoke(app, ["compare", "--resume", "--output", str(tmp_path / "killed"), *options])
    assert resumed.exit_code == 0, resumed.output
    assert "topk, seed 0: resumed at step 4" in resumed.stdout  # checkpoints stand at 2 and 4, the kill was in 5
    assert CliRunner().invoke(app, ["compare", "--output", str(tmp_path / "whole"), *options]).exit_code == 0
    killed, whole = Results.load(tmp_path / "killed"), Results.load(tmp_path / "whole")
    assert killed is not None
    assert whole is not None
    assert timeless(killed) == timeless(whole)


RANKS = """
from moerouters import registry
from moerouters.cli import main
from support.lab import EVEN, STRAYING

with registry.temporary(EVEN), registry.temporary(STRAYING):
    main()
"""


def torchrun(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Two ranks on this machine."""
    program = tmp_path / "ranks.py"
    program.write_text(RANKS, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    tests = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=200, check=False, env=environment
    )


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_train_the_same_model_as_one_process(text: Path, tmp_path: Path) -> None:
    """And a router whose state differs between the ranks is found out."""
    options = ["compare", "--text", str(text), "--device", "cpu", *arguments()]
    done = torchrun(tmp_path, *options, "--output", str(tmp_path / "ranks"), "--routers", "topk,even,straying")
    ranks = Results.load(tmp_path / "ranks")
    assert ranks is not None, done.stderr
    assert [(run.label, run.status) for run in ranks.runs] == [
        ("topk", "completed"),
        ("even", "completed"),
        ("straying", "failed"),
    ]
    assert done.returncode != 0
    assert "after training, ranks [1] hold other balancer state than rank 0" in done.stdout
    assert done.stdout.count("report: ") == 1  # one rank speaks
    assert ranks.environment.ranks == 2

    with registry.temporary(EVEN):
        alone = CliRunner().invoke(app, [*options, "--output", str(tmp_path / "alone"), "--routers", "topk,even"])
    assert alone.exit_code == 0, alone.output
    one = Results.load(tmp_path / "alone")
    assert one is not None
    for here, there in zip(one.runs, ranks.runs, strict=False):
        assert there.perplexity == pytest.approx(here.perplexity, rel=1e-5)
        first, second = (History.load(tmp_path / folder / str(here.history)).tensors() for folder in ("alone", "ranks"))
        torch.testing.assert_close(first["train_loss"], second["train_loss"], rtol=1e-5, atol=0)
        assert torch.equal(first["loads"], second["loads"])
        assert torch.equal(first["micro_max_vio"], second["micro_max_vio"])
