"""What a check raises when a rule does not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moerouters_conformance.case import Case


class Violation(Exception):
    """A rule is broken. The text says what was seen, with tensor names and numbers; no knowledge of the check needed.

    An exception and no assert: it works under `python -O`, and hypothesis shrinks it as it shrinks any failure.
    """

    example: Case | None = None
    """The smallest input that showed it; set by `forall`."""

    def __init__(self, saw: str, *, likely: str = "") -> None:
        super().__init__(saw)
        self.saw = saw
        self.likely = likely
        """A cause, only where the check can tell."""


class NotApplicable(Exception):
    """The rule has nothing to check on this router; the text says why."""


class Refused(Exception):
    """The router refuses this gating in due form, by ConfigError or UnsupportedError: an input to pass over."""


class Blocked(Exception):
    """The rule was not run because one that it stands on failed."""
