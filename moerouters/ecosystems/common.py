"""What adapters share: refusing what would be ignored silently, and slots for code that knows no empty ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from moerouters.assignment import Assignment
from moerouters.capabilities import AssignmentKind
from moerouters.errors import ConfigError, UnsupportedError
from moerouters.router import Router
from moerouters.types import RouteContext


@contextmanager
def needs(distribution: str) -> Iterator[None]:
    """Imports inside get an error that says what to install."""
    try:
        yield
    except ImportError as error:
        raise UnsupportedError(
            f"this needs {distribution}.", why=str(error), fix=f"pip install {distribution}"
        ) from error


def expect_neutral(values: Mapping[str, object], neutral: Mapping[str, object], *, where: str, fix: str = "") -> None:
    """Raise ConfigError for settings of a framework's own router that have an effect there and would have none here."""
    ignored = [name for name in neutral if _acts(values.get(name), neutral[name])]
    if ignored:
        without = ", ".join(f"{name}={neutral[name]!r}" for name in ignored)
        raise ConfigError(
            "the model asks its router for what a router of moerouters would ignore.",
            where=f"{where}: " + ", ".join(f"{name}={values[name]!r}" for name in ignored),
            why="a second balancer works against the first one, and a setting that does nothing is a trap",
            fix=fix or f"{without}; a router plug-in brings the like of it",
        )


def _acts(value: object, neutral: object) -> bool:
    if isinstance(value, bool | int | float | str):
        return bool(value) and value != neutral
    return value is not None


def try_out(router: Router, *, hidden_size: int, device: torch.device) -> Assignment:
    """What the router makes of no tokens in training, given what these frameworks tell. One that needs token ids or a
    noise key raises ContextError now, and not in the first step."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    ctx = RouteContext(sequence_ids_T=none, num_sequences=1, hidden_TD=torch.zeros(0, hidden_size, device=device))
    was_training, router.alone = router.training, True
    router.train()
    try:
        with torch.no_grad():
            assignment: Assignment = router(torch.zeros(0, router.gating.num_experts, device=device), ctx)
    finally:
        router.train(was_training)
        router.alone = False
    return assignment


def expect_slots(assignment: Assignment, router: Router, *, where: str) -> None:
    """Raise UnsupportedError for a router that gives tokens more than K experts. assignment: any one of its."""
    K = router.gating.top_k
    width = assignment.expert_ids.shape[-1]
    if assignment.kind is not AssignmentKind.SLOTS or width != K:
        offered = f"{width} slots a token" if assignment.kind is AssignmentKind.SLOTS else f"'{assignment.kind}'"
        raise UnsupportedError(
            f"{type(router).__name__} hands out {offered}, and the model takes {K} experts a token.",
            where=where,
            why="buffers have room for T * K rows, which is known before anything is routed",
            fix="choose a router that gives K slots a token; `moerouters info` tells",
        )


def filled_slots(assignment: Assignment) -> Assignment:
    """The same with no empty slot: those get weight 0 and an expert that the token does not have yet.

    `Assignment.to_slots` may give a token an expert twice; code that counts rows from a [T, E] map would then miss one.
    Fillers go round robin over the tokens. `load_E` stays what the router chose.
    """
    ids_TK, E = assignment.expert_ids_TK, assignment.num_experts
    T, K = ids_TK.shape
    empty_TK = ids_TK == E
    first_T1 = torch.arange(T, device=ids_TK.device).unsqueeze(1) * K
    turned_TE = (torch.arange(E, device=ids_TK.device) + first_T1) % E
    taken_TE = chosen_map(assignment).gather(1, turned_TE)
    free_TE = turned_TE.gather(1, torch.argsort(taken_TE.to(torch.uint8), dim=1, stable=True))
    filler_TK = free_TE.gather(1, (empty_TK.cumsum(1) - 1).clamp(min=0))
    return replace(
        assignment,
        expert_ids=torch.where(empty_TK, filler_TK, ids_TK),
        weights=assignment.weights_TK.masked_fill(empty_TK, 0),
    )


def chosen_map(assignment: Assignment) -> Tensor:
    """bool [T, E]: which experts a token has, for any kind of assignment."""
    token_ids_N, expert_ids_N, _ = assignment.pairs()
    chosen = token_ids_N.new_zeros(assignment.num_tokens, assignment.num_experts + 1, dtype=torch.bool)
    chosen = chosen.index_put((token_ids_N, expert_ids_N), chosen.new_ones(()))
    return chosen[:, : assignment.num_experts].contiguous()


def may_leave_slots_empty(router: Router) -> bool:
    """Whether valid tokens may get fewer than K experts: the default selection never leaves a slot empty."""
    return type(router).select is not Router.select


def as_one(parts: nn.Module | Sequence[nn.Module]) -> nn.Module:
    """Model chunks of a pipeline stage as one module; a single one keeps its names."""
    chunks = [parts] if isinstance(parts, nn.Module) else list(parts)
    return chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
