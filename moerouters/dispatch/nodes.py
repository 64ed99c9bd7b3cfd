"""Which ranks of a group share a node: the two groups of a rank, inside its node and across nodes."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from moerouters.dispatch.site import Site
from moerouters.errors import ConfigError

_made: WeakKeyDictionary[Any, dict[int, tuple[dist.ProcessGroup, dist.ProcessGroup]]] = WeakKeyDictionary()
"""By group, then size of a node. All layers share them: each costs connections, and gloo's threads never rest."""


def node_sites(site: Site, node_size: int | None = None) -> tuple[Site, Site]:
    """The ranks with this rank's place on every node, by node; and those of this rank's node.

    From the site's mesh, if that has two dimensions (nodes, ranks of a node); else from node_size, the number of
    neighbours in the group that share a node; else from LOCAL_WORLD_SIZE, as torchrun sets it. A collective of the
    group, unless there is a mesh. Raises ConfigError where none of them says it, or nodes hold unequal parts of it.
    """
    if site.mesh is not None and node_size is None:
        across, inside = site.mesh.get_group(0), site.mesh.get_group(1)
    else:
        size = _size_from_environment(site) if node_size is None else node_size
        if size < 1 or site.num_ranks % size:
            raise ConfigError(
                f"{site.num_ranks} ranks are not a whole number of nodes with {size} ranks each.",
                where=str(site),
                why="every node holds as many experts as the next",
                fix="give node_size as a divisor of the number of ranks, or a mesh of (nodes, ranks of a node)",
            )
        groups = _made.setdefault(site.group, {})
        if size not in groups:
            groups[size] = _split(site, size)
        across, inside = groups[size]
    return (
        replace(site, group=across, backend=f"{site.backend}, between nodes", mesh=None),
        replace(site, group=inside, backend=f"{site.backend}, inside a node", mesh=None),
    )


def _size_from_environment(site: Site) -> int:
    """Ranks of the group on each node, where a launcher numbers the ranks of the job node by node."""
    if site.num_ranks == 1:
        return 1
    per_node = os.environ.get("LOCAL_WORLD_SIZE", "")
    if not per_node.isdecimal() or int(per_node) == 0:
        raise ConfigError(
            f"nothing says which of {site.num_ranks} ranks share a node.",
            where=str(site),
            why=f"LOCAL_WORLD_SIZE, which torchrun sets, is {per_node!r}",
            fix="start with torchrun, or pass a mesh of (nodes, ranks of a node) to shard_experts",
        )
    nodes = [rank // int(per_node) for rank in dist.get_process_group_ranks(site.group)]
    sizes = set(Counter(nodes).values())
    if len(sizes) > 1 or nodes != sorted(nodes):
        raise ConfigError(
            f"the ranks of the group are on the nodes {nodes}.",
            where=str(site),
            why="each node holds one block of experts, as large as the next",
            fix="take a group that has as many ranks on each node, node by node",
        )
    return sizes.pop()


def _split(site: Site, size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Made by the ranks of the group alone, with its time-out."""
    ranks = dist.get_process_group_ranks(site.group)
    node, place = divmod(site.rank, size)
    return _new_group(ranks[place::size], site.group), _new_group(ranks[node * size : (node + 1) * size], site.group)


def _new_group(ranks: list[int], parent: dist.ProcessGroup) -> dist.ProcessGroup:
    made = dist.new_group(ranks, timeout=_timeout_of(parent), use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


def _timeout_of(group: Any) -> Any:
    """Private to torch; without it a smaller group would wait for the default half hour."""
    return group._get_backend(group._device_types[0]).options._timeout
