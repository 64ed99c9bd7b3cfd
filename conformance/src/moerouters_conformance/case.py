"""Case: one input as plain numbers, so that it shrinks, prints and can be pasted; Batch: the same as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moerouters import RouteContext
from moerouters.gating import GatingSettings

if TYPE_CHECKING:
    from moerouters_conformance.subject import Subject

PER_TOKEN = ("valid_T", "sequence_ids_T", "token_ids_T", "hidden_TD", "forced_ids_TK")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward is given."""

    logits_TE: Tensor
    ctx: RouteContext

    @property
    def num_tokens(self) -> int:
        return self.logits_TE.shape[0]

    def rows(self, index: Tensor | slice) -> Batch:
        """Some of the tokens, or all in another order, with everything that belongs to them."""
        given = {name: getattr(self.ctx, name) for name in PER_TOKEN}
        taken = {name: value[index] for name, value in given.items() if value is not None}
        return Batch(logits_TE=self.logits_TE[index], ctx=replace(self.ctx, **taken))

    def with_logits(self, logits_TE: Tensor) -> Batch:
        return replace(self, logits_TE=logits_TE)

    def with_context(self, **fields: object) -> Batch:
        return replace(self, ctx=replace(self.ctx, **fields))  # type: ignore[arg-type]


def make_batch(logits_TE: Tensor, *, hidden_size: int, valid_T: Tensor | None = None) -> Batch:
    """A batch with everything a router may ask its context for; what stands in row t depends on t alone."""
    T = logits_TE.shape[0]
    ctx = RouteContext(
        valid_T=valid_T,
        sequence_ids_T=torch.zeros(T, dtype=torch.int64),
        num_sequences=1,
        token_ids_T=torch.arange(T),
        hidden_TD=torch.arange(T * hidden_size).reshape(T, hidden_size).sin(),
        noise_key=torch.tensor([0, 0, 0, 0]),
    )
    return Batch(logits_TE=logits_TE, ctx=ctx)


def warm_up_logits(step: int, num_experts: int, *, tokens: int = 16) -> Tensor:
    """[tokens, E] that a router learns from before it is looked at: early experts are favoured."""
    noise_TE = torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(step))
    return noise_TE + torch.linspace(1, -1, num_experts)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A gating, a mode, what the router learned before, and the logits of one batch."""

    settings: GatingSettings
    logits: tuple[tuple[float, ...], ...]
    dtype: str = "float32"
    valid: tuple[bool, ...] | None = None
    training: bool = True
    warm_up: int = 0
    """Updates on `warm_up_logits` before."""

    @property
    def logits_TE(self) -> Tensor:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.tensor(self.logits, dtype=dtype).reshape(len(self.logits), self.settings.num_experts)

    def batch(self, subject: Subject) -> Batch:
        valid_T = None if self.valid is None else torch.tensor(self.valid, dtype=torch.bool)
        return make_batch(self.logits_TE, hidden_size=subject.hidden_size, valid_T=valid_T)

    def describe(self) -> str:
        """The case in numbers, for a report."""
        E, K = self.settings.num_experts, self.settings.top_k
        mode = "training" if self.training else "eval"
        head = f"T={len(self.logits)}, E={E}, K={K}, {gating_code(self.settings, full=True)}, {mode}"
        if self.warm_up:
            head += f", after {self.warm_up} update{'s' if self.warm_up > 1 else ''}"
        lines = [head, f"logits_TE = {_rows(self.logits)}" + ("" if self.dtype == "float32" else f" ({self.dtype})")]
        if self.valid is not None:
            lines.append(f"valid_T = {list(self.valid)}")
        return "\n".join(lines)

    def repro(self, subject: Subject) -> str:
        """A script that routes this case, with public names only."""
        E, T = self.settings.num_experts, len(self.logits)
        dtype = "" if self.dtype == "float32" else f", dtype=torch.{self.dtype}"
        lines = [
            "import torch, moerouters",
            f"gating = {gating_code(self.settings)}",
            *subject.build_code(),
        ]
        if self.warm_up:
            lines += [
                f"for step in range({self.warm_up}):",
                f"    noise = torch.randn(16, {E}, generator=torch.Generator().manual_seed(step))",
                f"    warm_up = router(noise + torch.linspace(1, -1, {E}){_context(subject, tokens=16)})",
                "    router.update(dict(warm_up.stats))",
            ]
        if not self.training:
            lines.append("router.eval()")
        reshape = "" if T else f".reshape(0, {E})"
        valid = "" if self.valid is None else f"valid_T=torch.tensor({list(self.valid)})"
        lines += [
            f"logits_TE = torch.tensor({_rows(self.logits)}{dtype}){reshape}",
            f"assignment = router(logits_TE{_context(subject, tokens=T, more=valid)})",
            "print(assignment)",
        ]
        return "\n".join(lines)


def gating_code(settings: GatingSettings, *, full: bool = False) -> str:
    """The call that makes this gating; `full` leaves out the sizes, which a description states already."""
    changed = settings.model_dump(exclude_defaults=True)
    for name in ("num_experts", "top_k", "score", "softmax_after_topk"):
        changed.pop(name, None)
    maker = "softmax_after_topk" if settings.softmax_after_topk else settings.score
    if settings.softmax_after_topk and changed.get("renormalize") is False:
        changed.pop("renormalize")
    extras = [f"{name}={value!r}" for name, value in changed.items()]
    if full:
        return " ".join([maker, *extras])
    return f"moerouters.Gating.{maker}({', '.join([str(settings.num_experts), str(settings.top_k), *extras])})"


def _context(subject: Subject, *, tokens: int, more: str = "") -> str:
    values: dict[str, Callable[[], str]] = {
        "token_ids_T": lambda: f"torch.arange({tokens})",
        "sequence_ids_T": lambda: f"torch.zeros({tokens}, dtype=torch.int64)",
        "num_sequences": lambda: "1",
        "hidden_TD": lambda: (
            f"torch.arange({tokens * subject.hidden_size}).reshape({tokens}, {subject.hidden_size}).sin()"
        ),
        "noise_key": lambda: "torch.tensor([0, 0, 0, 0])",
    }
    fields = [more] if more else []
    fields += [f"{name}={values[name]()}" for name in sorted(subject.needs)]
    return f", moerouters.RouteContext({', '.join(fields)})" if fields else ""


def _rows(logits: tuple[tuple[float, ...], ...]) -> str:
    return str([list(row) for row in logits])
