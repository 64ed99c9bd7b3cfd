"""How hard to look: the number of examples, and which costly kinds of check run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from moerouters.errors import ConfigError

if TYPE_CHECKING:
    import hypothesis


class Cost(StrEnum):
    """What a check needs beside a few milliseconds; profiles leave kinds out, and reports count what was left out."""

    CHEAP = "cheap"
    HISTORY = "hundreds of updates"
    CODEGEN = "code generation"
    PROCESS = "a fresh interpreter"
    RANKS = "a pool of ranks"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One of `PROFILES`."""

    name: str
    examples: int
    """Inputs per property."""
    histories: int
    """Sequences of batches per balance property."""
    costs: frozenset[Cost]
    random: bool = False
    """False: the same examples wherever one version of hypothesis runs, so what is green stays green."""
    shrink: bool = True
    """Whether to look for the smallest input that fails, once one does."""

    def settings(self, *, examples: int | None = None) -> hypothesis.settings:
        """Settings for one property. No deadline: the first torch call of a process can take seconds."""
        from hypothesis import Phase, settings

        return settings(
            max_examples=examples or self.examples,
            derandomize=not self.random,
            database=None,
            deadline=None,
            # Two violations found by one check would arrive as a group without an example of its own.
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink) if self.shrink else (Phase.generate,),
        )


_ALL = frozenset(Cost)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(name="smoke", examples=5, histories=1, costs=frozenset({Cost.CHEAP})),
        Profile(name="default", examples=50, histories=3, costs=_ALL),
        Profile(name="thorough", examples=1000, histories=20, costs=_ALL, random=True),
    )
}


def find_profile(name: str) -> Profile:
    """The profile of this name; ConfigError for another."""
    if name not in PROFILES:
        raise ConfigError(
            f"there is no profile {name!r}.",
            why=f"profiles are {', '.join(PROFILES)}",
            fix="smoke for a commit hook, default for CI, thorough for the night",
        )
    return PROFILES[name]
