"""Ranks that meet in an exchange must agree on the form of a row: else gloo aborts the process or mixes up bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from moerouters.dispatch.exchange import all_gather_single
from moerouters.dispatch.site import Site
from moerouters.errors import DispatchError

HEADER = 3
"""Numbers in a header."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NO_CAST = -1


def header(rows: Tensor, device: torch.device) -> Tensor:
    """int64 [HEADER]: width and dtype of a row, and what autocast will make of it, as every rank sends them along with
    its counts. Under autocast experts give back another dtype than they got."""
    kind = rows.device.type
    cast = _code(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else _NO_CAST
    return torch.tensor([rows.shape[-1], _code(rows.dtype), cast], dtype=torch.int64, device=device)


def gather_headers(own_H: Tensor, site: Site) -> Tensor:
    """int64 [num_ranks, H]: the header of every rank, with whatever numbers ranks compare beside it."""
    headers_WH = own_H.new_empty(site.num_ranks, own_H.numel())
    with site.guarded("the exchange of headers"):
        all_gather_single(headers_WH.view(-1), own_H, group=site.group)
    return headers_WH


def expect_agreement(headers_WH: Tensor, rows: Tensor, site: Site, *, first: int = 0) -> None:
    """Raise DispatchError, naming the ranks, unless every header equals that of `rows`. Reads them on the host. The
    headers are those of neighbours, of which the first has that number."""
    own = header(rows, headers_WH.device).tolist()
    others = headers_WH.tolist()
    different = [f"rank {rank} sends {_form(found)}" for rank, found in enumerate(others, first) if found != own]
    if different:
        raise DispatchError(
            f"ranks disagree on what a token is: {'; '.join(different)}; here it is {_form(own)}.",
            where=str(site),
            why="rows of all ranks meet in one batch per expert",
            fix="run every rank with the same model, dtype and autocast setting",
        )


def expect_results(y_RD: Tensor, x_RD: Tensor, where: object) -> None:
    """Raise DispatchError unless the experts gave a row for each row, as wide: others wait for rows of that form."""
    if y_RD.shape != x_RD.shape:
        raise DispatchError(
            f"experts got rows of shape {list(x_RD.shape)} and gave {list(y_RD.shape)}.",
            where=str(where),
            why="what they give goes back to the ranks of the tokens, which wait for as many rows of that width",
            fix="let the experts give one row of the same width for each row, padding included",
        )


def _code(dtype: torch.dtype) -> int:
    return _DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES)


def _form(found: list[int]) -> str:
    width, code, cast = found
    return f"{width} x {_name(code)}" + (f" under autocast to {_name(cast)}" if cast != _NO_CAST else "")


def _name(code: int) -> str:
    return str(_DTYPES[code]).removeprefix("torch.") if code < len(_DTYPES) else "another dtype"
