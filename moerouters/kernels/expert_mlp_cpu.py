"""Experts on a CPU: tile by tile, so that what lies between two matrix products stays in the cache.

A tile is some neighbouring rows. They are gathered into a buffer, multiplied, activated and multiplied. For
backward only the first product `hidden_RF` is kept; it gathers again, computes the activation again, and has the
gradient of a combine weight from <dA, A> over the expert's width, not from <dY, Y> (SonicMoE, arXiv:2512.14080,
Sec. 4). Weight gradients are written in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moerouters.autocast import no_autocast
from moerouters.errors import ShapeError
from moerouters.kernels.expert_tiles import Piece, Plan, Tile, plan_tiles
from moerouters.kernels.routes import Routes
from moerouters.kernels.workspace import borrowed, fresh


@cache
def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a CPU multiplies this dtype in: float32 for halves without units for them (bfloat16 in AVX2 runs at 0.02 to
    0.4 of the speed of float32, by layout), else the dtype itself."""
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    has_units = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: False)
    return dtype if has_units() else torch.float32


@dataclass(frozen=True)
class Experts:
    """Weights, rows per expert, and the routes by which rows come from tokens; None where rows are given."""

    up_eFD: Tensor
    down_eDF: Tensor
    load_e: Tensor
    activation: str
    routes: Routes | None

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.up_eFD.dtype)

    def plan(self, num_rows: int, row_width: int, *, sum_width: int = 0) -> Plan:
        """row_width: elements that buffers hold for each row, sum_width: for each thread besides.

        Raises ShapeError where experts have more than num_rows.
        """
        load = self.load_e.tolist()
        if sum(load) > num_rows:
            raise ShapeError(
                f"experts have {sum(load)} rows, and there are {num_rows}.",
                why="load_e says how many of the rows, in this order, belong to each expert",
                fix="let load_e count the rows that are handed in",
            )
        size = self.dtype.itemsize
        # Halves that are multiplied as halves are rounded after each tile. Smaller ones cost bits: a weight gradient of
        # 4096 rows is 0.4% off with tiles of 1024, 0.6% with 320 and 1% with 64.
        threads = None if size >= torch.float32.itemsize else 1
        products = self.down_eDF[0].numel() if load else 0
        return plan_tiles(load, row_width * size, products, threads=threads, thread_bytes=sum_width * size)


class WeightGradient:
    """Of a stack of weights; zeros for experts without rows. What comes of an expert's pieces, one thread adds up."""

    def __init__(self, weight_eOI: Tensor, experts: Experts, sums_nOI: Tensor) -> None:
        self.grad_eOI = fresh(*weight_eOI.shape, dtype=weight_eOI.dtype)
        for expert in (experts.load_e == 0).nonzero().flatten().tolist():
            self.grad_eOI[expert] = 0
        self._sums_nOI = sums_nOI
        """For each thread, where weights are of another dtype than what is summed."""

    def add(self, piece: Piece, grad_RO: Tensor, input_RI: Tensor, thread: int) -> None:
        """What the piece's rows of a tile contribute."""
        grad_OI = self.grad_eOI[piece.expert]
        sum_OI = self._sums_nOI[thread] if len(self._sums_nOI) else grad_OI
        multiply(grad_RO[piece.rows].t(), input_RI[piece.rows], sum_OI, add=not piece.first)
        if piece.last and sum_OI is not grad_OI:
            grad_OI.copy_(sum_OI)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b. Every matrix product of this file."""
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def forward(x_MD: Tensor, experts: Experts, keep: bool) -> tuple[Tensor, Tensor]:
    """y_MD, in the dtype of the combine weights or of x; and hidden_RF = up @ x for each row, empty unless `keep`."""
    routes, dtype = experts.routes, experts.dtype
    W, D = experts.up_eFD.shape[1:]
    A, R = experts.down_eDF.shape[2], x_MD.shape[0] if routes is None else routes.order_N.shape[0]
    kept_RF = fresh(R if keep else 0, W, dtype=x_MD.dtype)
    plan = experts.plan(R, 2 * D + W + A)
    shapes = [((plan.buffer_rows, width), dtype) for width in (D, W, A, D)]
    if routes is not None:  # weighted sums are made in the weights' dtype: in bfloat16, K of them lose two bits
        shapes.append(((used(plan, R), D), routes.weights_TK.dtype))
    with no_autocast(x_MD.device), borrowed(shapes) as (x_rD, h_rF, a_rF, y_rD, *y_rows):
        y_RD = y_rows[0] if y_rows else fresh(R, D, dtype=x_MD.dtype)
        token_ids_R = None if routes is None else routes.token_ids_R(plan.end)

        def work(tiles: Iterable[Tile], thread: int) -> None:
            at = thread * plan.rows_alone
            for tile in tiles:
                rows, r = slice(tile.begin, tile.end), slice(at, at + tile.end - tile.begin)
                x_RD = fetch(x_MD, rows, token_ids_R, x_rD[r])
                hidden_RF = kept_RF[rows] if keep and kept_RF.dtype == dtype else h_rF[r]
                for expert, piece, _, _ in tile.pieces:
                    multiply(x_RD[piece], experts.up_eFD[expert].to(dtype).t(), hidden_RF[piece])
                if keep and kept_RF.dtype != dtype:
                    kept_RF[rows].copy_(hidden_RF)
                a_RF = activate(hidden_RF, experts.activation, a_rF[r], silu_RF=a_rF[r])
                out_RD = y_RD[rows] if y_RD.dtype == dtype else y_rD[r]
                for expert, piece, _, _ in tile.pieces:
                    multiply(a_RF[piece], experts.down_eDF[expert].to(dtype).t(), out_RD[piece])
                if y_RD.dtype != dtype:
                    y_RD[rows].copy_(out_RD)

        plan.run(work)
        # Only what no expert wrote is zeroed: zeroing everything first costs 8% of a small model's step.
        y_RD[plan.end :] = 0
        kept_RF[plan.end :] = 0
        return (y_RD if routes is None else routes.combine(y_RD, routes.weights_TK)), kept_RF


def backward(
    grad_y_MD: Tensor,
    x_MD: Tensor,
    kept_RF: Tensor,
    experts: Experts,
    wanted: Sequence[bool],
    product_RA: Tensor | None = None,
    keep_product: bool = False,
) -> list[Tensor]:
    """The wanted ones of the gradients of x, up, down and the combine weights, in this order.

    Those of x and of up are made from one product, grad_y @ down. A pass that wants the one hands it out last, with
    keep_product, for a later pass that wants the other, which gets it as product_RA.
    """
    of_x, of_up, of_down, of_weights = wanted
    routes, dtype = experts.routes, experts.dtype
    W, D = experts.up_eFD.shape[1:]
    A, R = experts.down_eDF.shape[2], kept_RF.shape[0]
    summed = experts.up_eFD.dtype != dtype
    plan = experts.plan(R, 3 * D + 2 * W + 3 * A, sum_width=summed * (of_up * W * D + of_down * D * A))
    shapes: list[tuple[tuple[int, ...], torch.dtype]]
    shapes = [((plan.buffer_rows, width), dtype) for width in (D, D, D, W, W, A, A, A)]
    shapes.append(((plan.threads if summed and of_up else 0, W, D), dtype))
    shapes.append(((plan.threads if summed and of_down else 0, D, A), dtype))
    if routes is not None:
        shapes.append(((used(plan, R) if of_x else 0, D), dtype))
    with no_autocast(x_MD.device), borrowed(shapes) as (
        x_rD, dy_rD, dx_rD, h_rF, dh_rF, a_rF, da_rF, s_rF, up_sums_nFD, down_sums_nDF, *dx_rows
    ):  # fmt: skip
        dx_RD = dx_rows[0] if dx_rows else fresh(R if of_x else 0, D, dtype=x_MD.dtype)
        d_up = WeightGradient(experts.up_eFD, experts, up_sums_nFD) if of_up else None
        d_down = WeightGradient(experts.down_eDF, experts, down_sums_nDF) if of_down else None
        token_ids_R, weights_R1, d_weights_R = None, None, None
        if routes is not None:
            token_ids_R, weights_R1 = routes.token_ids_R(plan.end), routes.weights_R1(plan.end)
            d_weights_R = weights_R1.new_zeros(R) if of_weights else None
        handed_RA = fresh(R, A, dtype=dtype) if keep_product else None

        def work(tiles: Iterable[Tile], thread: int) -> None:
            at = thread * plan.rows_alone
            for tile in tiles:
                rows, r = slice(tile.begin, tile.end), slice(at, at + tile.end - tile.begin)
                hidden_RF = kept_RF[rows] if kept_RF.dtype == dtype else h_rF[r].copy_(kept_RF[rows])
                a_RF = activate(hidden_RF, experts.activation, a_rF[r], silu_RF=s_rF[r])
                dy_RD, da_RF = fetch(grad_y_MD, rows, token_ids_R, dy_rD[r]), da_rF[r]
                if product_RA is not None:
                    da_RF.copy_(product_RA[rows])
                elif of_x or of_up or of_weights:
                    for expert, piece, _, _ in tile.pieces:
                        multiply(dy_RD[piece], experts.down_eDF[expert].to(dtype), da_RF[piece])
                if handed_RA is not None:
                    handed_RA[rows] = da_RF
                if d_weights_R is not None:
                    products_RF = torch.mul(da_RF, a_RF, out=dh_rF[r, :A])
                    d_weights_R[rows] = products_RF.sum(dim=1, dtype=d_weights_R.dtype)
                if d_down is not None:
                    if weights_R1 is not None:  # either factor will do: the narrower one
                        (dy_RD if D < A else a_RF).mul_(weights_R1[rows])
                    for each in tile.pieces:
                        d_down.add(each, dy_RD, a_RF, thread)
                if not (of_x or of_up):
                    continue
                if weights_R1 is not None:
                    da_RF.mul_(weights_R1[rows])
                dh_RF = activate_backward(da_RF, hidden_RF, experts.activation, dh_rF[r], silu_RF=s_rF[r])
                if d_up is not None:
                    x_RD = fetch(x_MD, rows, token_ids_R, x_rD[r])
                    for each in tile.pieces:
                        d_up.add(each, dh_RF, x_RD, thread)
                if of_x:
                    out_RD = dx_RD[rows] if dx_RD.dtype == dtype else dx_rD[r]
                    for expert, piece, _, _ in tile.pieces:
                        multiply(dh_RF[piece], experts.up_eFD[expert].to(dtype), out_RD[piece])
                    if dx_RD.dtype != dtype:
                        dx_RD[rows].copy_(out_RD)

        plan.run(work)
        found = []
        if of_x:
            dx_RD[plan.end :] = 0
            # Sums over K are made in the dtype of computation and rounded once.
            found.append(dx_RD if routes is None else routes.combine(dx_RD, None).to(x_MD.dtype))
        found += [gradient.grad_eOI for gradient in (d_up, d_down) if gradient is not None]
        if routes is not None and d_weights_R is not None:
            found.append(d_weights_R.index_select(0, routes.inverse_N).view_as(routes.weights_TK))
        if handed_RA is not None:
            found.append(handed_RA)
        return found


def used(plan: Plan, num_rows: int) -> int:
    """Rows of experts, and one of zeros for all empty slots if there are any: many have a slot for every expert."""
    return min(num_rows, plan.end + 1)


def fetch(source_MD: Tensor, rows: slice, token_ids_R: Tensor | None, buffer_RD: Tensor) -> Tensor:
    """A tile of rows in the buffer's dtype: from tokens, or as they are."""
    if token_ids_R is None:
        part_RD = source_MD[rows]
    elif source_MD.dtype == buffer_RD.dtype:
        return torch.index_select(source_MD, 0, token_ids_R[rows], out=buffer_RD)
    else:
        part_RD = source_MD.index_select(0, token_ids_R[rows])
    return part_RD if part_RD.dtype == buffer_RD.dtype else buffer_RD.copy_(part_RD)


def activate(hidden_RF: Tensor, activation: str, out_RF: Tensor, *, silu_RF: Tensor) -> Tensor:
    """silu(gate) * up or gelu(up) into out_RF; silu(gate) into silu_RF, which may be out_RF."""
    if activation == "gelu":
        torch.ops.aten.gelu.out(hidden_RF, out=out_RF)
        return out_RF
    gate_RF, up_RF = hidden_RF.chunk(2, dim=1)
    torch.ops.aten.silu.out(gate_RF, out=silu_RF)
    return torch.mul(silu_RF, up_RF, out=out_RF)


def activate_backward(
    grad_RF: Tensor, hidden_RF: Tensor, activation: str, out_RF: Tensor, *, silu_RF: Tensor
) -> Tensor:
    """The gradient of `hidden_RF` into out_RF; overwrites grad_RF. silu_RF is what `activate` made."""
    if activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(grad_RF, hidden_RF, grad_input=out_RF)
        return out_RF
    gate_RF, up_RF = hidden_RF.chunk(2, dim=1)
    of_gate_RF, of_up_RF = out_RF.chunk(2, dim=1)
    torch.mul(grad_RF, silu_RF, out=of_up_RF)
    torch.ops.aten.silu_backward.grad_input(grad_RF.mul_(up_RF), gate_RF, grad_input=of_gate_RF)
    return out_RF
