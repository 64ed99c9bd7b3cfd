import pytest

from moerouters.errors import ConfigError
from moerouters.lab.presets import PRESETS, preset
from moerouters.lab.settings import Settings
from support.lab import SMALL


def test_minimind_presets_have_the_published_sizes() -> None:
    """0.3B and 1.1B parameters (arXiv:2502.15451), of which a vocabulary of bytes takes almost none."""

    def billions(s: Settings) -> float:
        experts = (s.num_experts * s.expert_size + s.shared_size) * 3 * s.hidden_size
        head = s.hidden_size // s.num_heads
        attention = s.hidden_size * head * (2 * s.num_heads + 2 * s.num_kv_heads)
        return s.num_layers * (experts + attention + s.num_experts * s.hidden_size) / 1e9

    assert billions(preset("minimind-16")) == pytest.approx(0.30, abs=0.005)
    assert billions(preset("minimind-64")) == pytest.approx(1.13, abs=0.005)
    assert (preset("minimind-64").num_experts, preset("minimind-64").top_k) == (64, 8)
    assert preset("minimind-16").batch_tokens == 512 * 32 * 8


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_consistent(name: str) -> None:
    assert preset(name).override({}) == preset(name)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        preset("tinny")


def test_override() -> None:
    changed = SMALL.override({"steps": 3, "score": "sigmoid", "scale": 2.5})
    assert (changed.steps, changed.gating().settings.score, changed.gating().settings.scale) == (3, "sigmoid", 2.5)
    assert changed.hidden_size == SMALL.hidden_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "learning_rat: unknown field; did you mean 'learning_rate'?"),
        ({"qqq": 1}, "known settings: hidden_size, num_layers"),
        ({"steps": 0}, r"steps: input should be greater than or equal to 1 \(got 0\)"),
        ({"steps": "many"}, "steps: input should be a valid integer"),
        ({"learning_rate": float("inf")}, "learning_rate: input should be a finite number"),
        ({"num_heads": 3}, "hidden_size 16 does not give 3 heads of an even width"),
        ({"hidden_size": 10, "num_heads": 2}, "does not give 2 heads of an even width"),
        ({"num_kv_heads": 2, "num_heads": 1}, "num_heads 1 is not a multiple of num_kv_heads 2"),
        ({"top_k": 5}, "top_k 5 exceeds num_experts 4"),
        ({"num_groups": 3}, "num_experts 4 is not a multiple of num_groups 3"),
    ],
)
def test_bad_override(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SMALL.override(changes)
