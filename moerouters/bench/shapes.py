"""The sizes of a layer that benchmarks run at, by name."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field

from moerouters.errors import ConfigError

LETTERS = ("T", "D", "E", "K", "F", "layers")


class Shape(BaseModel):
    """T tokens of width D, K of E experts each, experts F wide; `layers` of them stacked, all live before backward."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    T: int = Field(ge=1)
    D: int = Field(default=512, ge=1)
    E: int = Field(ge=1)
    K: int = Field(ge=1)
    F: int = Field(default=256, ge=1)
    layers: int = Field(default=4, ge=1)
    gate_only: bool = False
    """Too many tokens for whole layers on a small machine: routers and what they solve are timed, experts are not."""
    grows: str = ""
    """The letter that differs from the other shapes of a series; empty outside of one."""

    @property
    def N(self) -> int:
        """Routed pairs."""
        return self.T * self.K

    def sizes(self) -> dict[str, int]:
        """By letter."""
        return {letter: getattr(self, letter) for letter in LETTERS}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="tiny", T=256, D=64, E=8, K=2, F=64, layers=2),
        Shape(name="cpu-16", T=4096, D=512, E=16, K=2, F=1024),
        Shape(name="cpu-64", T=4096, D=512, E=64, K=8, F=256),
        # Arithmetic in bf16 takes a CPU without units for it 16 times as long (docs/benchmarks.md): less of it.
        Shape(name="cpu-bf16", T=256, D=512, E=16, K=2, F=512, layers=1),
        Shape(name="gate-64", T=65536, D=512, E=64, K=8, F=256, layers=1, gate_only=True),
        Shape(name="mixtral", T=32768, D=4096, E=8, K=2, F=14336),
        Shape(name="olmoe", T=32768, D=2048, E=64, K=8, F=1024),
        Shape(name="qwen3-30b", T=32768, D=2048, E=128, K=8, F=768),
        # 21 GiB of bf16 weights a layer, and gradients: one layer fits a GPU, four do not.
        Shape(name="deepseek-v3", T=8192, D=7168, E=256, K=8, F=2048, layers=1),
    )
}

_MODELS = ("mixtral", "olmoe", "qwen3-30b", "deepseek-v3")
_DEFAULTS = {
    ("layer", "cpu"): ("cpu-16", "cpu-64"),
    ("layer", "cuda"): _MODELS,
    ("router", "cpu"): ("gate-64",),
    ("router", "cuda"): ("gate-64", "qwen3-30b", "deepseek-v3"),
    ("dispatch", "cpu"): ("cpu-16", "cpu-64"),
    ("dispatch", "cuda"): _MODELS,
    ("balance", "cpu"): ("cpu-16", "cpu-64", "gate-64"),
    ("balance", "cuda"): ("olmoe", "qwen3-30b", "gate-64"),
}

_GROWTH = {
    "T": [1 << power for power in range(10, 19)],
    "E": [8, 16, 32, 64, 128, 256, 512],
    "K": [1, 2, 4, 8, 16],
}
"""What a letter grows through, while the others stay: T 1k to 256k, E 8 to 512."""
_GROWN = {
    "cpu": {
        "T": Shape(name="", T=1, D=64, E=16, K=2, F=64, layers=1),
        "E": Shape(name="", T=4096, D=128, E=1, K=2, F=128, layers=1),
        "K": Shape(name="", T=4096, D=128, E=64, K=1, F=128, layers=1),
    },
    "cuda": {
        "T": Shape(name="", T=1, D=2048, E=64, K=8, F=1024, layers=1),
        "E": Shape(name="", T=32768, D=2048, E=1, K=8, F=768, layers=1),
        "K": Shape(name="", T=32768, D=2048, E=128, K=1, F=768, layers=1),
    },
}


def named_shapes(names: str | None, *, subject: str, device: str) -> tuple[Shape, ...]:
    """The shapes of a list such as `cpu-16,T1024-D256-E8-K2-F512`; None for the usual ones of a subject.

    Raises ConfigError for what is neither a name nor sizes.
    """
    if names is None:
        return tuple(SHAPES[name] for name in _DEFAULTS[subject, device])
    return tuple(SHAPES[name] if name in SHAPES else _spelt_out(name) for name in names.split(",") if name)


def growing(letter: str, *, device: str, most: int | None = None) -> tuple[Shape, ...]:
    """One shape after the other with more of `letter`, at most `most` of it. Raises ConfigError for another letter."""
    if letter not in _GROWTH:
        raise ConfigError(f"'{letter}' does not grow.", why=f"there is: {', '.join(_GROWTH)}", fix="--grow T")
    base = _GROWN[device][letter]
    values = [value for value in _GROWTH[letter] if most is None or value <= most]
    return tuple(
        base.model_copy(update={"name": f"{letter} {value}", letter: value, "grows": letter}) for value in values
    )


def _spelt_out(text: str) -> Shape:
    parts = text.split("-")
    found = [re.fullmatch(r"(T|D|E|K|F|layers)([1-9]\d*)", part) for part in parts]
    sizes = {match[1]: int(match[2]) for match in found if match is not None}
    if None in found or len(sizes) < len(parts) or not {"T", "E", "K"} <= sizes.keys():
        raise ConfigError(
            f"there is no shape '{text}'.",
            why=f"there is: {', '.join(SHAPES)}; or sizes, of which T, E and K are needed",
            fix="--shapes T1024-D256-E8-K2-F512-layers1",
        )
    if sizes["K"] > sizes["E"]:
        raise ConfigError(f"the shape '{text}' has K > E.", why="a token chooses K different experts", fix="lower K")
    return Shape.model_validate({"name": text, **sizes})
