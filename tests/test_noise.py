"""Noise from a key: reproducible, and noise."""

import math

import pytest
import torch
from torch import Tensor

from moerouters.noise import normal_noise, uniform_noise

KEY = torch.tensor([1, 2, 3, 4])
SHAPE = (400, 64)
PINNED = [0.5258786082267761, 0.4561060070991516, 0.5985481142997742]


def keys() -> list[Tensor]:
    """Neighbours of a key in every part: what a training run draws from."""
    changed = [KEY.clone() for _ in range(len(KEY))]
    for part, key in enumerate(changed):
        key[part] += 1
    return [KEY, *changed, KEY.flip(0), torch.zeros(4, dtype=torch.int64), -KEY, torch.tensor([2**62, -(2**63)])]


@pytest.mark.parametrize("key", keys(), ids=str)
def test_uniform(key: Tensor) -> None:
    noise = uniform_noise(key, SHAPE).double()
    n = noise.numel()
    assert noise.shape == SHAPE
    assert 0 < float(noise.min()) < 1e-3
    assert 1 - 1e-3 < float(noise.max()) < 1
    # Five standard errors of the mean, the variance and the correlation of neighbours.
    assert float(noise.mean()) == pytest.approx(1 / 2, abs=5 * math.sqrt(1 / 12 / n))
    assert float(noise.var()) == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / n))
    centred = noise - 0.5
    for moved in (centred.roll(1, 0), centred.roll(1, 1)):
        assert abs(float((centred * moved).mean())) < 5 / 12 / math.sqrt(n)
    counts = torch.histc(noise.float(), bins=64, min=0, max=1).double()
    chi_square = float(((counts - n / 64) ** 2 / (n / 64)).sum())
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)


def test_normal() -> None:
    noise = normal_noise(KEY, SHAPE).double()
    n = noise.numel()
    assert bool(torch.isfinite(noise).all())
    assert float(noise.mean()) == pytest.approx(0, abs=5 / math.sqrt(n))
    assert float(noise.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    assert float((noise**4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / n))


def test_the_same_key_gives_the_same_noise() -> None:
    assert torch.equal(uniform_noise(KEY, SHAPE), uniform_noise(KEY.clone(), SHAPE))


def test_different_keys_give_unrelated_noise() -> None:
    drawn = [uniform_noise(key, SHAPE).double().flatten() - 0.5 for key in keys()]
    correlations = torch.corrcoef(torch.stack(drawn)).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5 / math.sqrt(drawn[0].numel())


def test_compiled_noise_is_the_same_noise() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(normal_noise, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(KEY, SHAPE), normal_noise(KEY, SHAPE))


@pytest.mark.slow
def test_inductor_noise_is_the_same_noise() -> None:
    torch._dynamo.reset()
    assert torch.equal(torch.compile(uniform_noise, fullgraph=True)(KEY, SHAPE), uniform_noise(KEY, SHAPE))


def test_values_are_pinned() -> None:
    """A change here changes every run that used noise."""
    assert uniform_noise(KEY, (3,)).tolist() == PINNED


@pytest.mark.parametrize("shape", [(0,), (0, 8), ()])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    assert uniform_noise(KEY, shape).shape == shape
