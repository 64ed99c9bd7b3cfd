"""Ranks must run the same routers: one that was installed in another version, or configured otherwise, corrupts the
shared state without an error. `attach` compares fingerprints once."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping

import torch.distributed as dist
from pydantic import BaseModel

from moerouters.errors import ConfigError
from moerouters.router import Router


def router_identity(router: Router) -> dict[str, str]:
    """What has to be equal on all ranks, in readable parts: class, its code, config, gating, capabilities, state."""
    kind = type(router)
    config = getattr(router, "config", None)
    state = {name: list(value.shape) for name, value in router.state_dict().items()}
    return {
        "router": f"{kind.__module__}.{kind.__qualname__}",
        "code": _digest(_source(kind))[:12],
        "config": config.model_dump_json() if isinstance(config, BaseModel) else repr(config),
        "gating": router.gating.settings.model_dump_json(exclude_defaults=True),
        "capabilities": json.dumps(router.capabilities.model_dump(mode="json") | {"dtypes": None}, sort_keys=True),
        "state": json.dumps(state),
    }


def fingerprint(routers: Mapping[str, Router]) -> bytes:
    """32 bytes that differ where any router of the model differs in class, code, config, gating, promises or state."""
    identities = {name: router_identity(router) for name, router in routers.items()}
    return hashlib.sha256(json.dumps(identities).encode()).digest()


def expect_same_on_all_ranks(routers: Mapping[str, Router], group: dist.ProcessGroup | None) -> None:
    """Raise ConfigError on every rank of `group` (None: the world) unless all have the same routers. A collective."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    own = fingerprint(routers)
    gathered: list[bytes | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    if all(each == gathered[0] for each in gathered):
        return
    # Only now the long form: what differs, layer by layer.
    identities: list[dict[str, dict[str, str]] | None] = [None] * len(gathered)
    dist.all_gather_object(identities, {n: router_identity(r) for n, r in routers.items()}, group=group)
    raise ConfigError(
        "ranks do not run the same routers.",
        where="\n".join(_differences([each or {} for each in identities])),
        why="their state is one state: every rank learns from the sums of all",
        fix="install the same versions and build the model from the same config on every rank",
    )


def _differences(identities: list[dict[str, dict[str, str]]]) -> list[str]:
    """One line per rank, layer and part that is not as on rank 0."""
    first, lines = identities[0], []
    for rank, layers in enumerate(identities):
        for layer in sorted(first.keys() | layers.keys()):
            here, there = layers.get(layer, {}), first.get(layer, {})
            of_layer = f" of layer '{layer}'" if layer else ""
            for part in sorted(here.keys() | there.keys()):
                mine, theirs = here.get(part, "missing"), there.get(part, "missing")
                if mine != theirs:
                    lines.append(f"rank {rank}: {part}{of_layer} is {mine}, on rank 0 {theirs}")
    return lines


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made in an interpreter's prompt
        return kind.__qualname__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
