"""Checkpoints of one run: everything the next step depends on, written atomically, read without unpickling code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moerouters.errors import ConfigError
from moerouters.lab.files import atomic_path

_SCHEMA = "moerouters.checkpoint/1"


def save_checkpoint(path: Path, state: Mapping[str, Any], *, identity: Mapping[str, Any]) -> None:
    """Write a trainer's state. identity says which run it is: JSON values that `load_checkpoint` compares."""
    with atomic_path(path) as partial:
        torch.save({"schema": _SCHEMA, "identity": json.dumps(identity), "state": dict(state)}, partial)


def load_checkpoint(path: Path, *, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the state. Raises ConfigError for a damaged file, or if it belongs to another run, saying what differs."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        saved, state = json.loads(content["identity"]), content["state"]
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"cannot resume from '{path}'.",
            why=f"{type(error).__name__}: {error}",
            fix="delete the file; its run starts again from step 0",
        ) from error
    expected = json.loads(json.dumps(identity))
    differing = sorted(key for key in saved.keys() | expected.keys() if saved.get(key) != expected.get(key))
    if differing:
        raise ConfigError(
            f"cannot resume from '{path}': it belongs to another run.",
            why="\n".join(f"{key}: {saved.get(key)} there, {expected.get(key)} here" for key in differing),
            fix="repeat the command that was interrupted, with --resume; or pass another --output",
        )
    result: dict[str, Any] = state
    return result
