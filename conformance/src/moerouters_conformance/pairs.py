"""Pairs of some tokens, and pairs under other token numbers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moerouters_conformance.readings import Pairs


def pairs_of_tokens(pairs: Pairs, tokens: Collection[int]) -> Pairs:
    """The pairs of these tokens."""
    taken = Pairs({place: weight for place, weight in pairs.items() if place[0] in tokens})
    taken.precision = pairs.precision
    return taken


def renamed_pairs(pairs: Pairs, tokens: Sequence[int]) -> Pairs:
    """Pairs of a batch whose row i is token tokens[i], under the tokens' numbers."""
    renamed = Pairs({(tokens[row], expert): weight for (row, expert), weight in pairs.items()})
    renamed.precision = pairs.precision
    return renamed
