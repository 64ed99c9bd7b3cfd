"""A backward pass in two halves: gradients of a stage's inputs at once, those of its weights later.

The graph of a stage has a trunk, the nodes between outputs and inputs, and twigs, which lead from the trunk to leaves
(weights, and whatever else accumulates a gradient). The first half runs the trunk and keeps the gradients that arrive
at nodes with twigs; the second half runs each of these nodes once more, for its twigs alone. Operators that compute
only the gradients which a pass wants - torch's own do, and `moerouters.kernels` - compute each of them once.

Zero Bubble Pipeline Parallelism (arXiv:2401.10241) splits like this; it needs no other model code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


@dataclass
class _Twigs:
    """A node of the trunk, the leaves that are reached from it alone, and the gradients that came to it."""

    node: Node
    leaves: list[Tensor]
    arrived: tuple[Tensor | None, ...] = ()

    def keep(self, arrived: tuple[Tensor | None, ...]) -> None:
        self.arrived = arrived

    def run(self) -> None:
        pairs = [(GradientEdge(self.node, i), grad) for i, grad in enumerate(self.arrived) if grad is not None]
        if pairs:
            torch.autograd.backward([edge for edge, _ in pairs], [grad for _, grad in pairs], inputs=self.leaves)


class WeightHalf:
    """What is left to do of a backward pass. Holds the graph, and is run once."""

    def __init__(self, twigs: list[_Twigs], whole: tuple[list[Tensor], list[Tensor | None]] | None = None) -> None:
        self._twigs, self._whole = twigs, whole

    def run(self) -> None:
        """Add to the gradients of the leaves; each part of the graph is let go as soon as it has run."""
        if self._whole is not None:
            torch.autograd.backward(*self._whole)
        self._whole = None
        while self._twigs:
            self._twigs.pop().run()


def whole_backward(outputs: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Add to the gradients of all leaves. grads: of each output; None for a 0-d loss."""
    wanted = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    if wanted:
        torch.autograd.backward([output for output, _ in wanted], [grad for _, grad in wanted])


def input_half(outputs: Sequence[Tensor], grads: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> WeightHalf:
    """Add to the gradients of `inputs`, leaves of the graph, and return what is left.

    A weight whose gradient has several sources in the stage (it is used twice) gets it here: run apart, they would run
    the trunk between them again. Where no input wants a gradient, nothing runs here.
    """
    wanted = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    tensors, arriving = [output for output, _ in wanted], [grad for _, grad in wanted]
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    if not inputs or not tensors:
        return WeightHalf([], (tensors, arriving) if tensors else None)
    twigs, early = _split(tensors, inputs)
    hooks = [twig.node.register_prehook(twig.keep) for twig in twigs]
    try:
        torch.autograd.backward(tensors, arriving, retain_graph=True, inputs=[*inputs, *early])
    finally:
        for hook in hooks:
            hook.remove()
    return WeightHalf(twigs)


def _split(outputs: list[Tensor], inputs: list[Tensor]) -> tuple[list[_Twigs], list[Tensor]]:
    """The trunk's nodes with twigs, and the leaves that no single node of them owns."""
    ends = {get_gradient_edge(tensor).node for tensor in inputs}
    roots = [get_gradient_edge(tensor).node for tensor in outputs]
    trunk: set[Node] = set()
    below: dict[Node, dict[Node, None]] = {}
    """For nodes off the trunk the leaves that they lead to, in a fixed order."""
    owners: dict[Node, dict[Node, None]] = {}
    for node in _children_first(roots):
        children = _children(node)
        if node in ends or any(child in trunk for child in children):
            trunk.add(node)
            for child in children:
                for leaf in below.get(child, ()):
                    owners.setdefault(leaf, {})[node] = None
        elif hasattr(node, "variable"):
            below[node] = {node: None}
        else:
            below[node] = {leaf: None for child in children for leaf in below[child]}
    loose = {leaf: None for root in roots for leaf in below.get(root, ())}  # of an output that needs no input
    of_node: dict[Node, _Twigs] = {}
    early: list[Tensor] = []
    for leaf in owners | loose:
        nodes = list(owners.get(leaf, ()))
        tensor: Any = getattr(leaf, "variable")  # noqa: B009  # AccumulateGrad's, unknown to torch's stubs
        if len(nodes) == 1 and leaf not in loose:
            of_node.setdefault(nodes[0], _Twigs(nodes[0], [])).leaves.append(tensor)
        else:
            early.append(tensor)
    return list(of_node.values()), early


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _children_first(roots: list[Node]) -> list[Node]:
    """All nodes below the roots, each after those that it leads to."""
    order: dict[Node, None] = {}
    entered: set[Node] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, left = stack.pop()
        if left:
            order[node] = None
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack += [(child, False) for child in _children(node)]
    return list(order)
