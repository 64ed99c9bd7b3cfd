"""Watch a stock router run once, and note what it computed: every tensor as the expression that made it.

Reading a router from its attributes means knowing every name that an author may choose. What it *does* has few forms: a
product, a score function, top-k, a quotient. So we run it, and look below autograd, where Python conveniences are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_VIEWS = frozenset(
    {"_unsafe_view", "alias", "clone", "contiguous", "detach", "expand", "reshape", "squeeze", "unsqueeze", "view"}
)
_CAST = "_to_copy"


@dataclass(frozen=True, eq=False)
class Expression:
    """How one tensor came to be. Two expressions are the same only if they are one object."""

    op: str
    """The operator without overload, `topk.1` for its second result; `leaf` for what went in; `other` for the rest."""
    inputs: tuple[Expression, ...] = ()
    constants: tuple[Any, ...] = ()
    name: str = ""
    """Of a leaf."""
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def without_views(self) -> Expression:
        """The same values before they were reshaped."""
        found = self
        while found.op in _VIEWS:
            found = found.inputs[0]
        return found

    def without_casts(self) -> Expression:
        """The same values before they were reshaped or cast."""
        found = self.without_views()
        while found.op == _CAST:
            found = found.inputs[0].without_views()
        return found

    @property
    def is_cast(self) -> bool:
        return self.op == _CAST

    def ancestors(self) -> list[Expression]:
        """This expression and all that it was made of, the nearest first."""
        found, waiting = {id(self): self}, [self]
        while waiting:
            for each in waiting.pop(0).inputs:
                if id(each) not in found:
                    found[id(each)] = each
                    waiting.append(each)
        return list(found.values())

    def scalars(self) -> tuple[float, ...]:
        """The numbers among the constants; flags are none."""
        return tuple(c for c in self.constants if isinstance(c, int | float) and not isinstance(c, bool))


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes an Expression for every tensor that is made while it is active.

    It sees what the dispatcher runs: `F.linear` as a matrix product, `softmax(dtype=float)` as a cast and a softmax.
    """

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noted: dict[int, tuple[Tensor, Expression]] = {}  # the tensor is kept alive, so that its id stays its own
        for name, tensor in leaves.items():
            self._note(tensor, Expression("leaf", name=name, shape=tuple(tensor.shape), dtype=tensor.dtype))

    def expression(self, tensor: Tensor) -> Expression:
        """How the tensor came to be."""
        if id(tensor) not in self._noted:
            self._note(tensor, Expression("other", shape=tuple(tensor.shape), dtype=tensor.dtype))
        return self._noted[id(tensor)][1]

    def _note(self, tensor: Tensor, expression: Expression) -> None:
        self._noted[id(tensor)] = (tensor, expression)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = tree_flatten((args, kwargs or {}))[0]
        inputs = tuple(self.expression(value) for value in arguments if isinstance(value, Tensor))
        constants = tuple(value for value in arguments if not isinstance(value, Tensor))
        result = func(*args, **(kwargs or {}))
        # In-place forms end in "_" and return their first argument, which from now on means its new value.
        op = func.overloadpacket.__name__
        op = op if op.startswith("_") else op.rstrip("_")
        several = isinstance(result, tuple | list)
        for i, tensor in enumerate(result if several else (result,)):
            if isinstance(tensor, Tensor):
                name = f"{op}.{i}" if several else op
                made = Expression(name, inputs, constants, shape=tuple(tensor.shape), dtype=tensor.dtype)
                self._note(tensor, made)
        return result
