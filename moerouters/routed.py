"""RoutedModule: what every module that owns a router shares - counting each token once, and placing its losses.

`MoELayer` is one; a swapped router in somebody else's model is another. `attach` finds them by this class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from moerouters.kernels.accumulate import accumulate_
from moerouters.losses import LossMode, collect_loss, inject_losses
from moerouters.router import Router
from moerouters.types import Assignment, RouteContext

if TYPE_CHECKING:
    from moerouters.first_pass import FirstPasses
    from moerouters.layer_tape import LayerTape


class RunningStats:
    """Sums over the forwards of one layer since the last optimizer step.

    Plain tensors, not buffers: DistributedDataParallel overwrites buffers with rank 0's at every forward, and they
    have no place in a checkpoint. Integers are int64: float32 stops counting at 2**24.
    """

    def __init__(self, template: Mapping[str, Tensor]) -> None:
        self.sums: dict[str, Tensor] = {name: torch.zeros_like(value) for name, value in template.items()}
        device = self.sums["passes"].device
        self.handle: object | None = None
        """The `attach` Handle that clears these sums; there is at most one."""
        self.first_passes: FirstPasses | None = None
        """For routers that talk in forward: what passes in flight chose, in case backward recomputes them."""
        self.probe = torch.zeros((), dtype=torch.float32, device=device, requires_grad=True)
        self.loss_scale = torch.ones((), dtype=torch.float32, device=device)

    @staticmethod
    def of(assignment: Assignment) -> dict[str, Tensor]:
        """One forward's contribution. What the router observed is filed under `stats.`; a forced pass has none."""
        one = torch.ones_like(assignment.tokens)
        dropped = assignment.dropped if assignment.dropped is not None else torch.zeros_like(one)
        core = {
            "load_E": assignment.load_E,
            "tokens": assignment.tokens,
            "nonfinite": assignment.nonfinite,
            "dropped": dropped,
            "passes": one,
            "observed": one if assignment.stats else torch.zeros_like(one),
        }
        return core | {f"stats.{name}": value for name, value in assignment.stats.items()}

    def add(self, assignment: Assignment) -> None:
        """Count one forward, unless it is a recomputation inside a backward pass."""
        values = self.of(assignment)
        accumulate_([self.sums[name] for name in values], list(values.values()))

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles of a model leave the handle, and with it the optimizers, behind."""
        return self.__dict__ | {"handle": None, "marks": self.probe.grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the marks back: a pickled tensor loses its gradient, and a copy in mid-step must still add up."""
        marks = state.pop("marks")
        self.__dict__.update(state)
        self.probe.grad = marks

    def clear(self) -> None:
        """Back to zero, in place, for the next step."""
        for total in self.sums.values():
            total.zero_()
        self.probe.grad = None
        if self.first_passes is not None:
            self.first_passes.clear()

    def move(self, device: torch.device) -> None:
        """Follow the module to another device; off the meta device everything starts at zero."""

        def moved(tensor: Tensor) -> Tensor:
            return torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)

        if device == self.probe.device:
            return
        self.sums = {name: moved(total) for name, total in self.sums.items()}
        was_meta, marks = self.probe.is_meta, self.probe.grad
        self.probe = moved(self.probe).requires_grad_()
        self.probe.grad = None if marks is None else moved(marks)
        self.loss_scale = torch.ones((), device=device) if was_meta else moved(self.loss_scale)


class RoutedModule(nn.Module):
    """A module with a `router`, its running stats, and one way for its losses to reach the graph."""

    loss_modes: ClassVar[frozenset[LossMode]] = frozenset({"collect", "inject"})
    """Those it can be given."""
    router: Router
    loss_mode: LossMode
    running: RunningStats
    tape: LayerTape | None = None
    """Set for the length of `record` or `replay`."""

    def _set_router(self, router: Router, *, hidden_size: int, loss_mode: LossMode) -> None:
        self.router = router
        self.loss_mode = loss_mode
        empty = self._route_nothing(hidden_size)
        self.running = RunningStats(RunningStats.of(empty))
        self._num_losses = len(empty.losses)
        if router.capabilities.forward_collective:
            from moerouters.first_pass import FirstPasses

            self.running.first_passes = FirstPasses()

    def _route_nothing(self, hidden_size: int) -> Assignment:
        """Names, shapes and dtypes of the stats, from routing zero tokens: no plugin has to declare them twice."""
        device = next((t.device for t in self.parameters()), torch.device("cpu"))
        none = torch.zeros(0, dtype=torch.int64, device=device)
        ctx = RouteContext(
            sequence_ids_T=none,
            num_sequences=1,
            token_ids_T=none,
            hidden_TD=torch.zeros(0, hidden_size, device=device),
            noise_key=torch.zeros(4, dtype=torch.int64, device=device),
        )
        was_training, self.router.alone = self.router.training, True
        self.router.train()
        with torch.no_grad():
            assignment: Assignment = self.router(torch.zeros(0, self.router.gating.num_experts, device=device), ctx)
        self.router.train(was_training)
        self.router.alone = False
        return assignment

    def _assign(self, logits_TE: Tensor, ctx: RouteContext) -> Assignment:
        """The router's choice, or that of the tape which is replayed; written down if one records."""
        if self.tape is None:
            return self._route(logits_TE, ctx)
        ctx = self.tape.context(ctx, num_tokens=logits_TE.shape[0], device=logits_TE.device)
        assignment = self._route(logits_TE, ctx)
        self.tape.write(assignment, ctx.num_sequences)
        return assignment

    def _route(self, logits_TE: Tensor, ctx: RouteContext) -> Assignment:
        """The router's choice; in a recomputation that of the first pass, if ranks had to agree on it."""
        passes = self.running.first_passes
        if passes is None or not self.training or ctx.forced_ids_TK is not None:
            return self.router(logits_TE, ctx)  # type: ignore[no-any-return]
        ctx, first = passes.recall(logits_TE, ctx, kind=self.router.capabilities.assignment)
        assignment: Assignment = self.router(logits_TE, ctx)
        passes.keep(logits_TE, assignment, ctx, first)
        return assignment

    def _account(self, assignment: Assignment) -> Assignment:
        """Count the assignment and place its losses. In eval mode nothing happens."""
        if not self.training:
            return assignment
        self.running.add(assignment)
        if not assignment.losses:
            return assignment
        probe = self.running.probe
        if self.loss_mode == "collect":
            losses = {name: collect_loss(loss, probe) for name, loss in assignment.losses.items()}
            return replace(assignment, losses=losses)
        weights = inject_losses(
            assignment.weights, list(assignment.losses.values()), scale=self.running.loss_scale, probe=probe
        )
        # What goes out is for the log only: a second path into the graph would count the loss twice.
        shown = {name: loss.detach() for name, loss in assignment.losses.items()}
        return replace(assignment, weights=weights, losses=shown)

    def learned(self) -> None:
        """Called after `router.update`: a subclass may publish what the router learned."""

    @property
    def losses_per_pass(self) -> int:
        """Marks that one forward pass leaves on the probe once its losses are differentiated."""
        return min(self._num_losses, 1) if self.loss_mode == "inject" else self._num_losses

    @property
    def trains_router(self) -> bool:
        """Whether anything the losses could train wants a gradient; a frozen gate has no use for them."""
        return any(parameter.requires_grad for parameter in self._router_parameters())

    def _router_parameters(self) -> Iterator[nn.Parameter]:
        """The gate projection and the router's own parameters."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if hasattr(self, "running"):
            parameter = next(self.parameters(), None)
            if parameter is not None:
                self.running.move(parameter.device)
        return self
