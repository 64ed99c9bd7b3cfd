"""Exchanges between ranks under torch.compile: the compiler steps out for them, and compiles what is around them.

A module of its own, since the decorator loads the compiler, which takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moerouters.dispatch.run import through_experts


@torch.compiler.disable  # type: ignore[untyped-decorator]
def through_experts_eager(*args: Any, **kwargs: Any) -> Tensor:
    """`through_experts`. Sizes of slices follow from the data, and the halves of an exchange are Python objects."""
    return through_experts(*args, **kwargs)
