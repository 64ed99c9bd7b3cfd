"""Reading assignments of any kind as plain Python values, and comparing them with a message that says where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from moerouters import Assignment
from moerouters_conformance.violation import Violation


class Pairs(dict[tuple[int, int], float]):
    """{(token, expert): weight}, and how finely the weights' dtype can tell two of them apart."""

    precision: float = 0.0


def weights_by_pair(assignment: Assignment) -> Pairs:
    """{(token, expert): weight} of everything but empty places."""
    token_ids_N, expert_ids_N, weights_N = (t.detach() for t in assignment.pairs())
    places = zip(token_ids_N.tolist(), expert_ids_N.tolist(), weights_N.tolist(), strict=True)
    pairs = Pairs({(token, expert): weight for token, expert, weight in places if expert != assignment.num_experts})
    if weights_N.dtype != torch.float64:  # a router may not take float64, and rules that do ask no more of it
        pairs.precision = 64 * torch.finfo(weights_N.dtype).eps
    return pairs


def experts_by_token(assignment: Assignment) -> list[list[int]]:
    """Per token its experts, rising."""
    found: list[list[int]] = [[] for _ in range(assignment.num_tokens)]
    for token, expert in sorted(weights_by_pair(assignment)):
        found[token].append(expert)
    return found


def expect_same_routes(
    actual: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    *,
    when: str,
    tokens: Iterable[int] | None = None,
) -> None:
    """Raise Violation at the first token that goes elsewhere."""
    for token in range(len(expected)) if tokens is None else tokens:
        if list(actual[token]) != list(expected[token]):
            raise Violation(
                f"token {token} goes to experts {list(actual[token])} {when}, else to {list(expected[token])}"
            )


def expect_same_pairs(actual: Pairs, expected: Pairs, *, when: str, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """Raise Violation at the first pair that is missing, extra, or weighs otherwise.

    No tolerance is finer than 64 units in the last place of what the weights are kept in.
    """
    rtol = max(rtol, *(getattr(pairs, "precision", 0.0) for pairs in (actual, expected)))
    for token, expert in sorted(actual.keys() | expected.keys()):
        here, there = actual.get((token, expert)), expected.get((token, expert))
        if here is None or there is None:
            has, lacks = (f"{when}", "else") if there is None else ("else", f"{when}")
            raise Violation(f"token {token} goes to expert {expert} {has}, and not {lacks}")
        if not _close(here, there, rtol=rtol, atol=atol):
            raise Violation(f"the weight of token {token} at expert {expert} is {here:.8g} {when}, else {there:.8g}")


def expect_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, when: str) -> None:
    """Raise Violation at the first tensor that differs in name, shape, dtype or any bit. NaN equals NaN."""
    if actual.keys() != expected.keys():
        raise Violation(f"there are {sorted(actual)} {when}, else {sorted(expected)}")
    for name, value in expected.items():
        other = actual[name]
        if other.dtype != value.dtype or other.shape != value.shape:
            raise Violation(
                f"{name} is {other.dtype} {list(other.shape)} {when}, else {value.dtype} {list(value.shape)}"
            )
        same = (other == value) | ((other != other) & (value != value))
        if not bool(same.all()):
            raise Violation(f"{name} is {shown(other)} {when}, else {shown(value)}")


def expect_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, when: str, rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    """As `expect_same_bits`, up to rounding."""
    if actual.keys() != expected.keys():
        raise Violation(f"there are {sorted(actual)} {when}, else {sorted(expected)}")
    for name, value in expected.items():
        other = actual[name]
        if other.shape != value.shape:
            raise Violation(f"{name} has shape {list(other.shape)} {when}, else {list(value.shape)}")
        if not torch.allclose(other.double(), value.double(), rtol=rtol, atol=atol, equal_nan=True):
            raise Violation(f"{name} is {shown(other)} {when}, else {shown(value)}")


def tensors_of(assignment: Assignment) -> dict[str, Tensor]:
    """Every tensor of an assignment by name."""
    named = {
        "expert_ids": assignment.expert_ids,
        "weights": assignment.weights,
        "token_ids_N": assignment.token_ids_N,
        "load_E": assignment.load_E,
        "tokens": assignment.tokens,
        "nonfinite": assignment.nonfinite,
        **{f"losses[{name!r}]": loss for name, loss in assignment.losses.items()},
        **{f"stats[{name!r}]": stat for name, stat in assignment.stats.items()},
    }
    return {name: value.detach() for name, value in named.items() if value is not None}


def state_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state_dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def shown(tensor: Tensor, limit: int = 160) -> str:
    """A tensor's numbers in one line."""
    values = tensor.detach().tolist()
    text = str(_rounded(values))
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def _rounded(values: object) -> object:
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.8g}") if isinstance(values, float) else values


def _close(left: float, right: float, *, rtol: float, atol: float) -> bool:
    if math.isnan(left) or math.isnan(right):
        return math.isnan(left) and math.isnan(right)
    return left == right or abs(left - right) <= atol + rtol * abs(right)
