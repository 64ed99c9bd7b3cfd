"""A trace of router logits: everything that is needed to route the same tokens again, without the model.

It is a safetensors file with a versioned schema, never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moerouters.errors import TraceError
from moerouters.swapping.adapters import ADAPTERS
from moerouters.swapping.adapters.switch import SwitchGating
from moerouters.swapping.gating import ModelGating
from moerouters.swapping.reading import Reading, Scaled

_SCHEMA = "moerouters.logits/1"
_CONTEXT = ("token_ids_T", "sequence_ids_T")


class About(BaseModel):
    """What the logits were recorded from; texts for people, empty where nobody said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = ""
    text: str = ""
    sha256: str = ""
    """Of the token ids, as int64."""
    tokenizer: str = ""


NOBODY = About()


@dataclass(frozen=True, kw_only=True)
class LayerLogits:
    """One router's logits, and its gating."""

    logits_TE: Tensor
    """As the model computed them, in its dtype, on the CPU."""
    reading: Reading
    weight_dtype: torch.dtype
    """Of the gate projection: what `own` means in the reading."""
    hidden_dtype: torch.dtype
    """Of the hidden states."""
    tensors: Mapping[str, Tensor]
    """The router's tensors that gating needs: its correction bias, factors on its weights."""
    stock_class: str
    adapter: str = ""
    """Key in ADAPTERS if the router needs one of its own."""

    def gating(self, device: torch.device | str = "cpu") -> ModelGating:
        """A fresh gating, with the model's own correction bias."""
        kind = ADAPTERS[self.adapter].gating if self.adapter else ModelGating
        there = replace(self, tensors={name: value.to(device) for name, value in self.tensors.items()})
        gating = kind(self.reading, there._tensor)
        if self.reading.correction_bias is not None:
            bias_E = self.tensors[self.reading.correction_bias]
            gating.correction_bias_E.copy_(bias_E.reshape(gating.correction_bias_E.shape))
        if isinstance(gating, SwitchGating):
            gating.hidden_dtype = self.hidden_dtype
        return gating

    def _tensor(self, name: str) -> Tensor:
        if name == self.reading.projection.weight:
            return torch.empty(0, dtype=self.weight_dtype)  # asked for its dtype only: logits are there already
        return self.tensors[name]


@dataclass(frozen=True, kw_only=True)
class LogitsTrace:
    """The router logits of T tokens, by the name of the router module."""

    layers: Mapping[str, LayerLogits]
    token_ids_T: Tensor | None = None
    """int64 vocabulary ids, if they are known."""
    sequence_ids_T: Tensor | None = None
    """int64, rising: which sequence a token belongs to, if known."""
    about: About = NOBODY

    @property
    def tokens(self) -> int:
        """Of the router that saw most: text and image tokens may have routers of their own."""
        return max((layer.logits_TE.shape[0] for layer in self.layers.values()), default=0)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a versioned schema."""
        tensors: dict[str, Tensor] = {}
        layers: dict[str, Any] = {}
        for name, layer in self.layers.items():
            tensors[f"logits/{name}"] = layer.logits_TE.contiguous()
            tensors |= {f"tensor/{name}/{key}": value.contiguous() for key, value in layer.tensors.items()}
            layers[name] = {
                "reading": json.loads(layer.reading.model_dump_json()),
                "reading_class": type(layer.reading).__name__,
                "weight_dtype": str(layer.weight_dtype).removeprefix("torch."),
                "hidden_dtype": str(layer.hidden_dtype).removeprefix("torch."),
                "tensors": sorted(layer.tensors),
                "stock_class": layer.stock_class,
                "adapter": layer.adapter,
            }
        for name in _CONTEXT:
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value.contiguous()
        meta = {"schema": _SCHEMA, "layers": json.dumps(layers), "about": self.about.model_dump_json()}
        save_file(tensors, path, metadata=meta)

    @classmethod
    def load(cls, path: str | Path) -> LogitsTrace:
        """Read what `save` wrote; raises TraceError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no iterator)
        except (OSError, SafetensorError) as error:
            raise TraceError(
                f"cannot read the trace '{path}'.", why=str(error), fix="pass what `moerouters trace` wrote"
            ) from error
        if meta.get("schema") != _SCHEMA:
            raise TraceError(
                f"'{path}' is no trace of router logits.",
                why=f"its schema is {meta.get('schema')!r}, expected {_SCHEMA!r}",
                fix="pass a file that `moerouters trace` or LogitsTrace.save wrote",
            )
        try:
            return cls(
                layers={name: _layer(name, each, tensors) for name, each in json.loads(meta["layers"]).items()},
                about=About.model_validate_json(meta["about"]),
                **{name: tensors.get(name) for name in _CONTEXT},
            )
        except (KeyError, ValueError, ValidationError, AttributeError) as error:
            raise TraceError(
                f"the trace '{path}' is damaged, or of a later release.",
                why=f"{type(error).__name__}: {error}",
                fix="record it again",
            ) from error


def _layer(name: str, layer: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerLogits:
    if layer["adapter"] and layer["adapter"] not in ADAPTERS:
        raise ValueError(f"no adapter is named {layer['adapter']!r}")
    kinds: list[type[Reading]] = [Reading, *Reading.__subclasses__()]
    kind = {each.__name__: each for each in kinds}[layer["reading_class"]]
    return LayerLogits(
        logits_TE=tensors[f"logits/{name}"],
        reading=kind.model_validate_json(json.dumps(layer["reading"])),
        weight_dtype=getattr(torch, layer["weight_dtype"]),
        hidden_dtype=getattr(torch, layer["hidden_dtype"]),
        tensors={key: tensors[f"tensor/{name}/{key}"] for key in layer["tensors"]},
        stock_class=layer["stock_class"],
        adapter=layer["adapter"],
    )


def needed_tensors(reading: Reading) -> list[str]:
    """Names of the router's tensors that its gating reads once there are logits."""
    names = [step.parameter for step in reading.finish if isinstance(step, Scaled)]
    return names if reading.correction_bias is None else [reading.correction_bias, *names]
