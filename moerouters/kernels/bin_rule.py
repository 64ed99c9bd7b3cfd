"""Which bin a float lies in: a shift of its bits, the same in every implementation of `bins.py`."""

from __future__ import annotations

OCTAVE_BITS = 3
"""Eight bins per octave of distance."""
MANTISSA_BITS = {4: 23, 8: 52}
"""By bytes of a float."""
EXPONENT_BIAS = {4: 127, 8: 1023}


def num_bins(finest: int, widest: int) -> int:
    """B + 1."""
    return 2 * ((widest - finest << OCTAVE_BITS) + 1) + 1


def bin_rule(itemsize: int, finest: int, widest: int) -> tuple[int, int, int]:
    """shift, base and marks: with d = (the value's bits as a signed magnitude) >> shift, the bin of a value is
    clip(d, base - 1, base - 1 + marks) + clip(d, -base - marks, -base) + marks + 1."""
    base = (EXPONENT_BIAS[itemsize] + finest) << OCTAVE_BITS
    return MANTISSA_BITS[itemsize] - OCTAVE_BITS, base, (widest - finest << OCTAVE_BITS) + 1
