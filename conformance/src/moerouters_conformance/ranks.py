"""What ranks do for the distributed rules, and the same work by one process, which is the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moerouters import MoELayer, attach
from moerouters.errors import ConfigError
from moerouters.gating import GatingSettings
from moerouters_conformance.case import make_batch
from moerouters_conformance.readings import tensors_of
from moerouters_conformance.subject import Subject

State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many tokens each rank holds in each step; the tokens follow from rank and step."""

    settings: GatingSettings
    tokens: tuple[tuple[int, ...], ...]
    """Per step, per rank."""

    def logits_TE(self, step: int, shard: int) -> Tensor:
        """[tokens, E] of one shard: shards differ in which expert they favour."""
        E = self.settings.num_experts
        random = torch.Generator().manual_seed(100 * step + shard)
        favour_E = torch.linspace(1, -1, E).roll(shard)
        return torch.randn(self.tokens[step][shard], E, generator=random) + favour_E


class Learning:
    """A layer whose gate is the identity, so that hidden states are logits; an optimizer that moves nothing."""

    def __init__(self, subject: Subject, settings: GatingSettings, *, token_group: dist.ProcessGroup | None = None):
        E = settings.num_experts
        router = subject.make(settings)
        self.layer = MoELayer(router, hidden_size=E, expert_size=1, loss_mode="inject")
        with torch.no_grad():
            self.layer.gate.weight.copy_(torch.eye(E))
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.0)
        self.handle = attach(self.optimizer, self.layer, token_group=token_group)
        self.subject = subject

    def forward(self, logits_TE: Tensor) -> None:
        """One micro-batch, backward included."""
        batch = make_batch(logits_TE, hidden_size=logits_TE.shape[1])
        self.layer(logits_TE, batch.ctx).hidden.square().sum().backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def state(self) -> State:
        return {name: value.clone() for name, value in self.layer.router.state_dict().items()}


def learn(rank: int, subject: Subject, layout: Layout) -> State:
    """Every rank its own shard; the state after the last step."""
    learning = Learning(subject, layout.settings)
    for step in range(len(layout.tokens)):
        learning.forward(layout.logits_TE(step, rank))
        learning.step()
    return learning.state


def learn_replicated(rank: int, subject: Subject, layout: Layout, replicas: int) -> State:
    """Groups of `replicas` neighbouring ranks hold the same tokens; statistics are reduced across groups only."""
    learning = Learning(subject, layout.settings, token_group=_columns(replicas)[rank % replicas])
    for step in range(len(layout.tokens)):
        learning.forward(layout.logits_TE(step, rank // replicas))
        learning.step()
    return learning.state


@cache
def _columns(replicas: int) -> list[Any]:
    """Groups of every `replicas`-th rank. Kept: each gloo group has threads that wake a hundred times a second, and
    those of a hundred groups leave two cores no time for anything else."""
    return [dist.new_group(list(range(first, dist.get_world_size(), replicas))) for first in range(replicas)]


def learn_alone(subject: Subject, layout: Layout, *, shards: Sequence[int], whole: bool = False) -> State:
    """What one process learns from the same tokens: as one micro-batch per shard, or as one batch.

    As one batch always where forward talks to other ranks: it then solves over the tokens of all.
    """
    whole = whole or subject.capabilities.forward_collective
    learning = Learning(subject, layout.settings)
    for step in range(len(layout.tokens)):
        parts = [layout.logits_TE(step, shard) for shard in shards]
        for logits_TE in [torch.cat(parts)] if whole else parts:
            learning.forward(logits_TE)
        learning.step()
    return learning.state


def route_same(rank: int, subject: Subject, layout: Layout) -> dict[str, Tensor]:
    """Every rank routes the tokens of shard 0, in eval."""
    router = subject.make(layout.settings).eval()
    batch = make_batch(layout.logits_TE(0, 0), hidden_size=subject.hidden_size)
    return tensors_of(router(batch.logits_TE, batch.ctx))


def attach_different(rank: int, subjects: Sequence[Subject], settings: Sequence[GatingSettings]) -> str:
    """The last rank builds the other router; the first line of the error that attach raises, or nothing."""
    other = rank == dist.get_world_size() - 1
    try:
        Learning(subjects[other], settings[other])
    except ConfigError as error:
        return str(error).splitlines()[0]
    return ""


class _Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the collectives that run inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def collectives_of_forward(rank: int, subject: Subject, layout: Layout) -> list[str]:
    """Names of the collectives that one training forward runs, also without tokens."""
    router = subject.make(layout.settings).train()
    found: list[str] = []
    for logits_TE in (layout.logits_TE(0, rank), layout.logits_TE(0, rank)[:0]):
        batch = make_batch(logits_TE.requires_grad_(), hidden_size=subject.hidden_size)
        with _Collectives() as collectives:
            router(batch.logits_TE, batch.ctx)
        found += collectives.seen
    return found
