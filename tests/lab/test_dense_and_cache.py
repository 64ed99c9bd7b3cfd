"""Dense models in the lab, and decoding from a cache of keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moerouters.builtin import TopKRouter
from moerouters.errors import ConfigError
from moerouters.lab.cache import KeyValueCache
from moerouters.lab.model import DenseMLP, LanguageModel
from moerouters.lab.settings import Settings
from moerouters.lab.train import Trainer
from support.lab import CPU, SMALL, run_comparison, small_corpus

DENSE = SMALL.override({"dense_size": 24})
PARTS = SMALL.override({"num_heads": 4, "num_kv_heads": 1, "attention_experts": 2, "attention_top_k": 1})


def model(settings: Settings) -> LanguageModel:
    torch.manual_seed(0)
    layers = [] if settings.dense_size else range(settings.num_layers)
    attended = [TopKRouter(settings.attention_gating()) for _ in layers if settings.attention_experts > 1]
    return LanguageModel(settings, [TopKRouter(settings.gating()) for _ in layers], attended).eval()


def tokens(batch: int = 3, length: int = 8) -> torch.Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))


def test_the_dense_mlp_is_swiglu() -> None:
    mlp, x_TD = DenseMLP(4, 6), torch.randn(5, 4)
    expected = (F.silu(x_TD @ mlp.gate.weight.t()) * (x_TD @ mlp.up.weight.t())) @ mlp.down.weight.t()
    torch.testing.assert_close(mlp(x_TD), expected)


@pytest.mark.parametrize("settings", [DENSE, SMALL, PARTS], ids=["dense", "moe", "moa"])
@pytest.mark.parametrize("cuts", [(8,), (5, 1, 1, 1), (1,) * 8, (3, 4, 1)])
def test_in_pieces_from_a_cache_it_says_the_same(settings: Settings, cuts: tuple[int, ...]) -> None:
    net = model(settings)
    caches = [KeyValueCache(8) for _ in range(settings.num_layers)]
    with torch.no_grad():
        whole = net(tokens()).logits_BSV
        parts = [net(part, caches=caches).logits_BSV for part in tokens().split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert {cache.length for cache in caches} == {8}


def test_a_dense_model_trains_and_resumes(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)

    def fresh() -> Trainer:
        return Trainer(None, seed=0, settings=DENSE, corpus=corpus, device=CPU)

    run, again = fresh(), fresh()
    assert run.handle is None
    for _ in range(3):
        run.train_step()
    assert run.history.tensors()["loads"].shape == (3, 0, 1)
    assert run.history.train_loss[-1] < run.history.train_loss[0]
    again.load_state(run.state())
    assert again.step == 3 and again.validation_loss() == run.validation_loss()
    embedded, attention, mlp = 256 * 16, 16 * (16 + 2 * 8) + 16 * 16, 3 * 16 * 24
    assert run.num_parameters == embedded + 2 * (attention + mlp + 2 * 16) + 16


def test_work_leaves_no_trace_in_the_history(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    timed, trained = (Trainer(None, seed=0, settings=DENSE, corpus=corpus, device=CPU) for _ in range(2))
    loss, loads_ALE = timed.work(0)
    trained.train_step()
    assert (timed.step, trained.step) == (0, 1)
    assert loss == float(trained.history.train_loss[0]) and loads_ALE.shape == (2, 0, 1)


def test_a_comparison_refuses_a_dense_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a dense model has no router to compare"):
        run_comparison(tmp_path / "out", small_corpus(tmp_path), settings=DENSE)
