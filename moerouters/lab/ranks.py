"""The ranks of a run: who holds which tokens, and which experts; one alone where torch.distributed does not run."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from moerouters.errors import ConfigError, MoeroutersError
from moerouters.lab.expert_ranks import ExpertRanks, local
from moerouters.lab.model import LanguageModel
from moerouters.lab.pipeline_ranks import PipelineRanks
from moerouters.lab.stage import empty_elsewhere, tied_copies
from moerouters.router import Router
from moerouters.sharding import expert_parameters


@dataclass(frozen=True)
class Ranks:
    """Who this process is. Every method is a collective: all ranks call it, in one order."""

    rank: int = 0
    size: int = 1
    experts: ExpertRanks | None = None
    """Over whom the experts are spread; None where every rank has all of them."""
    pipeline: PipelineRanks | None = None
    """Over whom the layers are spread; None where every rank has all of them."""

    @property
    def first(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    @property
    def shards(self) -> int:
        """In how many parts a batch is cut. Ranks that see the same tokens (tensor-parallel, a pipeline) share one."""
        return self.size // self._alike

    @property
    def shard(self) -> int:
        """Which of these parts this rank holds."""
        return self.rank // self._alike

    @property
    def _alike(self) -> int:
        tensor = 1 if self.experts is None else self.experts.alike
        return tensor * (1 if self.pipeline is None else self.pipeline.size)

    @property
    def token_group(self) -> dist.ProcessGroup | None:
        """Ranks with the layers of this one that together hold every token once, as `attach` wants them; None: all."""
        if self.pipeline is not None:
            return self.pipeline.data
        return None if self.experts is None else self.experts.distinct

    def part(self, rows: Tensor) -> Tensor:
        """This rank's slice of a batch whose rows all ranks can draw; empty where there are too few."""
        return rows[self.shard :: self.shards]

    def require_divides(self, micro_batch_size: int) -> None:
        """Raise ConfigError unless every rank gets as many sequences as the next."""
        if micro_batch_size % self.shards:
            raise ConfigError(
                f"{micro_batch_size} sequences cannot be shared evenly by {self.shards} ranks.",
                why="the mean of the ranks' gradients is the gradient of the batch only if all have as many tokens",
                fix=f"--set micro_batch_size={-(-micro_batch_size // self.shards) * self.shards}",
            )

    def require_even_validation(self, windows: int, *, capacity_factor: float | None) -> None:
        """Raise ConfigError where some rank would get fewer validation windows, and dispatcher or pipeline mind."""
        if not windows % self.shards:
            return
        fix = f"--set validation_sequences={max(1, windows // self.shards) * self.shards}"
        what = f"{windows} validation windows cannot be shared evenly by {self.shards} ranks."
        if self.experts is not None and self.experts.may_pad(capacity_factor):
            raise ConfigError(
                what,
                where=f"--dispatcher {self.experts.dispatcher}",
                why="its blocks have one size on all ranks, which follows from the number of tokens",
                fix=f"{fix}, or another dispatcher",
            )
        if self.pipeline is not None:
            raise ConfigError(what, where="--pipeline", why="a microbatch has as many rows in every pipeline", fix=fix)

    def sum(self, value: Tensor) -> Tensor:
        """The elementwise sum over ranks, on every rank."""
        return _summed(value, None) if self.size > 1 else value

    def sum_over_tokens(self, value: Tensor) -> Tensor:
        """The elementwise sum over the parts of a batch, each counted once, on every rank.

        In a pipeline every rank gives what its stages know, and zeros for the others.
        """
        if self.pipeline is not None:
            return _summed(value, self.pipeline.column)
        return _summed(value, self.token_group) if self.shards > 1 else value

    def wait(self) -> None:
        """Return when every rank is here. A rank that ends before the first has written takes the others with it."""
        if self.size > 1:
            dist.barrier()

    def spread(self, model: LanguageModel) -> None:
        """Leave this rank its layers and its part of their experts, of those that are spread; before the optimizer is
        made."""
        if self.pipeline is not None:
            stages = self.pipeline.layers_here(len(model.blocks)).values()
            empty_elsewhere(model, set(itertools.chain(*stages)))
        if self.experts is not None:
            self.experts.spread(model)

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the parts of the batch.

        That of an expert is the sum over its group already, so it is reduced over the other owners of that expert.
        """
        if self.size == 1:
            return
        shared, own = _split(model)
        # Also over ranks that hold the same tokens: then none is one rounding away from the others.
        copies = None if self.pipeline is None else self.pipeline.replicas
        _sum_gradients(shared, copies, divisor=self.size if copies is None else copies.size())
        if self.experts is not None:
            _sum_gradients(own, self.experts.peers, divisor=self.shards)

    def gradient_norm(self, model: nn.Module) -> Tensor:
        """0-d: the norm of the averaged gradient of the whole model, the same bits on every rank."""
        shared, own = _split(model)
        if self.pipeline is not None:
            copies = {id(parameter) for parameter in tied_copies(model)}
            shared = [parameter for parameter in shared if id(parameter) not in copies]
        norm = get_total_norm(_gradients(shared))
        if self.experts is None and self.pipeline is None:
            return norm  # the bits of torch's own
        squared = norm.square()
        if self.pipeline is not None:
            squared = _summed(squared, self.pipeline.pipeline)
        if self.experts is not None:
            stages = 1 if self.pipeline is None else self.pipeline.size
            owners = self.size // (self.experts.size * stages)
            squared = squared + self.sum(get_total_norm(_gradients(own)).square()) / owners
        return squared.sqrt()

    def clip_gradients(self, model: nn.Module, max_norm: float) -> None:
        """As torch.nn.utils.clip_grad_norm_, by the norm of the whole model; that function takes no DTensors beside
        other tensors."""
        scale = (max_norm / (self.gradient_norm(model) + 1e-6)).clamp(max=1.0)
        for gradient in _gradients(model.parameters()):
            gradient.mul_(scale)

    def require_same_state(self, model: nn.Module) -> None:
        """Raise MoeroutersError unless all ranks hold the same bits in every router and in every weight they share."""
        if self.size == 1:
            return
        own = {id(parameter) for parameter in expert_parameters(model)}
        named = model.state_dict(keep_vars=True).values()
        prints = torch.tensor(
            [
                _fingerprint(_router_state(model)),
                _fingerprint(value for value in named if id(value) not in own),
                _fingerprint(value for value in named if id(value) in own),
            ]
        )
        everyone = [torch.empty_like(prints) for _ in range(self.size)]
        dist.all_gather(everyone, prints)
        states, weights, experts = torch.stack(everyone).t().tolist()
        with_weights = [0 if self.pipeline is None else self.pipeline.first_alike(rank) for rank in range(self.size)]
        group = 1 if self.experts is None else self.experts.size
        with_experts = [first + rank % group for rank, first in enumerate(with_weights)]
        _expect_alike("balancer state", states, with_weights)
        _expect_alike("weights", weights, with_weights)
        _expect_alike("experts", experts, with_experts)

    def raise_together(self, error: MoeroutersError | None) -> None:
        """Raise on all ranks what a rank has found; a collective. Only the ranks of a stage see what its layers do."""
        failed = torch.tensor(float(error is not None))
        dist.all_reduce(failed)
        if failed > 0:
            found: list[MoeroutersError | None] = [None] * self.size
            dist.all_gather_object(found, error)
            raise next(each for each in found if each is not None) from error


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the job that torchrun started, for as long as the block lasts; alone without torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    started = not dist.is_initialized()
    if started:
        # gloo beside nccl: fingerprints and stop requests live on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        if started:
            dist.destroy_process_group()


def _summed(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = value.clone()
    dist.all_reduce(total, group=group)
    return total


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that all ranks have, and those of the experts that this rank owns."""
    own = list(expert_parameters(model))
    owned = {id(parameter) for parameter in own}
    return [parameter for parameter in model.parameters() if id(parameter) not in owned], own


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """What of them is here: those of cut experts are DTensors."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None, *, divisor: int) -> None:
    """Replace every gradient by its sum over `group`, divided, in one flat all-reduce."""
    gradients = _gradients(parameters)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    flat /= divisor
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _router_state(model: nn.Module) -> list[Tensor]:
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return [value for router in routers for value in router.state_dict().values()]


def _expect_alike(what: str, prints: Sequence[int], firsts: Sequence[int]) -> None:
    """Raise MoeroutersError unless every rank has the print of the first rank that should hold the same."""
    odd = [rank for rank, first in enumerate(firsts) if prints[rank] != prints[first]]
    if odd:
        raise MoeroutersError(
            f"after training, ranks {odd} hold other {what} than rank {firsts[odd[0]]}.",
            why="data-parallel ranks apply the same updates to the same state",
            fix="a router must change only in update(stats), and by what is in stats",
        )


def _fingerprint(tensors: Iterable[Tensor]) -> int:
    """A signed 64-bit digest of the tensors' bits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(local(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)
