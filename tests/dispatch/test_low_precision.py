"""bfloat16 and float16 over ranks against the same layer, in the same dtype, in one process."""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters import RouteContext
from moerouters_conformance.pool import rank_pool

from .padded_jobs import steps
from .parity import Case, forced_ids, hidden, layer_of, pull

CASES = [
    Case(dispatcher, (7, 7), capacity_factor=1.25, dtype=dtype)
    for dispatcher in ("all_to_all", "padded")
    for dtype in (torch.bfloat16, torch.float16)
]


def test_half_precision_is_rounded_where_one_process_rounds() -> None:
    """Rows take the same products, summed in float32 and rounded once each; only weight gradients are rounded once
    for all tokens where one process, taking the ranks' tokens apart, rounds for each part and again for their sum."""
    by_rank = rank_pool().run(steps, CASES)
    for index, case in enumerate(CASES):
        unit = torch.finfo(case.dtype).eps
        alone = [alone_on(case, member) for member in range(2)]
        for rank, results in enumerate(by_rank):
            have, member = results[index], rank % 2
            assert have["y"].dtype == have["x.grad"].dtype == case.dtype
            for name in ("y", "x.grad"):
                want = alone[member][name].double()
                assert bool(((have[name].double() - want).abs() <= unit * (1 + want.abs())).all()), (case, name)
            for name in ("experts.up_eFD.grad", "experts.down_eDF.grad"):
                here = slice(4 * member, 4 * member + 4)
                parts = [found[name][here].double() for found in alone]
                apart = (have[name].double() - parts[0] - parts[1]).abs()
                assert bool((apart <= unit * (parts[0].abs() + parts[1].abs()) + unit * unit).all()), (case, name)


def alone_on(case: Case, member: int) -> dict[str, Tensor]:
    """Output and gradients of one member's tokens, with all experts in this process."""
    layer, x_TD = layer_of(case), hidden(case, member)
    y_TD = layer(x_TD, RouteContext(forced_ids_TK=forced_ids(case, member))).hidden
    (y_TD.double() * pull(case, member)).sum().backward()
    result = {f"{name}.grad": parameter.grad for name, parameter in layer.named_parameters()}
    return {
        name: value for name, value in {**result, "y": y_TD.detach(), "x.grad": x_TD.grad}.items() if value is not None
    }
