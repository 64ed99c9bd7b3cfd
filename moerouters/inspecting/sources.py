"""Where a model comes from: a folder, a config.json or a hub name, opened with its weights or as an outline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from moerouters.errors import ConfigError, MoeroutersError
from moerouters.inspecting.outline import Alike, outline
from moerouters.swapping.guards import expect_supported_transformers

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_FALL_BACKS = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model by its place."""

    place: str
    """What transformers loads it by: a folder, or a hub name."""
    config: Any
    has_weights: bool

    @property
    def name(self) -> str:
        """How reports call it: without the folders above, which are those of a machine."""
        path = Path(self.place)
        if not path.exists():
            return self.place
        path = path.resolve()
        return path.name if path.is_dir() else f"{path.parent.name}/{path.name}"

    def open(self, device: torch.device | str = "cpu") -> OpenModel:
        """The model with its weights, in eval mode and its own dtype."""
        if not self.has_weights:
            raise ConfigError(
                f"there are no weights in '{self.place}'.",
                why="neither *.safetensors nor pytorch_model*.bin; random weights would route at random",
                fix="pass the folder of a checkpoint, as save_pretrained writes it",
            )
        try:
            model, info = model_class(self.config).from_pretrained(
                self.place, config=self.config, dtype="auto", output_loading_info=True
            )
        except Exception as error:  # safetensors, quantisers and others raise what they like
            raise MoeroutersError(
                f"transformers cannot load '{self.place}'.",
                why=f"{type(error).__name__}: {error}",
                fix="load it with from_pretrained first; `moerouters inspect` reads a config without its weights",
            ) from error
        missing = sorted(info["missing_keys"])
        return OpenModel(model=model.to(device).eval(), source=self, weights="loaded", missing=tuple(missing))

    def outline(self) -> OpenModel:
        """The model without its weights: routers with random tensors, all else without memory."""
        model, alike = outline(model_class(self.config), self.config)
        return OpenModel(model=model, source=self, weights="random", alike=alike)


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A model that was opened, and what is left to say about it."""

    model: nn.Module
    source: Source
    weights: Literal["loaded", "random"]
    alike: Alike | None = None
    """Layers that an outline left out because another is built like them."""
    missing: tuple[str, ...] = ()
    """Tensors that the checkpoint lacks: they are random."""


def source(place: str) -> Source:
    """Find a model. Raises ConfigError with the cause where there is none that transformers knows."""
    transformers = require_transformers()
    path = Path(place)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"there is no model in '{place}'.",
                why="the folder has no config.json",
                fix="pass a folder that save_pretrained wrote, or a config.json",
            )
        has_weights = any(any(path.glob(pattern)) for pattern in _WEIGHTS)
        return Source(place=place, config=_config(transformers, path / "config.json"), has_weights=has_weights)
    if path.is_file():
        return Source(place=place, config=_config(transformers, path), has_weights=False)
    try:
        config = transformers.AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"there is no model '{place}'.",
            why=f"no such file or folder, and as a hub name: {str(error).strip().splitlines()[0]}",
            fix="pass a folder with a config.json, a config.json, or a hub name while there is a network",
        ) from error
    return Source(place=place, config=config, has_weights=True)


def _config(transformers: ModuleType, path: Path) -> Any:
    """A config of the installed release; code that travels with a checkpoint is never run."""
    try:
        fields = json.loads(path.read_text("utf-8"))
        kind = fields.pop("model_type")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"'{path}' is no config of a model.",
            why=f"{type(error).__name__}: {error}",
            fix="pass the config.json of a checkpoint; it is a JSON object with a model_type",
        ) from error
    try:
        return transformers.AutoConfig.for_model(kind, **fields)
    except Exception as error:  # its own checks raise errors of several kinds
        raise ConfigError(
            f"transformers {transformers.__version__} cannot read '{path}'.",
            where=f"model_type {kind!r}",
            why=str(error).strip().splitlines()[0],
            fix="update transformers; architectures whose code travels with the checkpoint are not supported",
        ) from error


def model_class(config: Any) -> Any:
    """The class that the config names, else what transformers makes of such a config. Raises ConfigError."""
    transformers = require_transformers()
    for name in config.architectures or ():
        if isinstance(getattr(transformers, name, None), type):
            return getattr(transformers, name)
    for name in _FALL_BACKS:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ConfigError(
        f"transformers {transformers.__version__} has no model for '{config.model_type}'.",
        where=f"architectures: {', '.join(config.architectures or ()) or 'none'}",
        why="neither the named classes nor a causal language model exist",
        fix="update transformers",
    )


def require_transformers() -> ModuleType:
    """transformers, quiet; raises MoeroutersError if it is not installed or too old."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MoeroutersError(
            "this needs transformers, which is not installed.",
            why="models of Hugging Face come with an extra, so that a plain install stays light",
            fix='pip install "moerouters[hf]"',
        ) from None
    expect_supported_transformers()
    return transformers


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and no advice from transformers: what matters of it is said in our own words."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
