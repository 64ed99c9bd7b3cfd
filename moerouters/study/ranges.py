"""Names for the parts of a training step, which a profiler shows; put on from outside, for the length of a block.

The library itself carries no timers and no ranges: outside of the block nothing of this is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch.profiler import record_function

import moerouters.dispatch.run as dispatch_run
import moerouters.handle as handle
from moerouters.dispatch import all_to_all, local, padded, tensor_sliced
from moerouters.dispatch.exchange import Exchange
from moerouters.lab.ranks import Ranks
from moerouters.lab.train import Trainer
from moerouters.layer import MoELayer

PREFIX = "moerouters.part "
STEP = "moerouters.step"
_BACKENDS = (all_to_all, local, padded, tensor_sliced)
"""Those that sum a token's rows, some of them not before the result is waited for."""


@contextmanager
def named_parts(trainer: Trainer) -> Iterator[None]:
    """While the block lasts, what the trainer's step calls is named by its part; the innermost name counts."""
    travel = "communication" if trainer.ranks.size > 1 else "other"
    with ExitStack() as stack:

        def name(owner: object, attribute: str, part: str) -> None:
            stack.enter_context(_named(owner, attribute, part))

        for module in trainer.model.modules():
            if hasattr(module, "attention_norm"):  # a block
                name(module.attention, "forward", "attention")
            if hasattr(module, "mlp_norm"):
                name(module.mlp, "forward", "mlp")
            if isinstance(module, MoELayer):
                name(module, "_logits", "gate")
                name(module, "_assign", "balance")
                name(module, "_account", "balance")
                name(module.router, "update", "balance")
                name(module, "_through_experts", "dispatch")
                name(module.experts, "forward", "experts")
                name(module, "_shared", "experts")
                name(module.dispatcher, "combine", "combine")
        name(dispatch_run, "make_plan", "dispatch")
        for backend in _BACKENDS:
            name(backend, "weighted_sum", "combine")
        name(Exchange, "begin", travel)
        name(Exchange, "end", travel)
        name(handle, "reduce_sums", travel)
        name(Ranks, "average_gradients", travel)
        name(Ranks, "clip_gradients", "optimizer")
        name(trainer.optimizer, "step", "optimizer")
        name(trainer.optimizer, "zero_grad", "optimizer")
        yield


@contextmanager
def _named(owner: Any, attribute: str, part: str) -> Iterator[None]:
    """While the block lasts, calls of it are a range of the part."""
    own = attribute in vars(owner)
    before = getattr(owner, attribute)
    setattr(owner, attribute, _in_range(before, PREFIX + part))
    try:
        yield
    finally:
        if own:
            setattr(owner, attribute, before)
        else:
            delattr(owner, attribute)


def _in_range(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(call)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return call(*args, **kwargs)

    return ranged
