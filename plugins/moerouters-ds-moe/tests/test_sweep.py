"""The sweep, the study behind it, its picture and its command."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import moerouters
from moerouters import Gating, MoELayer
from moerouters.errors import ConfigError
from moerouters.lab.corpus import from_path
from moerouters.lab.roster import named_roster
from moerouters.lab.train import Trainer
from moerouters_ds_moe import Curve, Point, Rule, sweep
from moerouters_ds_moe.__main__ import main
from moerouters_ds_moe.curves import default_rules
from moerouters_ds_moe.modes import routers_of
from moerouters_ds_moe.peers import TOKENS, Peer, against, width_of
from moerouters_ds_moe.study import Study, against_text, run_study, settings_of

ROOT = Path(__file__).parents[3]
TINY: Mapping[str, int | float] = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "num_experts": 4, "expert_size": 8,
    "sequence_length": 16, "micro_batch_size": 2, "steps": 2, "validation_sequences": 4,
}  # fmt: skip


class Two(nn.Module):
    """A layer, and parameters that are always active."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        router = moerouters.build("ds-moe", Gating.softmax(4, 2, renormalize=False))
        self.moe = MoELayer(router, hidden_size=6, expert_size=5)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.moe(self.first(x_TD)).hidden
        return hidden


def test_a_sweep_counts_what_is_active_and_puts_the_model_back() -> None:
    torch.manual_seed(0)
    model, x_TD = Two(), torch.randn(32, 6)
    rules = [Rule(inference="top_k", top_k=4), Rule(inference="top_k", top_k=1), Rule(inference="threshold", eps=0.0)]
    curve = sweep(model, lambda m: float(m(x_TD).square().mean()), rules)
    experts = 4 * (2 * 5 * 6 + 6 * 5)
    assert curve.parameters == experts + 6 * 6 + 4 * 6
    everything, one, also_everything = curve.points
    assert everything.active_parameters == also_everything.active_parameters == curve.parameters
    assert one.active_parameters == curve.parameters - 3 * experts // 4
    assert (everything.expert_share, one.expert_share, one.layer_shares) == (1, 0.25, (0.25,))
    assert everything.loss == pytest.approx(curve.dense_loss, rel=1e-5)
    assert one.loss != pytest.approx(curve.dense_loss, rel=1e-3)
    assert model.training
    assert routers_of(model)["moe.router"].config.inference == "threshold"
    with pytest.raises(ZeroDivisionError):
        sweep(model.eval(), lambda m: 1 / 0, rules)
    assert not model.training
    assert routers_of(model)["moe.router"].config.inference == "threshold"


def test_routed_attention_is_dense_and_counts_as_active() -> None:
    from moerouters.lab.model import LanguageModel

    settings = settings_of("tiny", TINY | {"attention_experts": 2, "num_heads": 4})
    gatings = (settings.gating(), settings.attention_gating())
    routers, of_attention = ([moerouters.build("ds-moe", gating) for _ in range(2)] for gating in gatings)
    torch.manual_seed(0)
    model = LanguageModel(settings, routers, of_attention)
    tokens_BS = torch.randint(256, (2, 8))
    rule = Rule(inference="top_k", top_k=1)
    curve = sweep(model, lambda m: float(m(tokens_BS).logits_BSV.square().mean()), [rule], layers="*.moe.router")
    (point,) = curve.points
    assert point.layer_shares == (0.25, 0.25)
    experts = 2 * 4 * 3 * 16 * 8
    assert point.active_parameters == curve.parameters - 3 * experts // 4


def test_the_best_point_within_a_share() -> None:
    def point(loss: float, active: int | None) -> Point:
        rule = Rule(inference="threshold", eps=1.0)
        return Point(rule=rule, loss=loss, expert_share=0.5, layer_shares=(0.5,), active_parameters=active)

    curve = Curve(dense_loss=1.0, parameters=100, points=(point(1.0, 90), point(1.2, 40), point(1.1, 39)))
    best = curve.best_within(0.4)
    assert best is not None and best.loss == 1.1
    assert curve.perplexity_ratio(best) == pytest.approx(math.exp(0.1))
    assert curve.best_within(0.1) is None
    assert Curve(dense_loss=1.0, parameters=100, points=(point(1.0, None),)).best_within(0.4) is None


def test_default_rules() -> None:
    rules = default_rules(6)
    assert [rule.top_k for rule in rules if rule.inference == "top_k"] == [1, 2, 4]
    assert 0.48 in [rule.eps for rule in rules if rule.inference == "threshold"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two tiny models, as the command writes it."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "text").mkdir()
    for number in range(6):
        words = [f"{word * word} and {word}" for word in range(number, 60)]
        (folder / "text" / f"{number}.txt").write_text(", ".join(words), encoding="utf-8")
    changes = [part for name, value in TINY.items() for part in ("--set", f"{name}={value}")]
    target = folder / "study.json"
    options = ["--alpha", "0,0.1", "--peers", "4,32", "--text", str(folder / "text"), *changes]
    assert main(["sweep", str(target), *options]) == 0
    return target


def test_a_study_trains_a_model_per_alpha(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = Study.load(study)
    assert list(found.curves) == ["0", "0.1"]
    assert found.settings.num_experts == 4
    corpus = from_path(study.parent / "text")
    again = run_study(settings_of("tiny", TINY), ["0.1"], corpus, rules=[Rule(inference="threshold", eps=0.48)])
    assert again.curves["0.1"].dense_loss == found.curves["0.1"].dense_loss


def test_a_study_trains_dense_peers(study: Path) -> None:
    found = Study.load(study)
    assert [peer.width for peer in found.peers] == [4, 32]
    losses = [peer.loss for peer in found.peers]
    assert losses[0] != losses[1] and set(found.against) <= {"0", "0.1"}
    for alpha, timed in found.against.items():
        assert 4 <= timed.width <= 32 and timed.loss <= max(losses)
        best = found.curves[alpha].best_within(0.4)
        assert best is not None and timed.rule == best.rule


def test_layers_are_timed_against_the_mlps_of_an_equally_good_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words, again and again. " * 400, encoding="utf-8")
    (tmp_path / "more.txt").write_text("other words, and again these. " * 400, encoding="utf-8")
    settings = settings_of("tiny", TINY)
    (entrant,) = named_roster("ds-moe", settings)
    trainer = Trainer(entrant, seed=0, settings=settings, corpus=from_path(tmp_path), device=torch.device("cpu"))
    rules = [Rule(inference="top_k", top_k=1)]
    curve = sweep(trainer.model, lambda _: trainer.validation_loss(), rules)
    loss, share = curve.points[0].loss, curve.part(curve.points[0])
    peers = [Peer(width=8, loss=loss + 0.1), Peer(width=32, loss=loss - 0.1)]
    found = against(trainer, curve, peers, share=share, rounds=5)
    assert found is not None
    assert (found.rule, found.width, found.tokens) == (rules[0], 16, TOKENS)
    assert found.layers_ms.value > 0 and found.over_mlps.value > 0 and found.over_every_expert.value > 0
    assert against(trainer, curve, peers, share=share / 2) is None
    assert against_text("0.1", found) == (
        "alpha=0.1: as good as a dense model of width 16, whose MLPs' time its layers take "
        f"{found.over_mlps.value:.2f} times"
    )
    ahead = against(trainer, curve, peers[:1], share=share, rounds=5)
    assert ahead is not None and ahead.width == 8 and ahead.loss < ahead.best_peer == peers[0].loss
    assert "better than the best dense model, of width 8" in against_text("0.1", ahead)
    assert against(trainer, curve, peers[1:], share=share) is None


def test_the_width_of_an_equally_good_model() -> None:
    peers = [Peer(width=64, loss=1.0), Peer(width=16, loss=2.0), Peer(width=256, loss=0.9)]
    assert width_of(1.5, peers) == 32
    assert width_of(2.0, peers) == 16 and width_of(0.9, peers) == 256
    assert width_of(0.8, peers) == 256  # better than all
    assert width_of(2.1, peers) is None and width_of(1.0, []) is None


def test_a_study_is_drawn(study: Path) -> None:
    pytest.importorskip("matplotlib")
    target = study.with_suffix(".svg")
    assert main(["render", str(study), str(target)]) == 0
    assert "active parameters" in target.read_text(encoding="utf-8")


def test_bad_commands_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    assert main(["render", str(tmp_path / "bad.json"), str(tmp_path / "x.svg")]) == 1
    assert "is no study" in capsys.readouterr().err
    assert main(["sweep", str(tmp_path / "x.json"), "--set", "experts=4"]) == 1
    assert "num_experts" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        Study.load(tmp_path / "missing.json")


def test_the_picture_in_the_docs_is_that_of_the_study() -> None:
    from moerouters.lab.showcase import fingerprint

    source = ROOT / "docs" / "benchmarks" / "ds-moe.json"
    picture = ROOT / "docs" / "images" / "ds-moe.svg"
    assert fingerprint(source.read_bytes()) in picture.read_text(encoding="utf-8"), "stale: see the README"
