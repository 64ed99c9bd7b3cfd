"""Ranks must run the same routers: one that was installed in another version, or configured otherwise, corrupts the
shared state without an error. `attach` and `shard_experts` compare fingerprints once."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from types import MappingProxyType

import torch.distributed as dist
from pydantic import BaseModel

from moerouters.errors import ConfigError
from moerouters.router import Router

Layers = Mapping[str, Mapping[str, str]]
"""By layer name: more that has to be equal, in readable parts."""
_SHOWN = 20
"""Lines of differences in a message; a wrong version on half of 64 ranks with 60 layers makes thousands."""


def router_identity(router: Router) -> dict[str, str]:
    """What has to be equal on all ranks, in readable parts: class, distribution and version, code, config, gating,
    capabilities, state."""
    kind = type(router)
    config = getattr(router, "config", None)
    state = {name: list(value.shape) for name, value in router.state_dict().items()}
    return {
        "router": f"{kind.__module__}.{kind.__qualname__}",
        "version": _version(kind.__module__.partition(".")[0]),
        "code": _digest(_source(kind))[:12],
        "config": config.model_dump_json() if isinstance(config, BaseModel) else repr(config),
        "gating": router.gating.settings.model_dump_json(exclude_defaults=True),
        "capabilities": json.dumps(router.capabilities.model_dump(mode="json") | {"dtypes": None}, sort_keys=True),
        "state": json.dumps(state),
    }


def fingerprint(routers: Mapping[str, Router], layers: Layers = MappingProxyType({})) -> bytes:
    """32 bytes that differ where any router of the model differs in class, version, code, config, gating, promises or
    state, or any layer in what `layers` says of it."""
    return hashlib.sha256(json.dumps(_identities(routers, layers)).encode()).digest()


def expect_same_on_all_ranks(
    routers: Mapping[str, Router], group: dist.ProcessGroup | None, layers: Layers = MappingProxyType({})
) -> None:
    """Raise ConfigError on every rank of `group` (None: the world) unless all have the same routers, and `layers`, more
    that has to be equal, is. A collective."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return
    own = fingerprint(routers, layers)
    gathered: list[bytes | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    if all(each == gathered[0] for each in gathered):
        return
    # Only now the long form: what differs, layer by layer.
    identities: list[dict[str, dict[str, str]] | None] = [None] * len(gathered)
    dist.all_gather_object(identities, _identities(routers, layers), group=group)
    lines = _differences([each or {} for each in identities])
    rest = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    raise ConfigError(
        f"ranks do not run the same {'layers' if layers else 'routers'}.",
        where="\n".join(lines[:_SHOWN] + rest),
        why="their state is one state: every rank learns from the sums of all",
        fix="install the same versions and build the model from the same config on every rank",
    )


def _identities(routers: Mapping[str, Router], layers: Layers) -> dict[str, dict[str, str]]:
    return {name: router_identity(router) | dict(layers.get(name, {})) for name, router in routers.items()}


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


@cache
def _version(package: str) -> str:
    """Distribution and version that an importable package came with; `unknown` for a loose module."""
    try:
        # The usual case, a distribution named as its package; asking who brought a package reads all metadata (0.5 s).
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(package)
        if not names:
            return "unknown"
        found = metadata.distribution(names[0])
    return f"{found.name} {found.version}"


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made in an interpreter's prompt
        return kind.__qualname__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
