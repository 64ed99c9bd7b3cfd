"""One driver, one actor a rank: the same training, one call each in a step, and errors that name who failed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moerouters.errors import ConfigError, PipelineError
from moerouters.pipeline import build
from moerouters.pipeline.actors import Backend, Failure
from moerouters.pipeline.controller import Controller, Seat
from support import controller_jobs as jobs
from support.fake_ray import FakeRay

pytestmark = pytest.mark.dist

TWO = build("1f1b", 2, 2)


def expect_same_training(backend: Backend | None) -> None:
    with Controller(TWO, jobs.trained, backend=backend) as controller:
        given = [controller.step(**jobs.batch(step, 2)) for step in range(2)]
        weights = controller.call("weights", prefix="")
    losses, right = jobs.alone(TWO, 2)
    for (first, last), expected in zip(given, losses, strict=True):
        assert first is None
        torch.testing.assert_close(last, expected, rtol=1e-10, atol=1e-10)
    found = {name: weight for each in weights for name, weight in each.items()}
    assert found.keys() == right.keys()
    for name, weight in right.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-10, atol=1e-10)
    with pytest.raises(PipelineError, match="has no actors any more"):
        controller.step(**jobs.batch(0, 2))


def error_of(setup: Callable[[Seat], Any], backend: Backend | None = None) -> str:
    with Controller(TWO, setup, backend=backend, timeout_s=30.0) as controller, pytest.raises(PipelineError) as caught:
        for step in range(2):
            controller.step(**jobs.batch(step, 2))
    return str(caught.value)


def test_the_same_training_with_one_call_for_each_actor_and_step() -> None:
    """An actor gets what its stages take of the batch."""
    backend = jobs.Counting()
    expect_same_training(backend)
    step = [("actor 0", "step", ("input",)), ("actor 1", "step", ("target",))]
    assert backend.calls == step + step + [(f"actor {rank}", "weights", ("prefix",)) for rank in (0, 1)]


def test_the_death_of_an_actor_is_an_error_that_names_it_and_its_last_task() -> None:
    said = error_of(jobs.dying)
    assert said.startswith(
        "actor 1 died in call 2, 'step', last task done: 1B0.\n  from   actor 0: last task done: 0"
    ), said
    assert "its process ended with code -9" in said


@pytest.mark.slow
def test_what_an_actor_raises_is_told_and_not_who_waits_for_it() -> None:
    said = error_of(jobs.raising)
    assert said.startswith("actor 1 raised in call 2, 'step', last task done: 1B0.\n"), said
    assert "ValueError: no such luck" in said


@pytest.mark.slow
def test_an_actor_that_cannot_be_set_up() -> None:
    said = error_of(jobs.unwilling)
    assert said.startswith("actor 1 raised in call 1, 'step', no task done.\n"), said
    assert "RuntimeError: no seat" in said


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from moerouters.pipeline.ray_actors import RayActors

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "moerouters\[ray\]"'):
        RayActors()


def test_what_ray_gives_and_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from moerouters.pipeline.ray_actors import RayActors

    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    actor = RayActors({"num_gpus": 1}).start("actor 0", lambda: [3, 1, 2])
    assert ray.started and ray.options == {"num_gpus": 1}
    assert actor.call("index", 1).outcome(1.0) == (1, None)
    _, failure = actor.call("index", 7).outcome(1.0) or (None, None)
    assert failure is not None and not failure.died and "ValueError: 7 is not in list" in failure.said
    ray.state = "slow"
    assert actor.call("pop").outcome(1.0) is None
    ray.state = "dead"
    assert actor.call("pop").outcome(1.0) == (None, Failure("The actor died unexpectedly.", died=True))
    actor.kill()
    assert len(ray.killed) == 1


@pytest.mark.slow
def test_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the installed Ray, which the environment of the tests does not have."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for what actors import
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray leaves a token in the home folder
    from moerouters.pipeline.ray_actors import RayActors

    expect_same_training(RayActors())
    said = error_of(jobs.dying, RayActors())
    assert said.startswith("actor 1 died in call 2, 'step', last task done: 1B0.\n"), said
