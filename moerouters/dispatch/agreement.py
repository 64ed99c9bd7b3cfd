"""Ranks that meet in an exchange must agree on the form of a row: else gloo aborts the process or mixes up bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters.dispatch.site import Site
from moerouters.errors import DispatchError

HEADER = 2
"""Numbers in a header."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def header(rows: Tensor, device: torch.device) -> Tensor:
    """int64 [HEADER]: width and dtype of a row, as every rank sends them along with its counts."""
    code = _DTYPES.index(rows.dtype) if rows.dtype in _DTYPES else len(_DTYPES)
    return torch.tensor([rows.shape[-1], code], dtype=torch.int64, device=device)


def expect_agreement(headers_WH: Tensor, rows: Tensor, site: Site) -> None:
    """Raise DispatchError, naming the ranks, unless every header equals that of `rows`. Reads them on the host."""
    own = header(rows, headers_WH.device).tolist()
    others = headers_WH.tolist()
    different = [f"rank {rank} sends {_form(found)}" for rank, found in enumerate(others) if found != own]
    if different:
        raise DispatchError(
            f"ranks disagree on what a token is: {'; '.join(different)}; here it is {_form(own)}.",
            where=str(site),
            why="rows of all ranks meet in one batch per expert",
            fix="run every rank with the same model, dtype and autocast setting",
        )


def _form(found: list[int]) -> str:
    width, code = found
    return f"{width} x {str(_DTYPES[code]).removeprefix('torch.') if code < len(_DTYPES) else 'another dtype'}"
