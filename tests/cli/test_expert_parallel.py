"""`torchrun -m moerouters compare --expert-parallel N --dispatcher NAME`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moerouters.cli import app
from moerouters.lab.history import History
from moerouters.lab.results import Results
from support.lab import SMALL, arguments, write_text

FOUR = SMALL.override({"micro_batch_size": 4, "validation_sequences": 8})


def options(text: Path, output: Path, *more: str) -> list[str]:
    routers = ["--routers", "topk"]
    return [
        "compare",
        "--text",
        str(text),
        "--output",
        str(output),
        "--device",
        "cpu",
        *routers,
        *arguments(FOUR),
        *more,
    ]


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_trains_what_one_process_trains(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "moerouters"]
    spread = ["--expert-parallel", "4", "--dispatcher", "all_to_all"]
    done = subprocess.run(
        [*command, *options(text, tmp_path / "ranks", *spread)],
        capture_output=True,
        text=True,
        timeout=600,  # one minute on two idle cores
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "4 ranks, experts over groups of 4, dispatcher all_to_all" in done.stdout
    assert CliRunner().invoke(app, options(text, tmp_path / "alone")).exit_code == 0
    one, four = Results.load(tmp_path / "alone"), Results.load(tmp_path / "ranks")
    assert one is not None
    assert four is not None
    found = four.environment
    assert (found.ranks, found.expert_parallel, found.dispatcher) == (4, 4, "all_to_all")
    assert (one.environment.expert_parallel, one.environment.dispatcher) == (1, None)
    assert four.runs[0].parameters == one.runs[0].parameters
    assert four.runs[0].perplexity == pytest.approx(one.runs[0].perplexity, rel=1e-5)
    histories = [History.load(tmp_path / "alone" / str(one.runs[0].history))]
    histories.append(History.load(tmp_path / "ranks" / str(four.runs[0].history)))
    first, second = (history.tensors() for history in histories)
    torch.testing.assert_close(second["train_loss"], first["train_loss"], rtol=0, atol=1e-4)
    assert torch.equal(second["loads"], first["loads"])


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_trains_it_in_a_pipeline(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m", "moerouters"]
    spread = ["--pipeline", "2", "--tensor", "2", "--schedule", "zero-bubble-h1"]
    done = subprocess.run(
        [*command, *options(text, tmp_path / "ranks", *spread)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "4 ranks, layers in pipelines of 2, zero-bubble-h1" in done.stdout
    assert CliRunner().invoke(app, options(text, tmp_path / "alone")).exit_code == 0
    one, four = Results.load(tmp_path / "alone"), Results.load(tmp_path / "ranks")
    assert one is not None and four is not None
    found = four.environment
    assert (found.pipeline, found.schedule, found.expert_parallel, found.dispatcher) == (
        2,
        "zero-bubble-h1",
        2,
        "tensor_sliced",
    )
    assert four.runs[0].parameters == one.runs[0].parameters
    assert four.runs[0].perplexity == pytest.approx(one.runs[0].perplexity, rel=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--expert-parallel", "2"], "1 rank cannot form groups of 2"),
        (["--dispatcher", "all_to_all"], "there is nothing to dispatch"),
        (["--model-parallel", "2"], "there is nothing to dispatch"),
        (["--pipeline", "2"], "1 rank cannot form pipelines of 2 x 1"),
        (["--pipeline", "2", "--schedule", "none"], "there is no schedule 'none'."),
        (["--pipeline", "4"], "2 layers cannot be cut into 4 stages"),
        (["--tensor", "2"], "1 rank cannot form groups of 2"),
        (["--tensor", "2", "--dispatcher", "padded"], "experts are spread in two ways"),
        (["--pipeline", "2", "--expert-parallel", "2"], "experts are spread in two ways"),
        (["--schedule", "1f1b"], "there is nothing to schedule"),
    ],
)
def test_what_needs_ranks_is_refused_without(tmp_path: Path, more: list[str], message: str) -> None:
    result = CliRunner().invoke(app, options(write_text(tmp_path), tmp_path / "out", *more))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
