"""Every error that moerouters raises for its users.

A message has four parts, in this order: what happened, where it comes from, why (the rule that was broken), and
what to do. `explain` builds that text; the tests pin it.
"""

from __future__ import annotations


def explain(what: str, *, where: str = "", why: str = "", fix: str = "") -> str:
    """Join the four parts of a message, one labelled line each; empty parts are left out."""
    lines = [what]
    for label, text in (("from", where), ("cause", why), ("fix", fix)):
        if text:
            body = text.replace("\n", "\n         ")
            lines.append(f"  {label:<6} {body}")
    return "\n".join(lines)


class MoeroutersError(Exception):
    """Base of every error raised for a user's mistake or a plugin's failure."""

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        super().__init__(explain(what, where=where, why=why, fix=fix))


class RouterNotFound(MoeroutersError, LookupError):
    """No installed distribution offers a router of this name."""


class RouterUnavailable(MoeroutersError, RuntimeError):
    """The router is installed but cannot be used: failed import, conflict, wrong API, or blocked."""


class ConfigError(MoeroutersError, ValueError):
    """A config field has a wrong value or an unknown name."""


class ContextError(MoeroutersError, ValueError):
    """The router needs something of the RouteContext that the caller did not hand in."""


class AssignmentError(MoeroutersError, ValueError):
    """An Assignment breaks its own invariants."""


class ShapeError(MoeroutersError, ValueError):
    """A tensor has a shape that does not fit the layer or the gating."""


class NonFiniteLogits(MoeroutersError, FloatingPointError):
    """A gate produced NaN or infinity."""


class UnconsumedLoss(MoeroutersError, RuntimeError):
    """A router computed an aux loss and nobody added it to the loss that was differentiated."""


class UnsupportedError(MoeroutersError, NotImplementedError):
    """The combination is understood and deliberately not offered."""


class TraceError(MoeroutersError, ValueError):
    """A recorded trace does not fit the model that replays it."""


class RecomputeError(MoeroutersError, RuntimeError):
    """Activation checkpointing repeats a pass, and the experts that it chose are not known."""


class DispatchError(MoeroutersError, RuntimeError):
    """Tokens could not be exchanged between ranks: one of them died, hangs, or disagrees on what is sent."""


class StudyError(MoeroutersError, RuntimeError):
    """A study cannot go on."""


class ScheduleError(MoeroutersError, ValueError):
    """A pipeline schedule cannot run: a task is missing, misplaced, out of order, or waits for ever."""


class PipelineError(MoeroutersError, RuntimeError):
    """A pipeline stopped in the middle of a step: a rank died, hangs, or disagrees on what is sent."""
