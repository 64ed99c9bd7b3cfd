"""Interleaved timing, and the benchmark of swapped routers at toy size."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moerouters.bench import swap, timing
from moerouters.cli import app
from support.clock import Seconds
from support.threads import torch_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    with torch_threads():
        yield


def test_ratios_are_to_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the candidates advance: a busy machine makes sleeps of 2 ms last as long as those of 6."""
    clock = Seconds()
    monkeypatch.setattr("time.perf_counter", clock)
    waits = itertools.cycle([5, 7, 6])
    timings = timing.interleaved(
        {"peer": lambda: clock.pass_by(2), "slow": lambda: clock.pass_by(next(waits))},
        peer="peer",
        device=CPU,
        rounds=6,
    )
    assert timings["peer"].ratio == 1.0
    assert timings["slow"] == timing.Timing(median_ms=6e3, ratio=3.0, low=2.5, high=3.5)


def test_every_candidate_starts_a_round_in_turn() -> None:
    calls: list[str] = []
    timing.interleaved(
        {name: lambda name=name: calls.append(name) for name in "ab"}, peer="a", device=CPU, rounds=4, sample_s=1e-9
    )
    assert calls[-8:] == list("abbaabba")


def test_all_settings_are_timed() -> None:
    result = swap.bench_swap(["topk", "loss-free"], device=CPU, rounds=3, sizes={"D": 16, "E": 8, "K": 2, "F": 8})
    assert [setting for setting, _ in result.rows] == list(swap.SETTINGS)
    for _, timings in result.rows:
        assert timings.keys() == {"stock", "topk", "loss-free"}
        assert all(timing.median_ms > 0 for timing in timings.values())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [setting.model_copy(update={"tokens": 2}) for setting in swap.SETTINGS[:2]]
    monkeypatch.setattr(swap, "SETTINGS", small)
    written = tmp_path / "bench.json"
    done = CliRunner().invoke(app, ["bench", "swap", "--routers", "topk", "--rounds", "3", "--json", str(written)])
    assert done.exit_code == 0, done.output
    assert "Ratio to the stock router" in done.stdout
    assert json.loads(written.read_text())["schema"] == "moerouters.bench.swap/1"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["bench", "tea"], "no benchmark 'tea'"), (["bench", "swap", "--device", "cuda"], "no CUDA device")],
)
def test_wrong_usage(arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert told in done.stderr
