"""Hugging Face models whose experts live on several ranks, by our dispatchers and their own one-line config."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from moerouters.errors import UnsupportedError
from moerouters.hf import ep_implementation
from moerouters.swapping.guards import EXPERT_PARALLEL_SINCE, knows_expert_parallel
from moerouters_conformance.pool import rank_pool

from . import parallel_jobs as jobs
from .parallel_jobs import WORLD, Call, Run
from .zoo import randomise
from .zoo_configs import shrunk

pytestmark = pytest.mark.dist
needs_interface = pytest.mark.skipif(
    not knows_expert_parallel(),
    reason=f"needs transformers {EXPERT_PARALLEL_SINCE}, this is {transformers.__version__}",
)

RUNS = [
    *(Run(model, router) for model in ("qwen", "deepseek") for router in (None, "topk", "loss-free", "bip")),
    Run("qwen", "loss-free", experts="eager"),
    Run("qwen", "loss-free", "moerouters_all_to_all"),
    Run("qwen", "loss-free", "moerouters_all_gather", "eager"),
    Run("qwen", "bip", tp=1, ep=2),
    Run("deepseek", "loss-free", tp=1),
    Run("qwen", "loss-free", tp=2),
    Run("deepseek", "topk", "moerouters_all_to_all", tp=2),
    Run("qwen", None, tp=2, ep=2),
]
LIMIT = 1e-6
"""Of the largest value, in float64: norms and routers of these models cast to float32, where a sum in another order can
differ by 6e-8. The calls below, without norms and routers, are held to 1e-10."""

UNEVEN = (5, 3, 0, 9)
CALLS = [
    *(
        Call("plain", f"moerouters_{name}", experts, UNEVEN)
        for name in ("all_to_all", "all_gather")
        for experts in ("eager", "batched_mm", "moerouters")
    ),
    Call("plain", "moerouters", "moerouters", UNEVEN),
    Call("plain", "moerouters", "moerouters", (0, 0, 0, 0)),
    *(Call("plain", "moerouters", experts, (7,)) for experts in ("eager", "batched_mm", "moerouters")),
    *(Call("plain", "moerouters_all_to_all", experts, (5, 0)) for experts in ("eager", "moerouters")),
    Call("plain", "moerouters_all_gather", "moerouters", (1, 7)),
    Call("plain", "moerouters_all_to_all", "grouped_mm", UNEVEN, torch.float32),
    Call("plain", "moerouters", "grouped_mm", (7,), torch.float32),
    *(
        Call("interleaved", "moerouters", experts, tokens)
        for experts in ("eager", "moerouters")
        for tokens in (UNEVEN, (7,))
    ),
    Call("no gate", "moerouters", "eager", (7,)),
]


def slow_or_not(run: Run) -> Any:
    """Each way to run is tried fast, and with one router."""
    others = run.model == "qwen" and run.router in ("topk", "bip") and (run.tp, run.ep) == (4, 4)
    deepseek = run.model == "deepseek" and run.router != "loss-free"
    return pytest.param(run, id=str(run), marks=[pytest.mark.slow] if others or deepseek else [])


@pytest.fixture(scope="module", autouse=True)
def ranks_of_our_own() -> Iterator[None]:
    """transformers makes new process groups for every model. Their threads, which wake a hundred times a second for as
    long as the ranks live, would take the cores from all tests that follow."""
    yield
    rank_pool().close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two saved models; four ranks share the heads of their attention."""
    path = tmp_path_factory.mktemp("models")
    for name, kind in {"qwen": "Qwen3Moe", "deepseek": "DeepseekV3"}.items():
        sizes = {"num_key_value_heads": 4, "num_hidden_layers": 2}
        config = shrunk(getattr(transformers, f"{kind}Config"), sizes)
        model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config)
        randomise(model, (), seed=0)
        model.save_pretrained(path / name)
    return str(path)


@pytest.fixture(scope="module")
def ranks(folder: str, request: pytest.FixtureRequest) -> dict[Run, list[dict[str, Any]]]:
    """What every rank found, of the runs that selected tests ask for; a job for each model: a job has a minute."""
    asked = {item.callspec.params.get("run") for item in request.session.items if hasattr(item, "callspec")}
    found = {}
    wanted = [run for run in RUNS if run in asked]
    for _, group in groupby(sorted(wanted, key=lambda run: run.model), key=lambda run: run.model):
        runs = list(group)
        answers = rank_pool().run(jobs.steps, runs, folder)
        found |= {run: [answer[run] for answer in answers] for run in runs}
    return found


@pytest.fixture(scope="module")
def calls() -> list[dict[Call, dict[str, Tensor]]]:
    return rank_pool().run(jobs.called, CALLS)


def expect_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float, where: str) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, f"{where}, {name}"
        if value.numel():
            apart, largest = float((found[name] - value).abs().max()), float(value.abs().max())
            assert apart <= limit * max(largest, 1e-3), f"{where}, {name}: {apart} apart, largest {largest}"


@needs_interface
@pytest.mark.parametrize("run", [slow_or_not(run) for run in RUNS])
def test_a_step_is_that_of_one_process(run: Run, ranks: dict[Run, list[dict[str, Any]]], folder: str) -> None:
    expected = jobs.in_one_process(run, folder)
    layers = 2 if run.model == "qwen" else 1  # DeepSeek-V3 starts with a dense one
    assert len(expected["loads"]) == (layers if run.router else 0)
    for rank, found in enumerate(ranks[run]):
        (own,), batch = found["passes"], expected["passes"][rank // run.tp]
        assert len(own["router_logits"]) == len(batch["router_logits"]) == layers
        for name in ("loss", "router_logits"):
            torch.testing.assert_close(own[name], batch[name], rtol=LIMIT, atol=LIMIT)
        # Losses are averaged over batches: in one process by us, over ranks by FSDP2 when it reduces weights.
        expect_near({"": own["embedded"] / run.batches}, {"": batch["embedded"]}, LIMIT, f"rank {rank}, embedded")
        assert any("experts" in name for name in found["gradients"])
        for kind in ("gradients", "weights"):
            expect_near(found[kind], expected[kind], LIMIT, f"rank {rank}, {kind}")


@needs_interface
@pytest.mark.parametrize("run", [slow_or_not(run) for run in RUNS if run.router])
def test_ranks_learn_what_one_process_learns(run: Run, ranks: dict[Run, list[dict[str, Any]]], folder: str) -> None:
    expected = jobs.in_one_process(run, folder)
    assert bool(expected["learned"]) == (run.router != "topk" or run.model == "deepseek")
    for rank, found in enumerate(ranks[run]):
        # Every token once, however many ranks hold it.
        assert {name: load_E.tolist() for name, load_E in found["loads"].items()} == {
            name: load_E.tolist() for name, load_E in expected["loads"].items()
        }
        expect_near(found["learned"], expected["learned"], LIMIT, f"rank {rank}")
        assert all(torch.equal(value, ranks[run][0]["learned"][name]) for name, value in found["learned"].items())


@needs_interface
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_uneven_batches_and_empty_slots(call: Call, calls: list[dict[Call, dict[str, Tensor]]]) -> None:
    limit = 1e-10 if call.dtype == torch.float64 else 1e-5
    for rank, (found, expected) in enumerate(zip(calls, jobs.called_in_one_process(call), strict=True)):
        expect_near(found[call], expected, limit, f"rank {rank}")


@needs_interface
def test_tensor_sliced_wants_one_batch() -> None:
    call = Call("plain", "moerouters_tensor_sliced", "moerouters", (4, 4))
    for rank, said in enumerate(rank_pool().run(jobs.refused, call)):
        assert "needs all ranks of the expert group to hold the same batch" in said
        assert f"rank {rank} of {WORLD}" in said


@needs_interface
def test_a_shared_batch_must_not_count_once_per_rank(folder: str) -> None:
    for said in rank_pool().run(jobs.attached_to_the_world, Run("qwen", "loss-free"), folder):
        assert "pass token_group=moerouters.hf.token_group(model)" in said


@needs_interface
def test_a_dispatcher_knows_its_layer(folder: str) -> None:
    for rank, sites in enumerate(rank_pool().run(jobs.layer_names, Run("qwen"), folder)):
        assert sites == [
            f"rank {rank} of {WORLD}, layer 'model.layers.{layer}.mlp.experts', back-end 'tensor_sliced'"
            for layer in range(2)
        ]


@needs_interface
def test_other_dispatchers_get_a_name() -> None:
    from transformers.distributed.expert_parallel import EPImplementationInterface

    assert ep_implementation("all_to_all") == "moerouters_all_to_all"
    assert {"moerouters", "moerouters_all_to_all"} <= set(EPImplementationInterface())


def test_an_older_transformers_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moerouters.swapping.guards.version", lambda name: "5.21.1")
    monkeypatch.delitem(__import__("sys").modules, "moerouters.hf_parallel", raising=False)
    assert not knows_expert_parallel()
    with pytest.raises(UnsupportedError, match=r"5\.21\.1(.|\n)*pip install 'transformers>=5\.23'"):
        ep_implementation("all_to_all")
