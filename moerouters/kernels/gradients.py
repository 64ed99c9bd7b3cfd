"""Which gradients a pass of the engine is about."""

from __future__ import annotations

from typing import Any

import torch


def is_wanted(ctx: Any, index: int) -> bool:
    """Whether this pass of the engine will use the gradient of a tensor input; `needs_input_grad` tells only whether
    some pass may.

    The function is private to torch; torch.autograd.graph.register_multi_grad_hook uses it. It refuses leaves whose
    gradient torch.autograd.grad returns, which are wanted, and it is not there for who traces.
    """
    if not ctx.needs_input_grad[index]:
        return False
    node = ctx.next_functions[index][0]
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return True
