"""The experts in Triton against a float64 loop over experts: interpreted here, compiled for real on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moerouters.kernels.counting_sort import SortedPairs, counting_sort
from moerouters.kernels.gpu import grouped_gemm as kernels
from moerouters.kernels.gpu import grouped_mlp as launches
from moerouters.kernels.gpu.tiles import TILES, tile_map, tile_map_kernel
from moerouters.kernels.grouped_gemm import (
    Activation,
    grouped_mlp_torch,
    grouped_mlp_triton,
    grouped_rows_triton,
)
from moerouters.kernels.launch import Arch, Role, blocks_for

from .compiled import Case

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter's bfloat16 is no arithmetic at all.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """In this mode torch fills what nobody has written with NaN and the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Layer:
    """Random inputs in float64 that are exact in `dtype`, and the plan of ids_TK.

    By default a tile is wide enough for D and F, neither a multiple of it: interpreted, tiles are what takes time.
    """

    def __init__(
        self,
        ids_TK: Tensor,
        num_experts: int,
        *,
        D: int = 12,
        F: int = 10,
        dtype: torch.dtype = torch.float32,
        activation: Activation = "swiglu",
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(dtype).double().to(DEVICE)

        num_tokens, slots = ids_TK.shape
        self.dtype, self.activation, self.num_experts = dtype, activation, num_experts
        self.ids_N = ids_TK.reshape(-1)
        self.plan = SortedPairs(*(t.to(DEVICE) for t in counting_sort(self.ids_N, num_experts)))
        self.x_TD = normal(num_tokens, D)
        self.weights_TK = torch.where(ids_TK == num_experts, 0, torch.rand(num_tokens, slots, generator=random))
        self.weights_TK = self.weights_TK.double().to(DEVICE)
        self.up_eHD = (normal(num_experts, 2 * F if activation == "swiglu" else F, D) / D**0.5).to(dtype).double()
        self.down_eDF = (normal(num_experts, D, F) / F**0.5).to(dtype).double()
        self.slope_TD = normal(num_tokens, D)

    def tensors(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """x, weights, up, down as leaves: in the layer's dtype with float32 weights, or all in `dtype`."""
        dtypes = [self.dtype, torch.float32, self.dtype, self.dtype] if dtype is None else [dtype] * 4
        wanted = (self.x_TD, self.weights_TK, self.up_eHD, self.down_eDF)
        return [t.to(d, copy=True).requires_grad_() for t, d in zip(wanted, dtypes, strict=True)]

    def results(self, function: Any, dtype: torch.dtype | None = None) -> list[Tensor]:
        """y and the gradients of x, weights, up and down."""
        tensors = self.tensors(dtype)
        y_TD = function(*tensors, *self.plan, activation=self.activation)
        nothing = sum(t.sum() * 0 for t in tensors)  # the reference has no graph without rows
        loss = (y_TD.double() * self.slope_TD).sum() + nothing
        return [y_TD.detach(), *torch.autograd.grad(loss, tensors)]


def assert_near(found: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    """By the norm of the difference over that of the result, which no NaN and no missing row passes."""
    for mine, right in zip(found, exact, strict=True):
        assert mine.shape == right.shape
        norm = float(right.norm())
        assert float((mine.double() - right).norm()) <= tolerance * norm if norm else not mine.any()


def check(layer: Layer) -> None:
    assert_near(
        layer.results(grouped_mlp_triton), layer.results(grouped_mlp_torch, torch.float64), TOLERANCE[layer.dtype]
    )


def random_ids(num_tokens: int, slots: int, num_experts: int, seed: int = 0) -> Tensor:
    """Distinct experts for every token, one in five slots empty."""
    random = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(num_tokens, num_experts, generator=random).argsort(dim=1)[:, :slots]
    return torch.where(torch.rand(num_tokens, slots, generator=random) < 0.2, num_experts, ids_TK)


IDS = {
    "random": (random_ids(13, 2, 3), 3),
    "one hot expert": (torch.tensor([[1, 3]] * 19), 3),
    "empty experts": (torch.tensor([[4, 2]] * 5), 6),
    "no tokens": (torch.zeros(0, 2, dtype=torch.int64), 3),
    "nothing chosen": (torch.full((3, 2), 2), 2),
    "every expert": (torch.arange(3).expand(5, 3), 3),
    "one expert": (torch.zeros(17, 1, dtype=torch.int64), 1),
}


@pytest.mark.parametrize(("ids_TK", "num_experts"), IDS.values(), ids=IDS.keys())
def test_equals_a_loop_over_experts_with_gradients(ids_TK: Tensor, num_experts: int) -> None:
    check(Layer(ids_TK, num_experts))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_activations(dtype: torch.dtype, activation: Activation) -> None:
    check(Layer(random_ids(11, 2, 3), 3, dtype=dtype, activation=activation))


def test_several_tiles_along_every_side() -> None:
    check(Layer(random_ids(20, 2, 2), 2, D=35, F=37))


def test_sizes_that_are_multiples_of_the_blocks() -> None:
    """No masks along columns and sums: rows still need theirs."""
    check(Layer(random_ids(20, 2, 2), 2, D=32, F=32))


LARGEST = 300 if ON_GPU else 18
sizes = st.integers(1, LARGEST)


@settings(max_examples=100 if ON_GPU else 4)
@given(st.tuples(sizes, sizes, sizes), st.integers(1, 3), st.integers(0, 2), st.integers(0, 9))
def test_any_sizes(tokens_and_widths: tuple[int, int, int], slots: int, more: int, seed: int) -> None:
    num_tokens, D, F = tokens_and_widths
    check(Layer(random_ids(num_tokens, slots, slots + more, seed), slots + more, D=D, F=F, seed=seed))


@pytest.mark.parametrize("load", [[3, 0, 18], [0, 0, 0]], ids=str)
def test_rows_that_stand_by_expert(load: list[int]) -> None:
    """Rows past the load hold NaN; they give zeros and reach no gradient."""
    layer = Layer(random_ids(sum(load) + 4, 1, 3), 3)
    experts_R = torch.repeat_interleave(torch.arange(3), torch.tensor(load))
    layer.plan = counting_sort(experts_R, 3)
    load_e = torch.tensor(load, device=DEVICE)
    x_RD, _, up_eHD, down_eDF = layer.tensors()
    with torch.no_grad():
        x_RD[sum(load) :] = torch.nan
    y_RD = grouped_rows_triton(x_RD, up_eHD, down_eDF, load_e)
    found = [y_RD.detach(), *torch.autograd.grad((y_RD * layer.slope_TD).sum(), [x_RD, up_eHD, down_eDF])]
    assert not found[0][sum(load) :].any()
    assert not found[1][sum(load) :].any()
    live = slice(0, sum(load))
    exact = [t.detach().double().requires_grad_() for t in (x_RD[live], up_eHD, down_eDF)]
    weights_R1 = torch.ones(sum(load), 1, dtype=torch.float64, device=DEVICE)
    order_R = torch.arange(sum(load), device=DEVICE)
    y = grouped_mlp_torch(exact[0], weights_R1, exact[1], exact[2], order_R, order_R, load_e)
    nothing = sum(t.sum() * 0 for t in exact)
    right = [y.detach(), *torch.autograd.grad((y * layer.slope_TD[live]).sum() + nothing, exact)]
    assert_near([found[0][live], found[1][live], *found[2:]], right, TOLERANCE[torch.float32])


def test_without_gradients_h_is_not_kept() -> None:
    layer = Layer(random_ids(13, 2, 3), 3)
    x_TD, weights_TK, up_eHD, down_eDF = layer.tensors()
    expected = grouped_mlp_triton(x_TD, weights_TK, up_eHD, down_eDF, *layer.plan)
    with torch.no_grad():
        assert torch.equal(grouped_mlp_triton(x_TD, weights_TK, up_eHD, down_eDF, *layer.plan), expected)
    routed = (x_TD, up_eHD, down_eDF, layer.plan.load_E, layer.plan.order_N, layer.plan.inverse_N, weights_TK)
    assert torch.ops.moerouters.grouped_mlp(*routed, 2, True, False)[1].numel() == 0


def test_the_same_bits_every_time() -> None:
    layer = Layer(random_ids(13, 2, 3), 3)
    for mine, again in zip(layer.results(grouped_mlp_triton), layer.results(grouped_mlp_triton), strict=True):
        assert torch.equal(mine, again)


def test_views_with_strides_are_read_as_they_stand() -> None:
    layer = Layer(random_ids(9, 2, 3), 3)
    x_TD, weights_TK, up_eHD, down_eDF = layer.tensors()
    expected = grouped_mlp_triton(x_TD, weights_TK, up_eHD, down_eDF, *layer.plan)
    wide_TD = torch.full((9, 40), torch.nan, device=DEVICE)
    wide_TD[:, :12] = x_TD.detach()
    turned = [t.detach().mT.contiguous().mT for t in (weights_TK, up_eHD, down_eDF)]
    assert torch.equal(grouped_mlp_triton(wide_TD[:, :12], *turned, *layer.plan), expected)
    assert torch.equal(grouped_mlp_triton(x_TD.detach().T.contiguous().T, *turned, *layer.plan), expected)


def test_only_the_products_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str) -> None:
        original = getattr(launches, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(launches, name, wrapper)

    for name in ("up_projection", "projection", "hidden_gradient", "weight_gradient"):
        counted(name)
    layer = Layer(random_ids(5, 2, 3), 3)

    def backward_of(*wanted: int) -> list[str]:
        tensors = [t.detach() for t in layer.tensors()]
        for index in wanted:
            tensors[index].requires_grad_()
        y_TD = grouped_mlp_triton(*tensors, *layer.plan)
        calls.clear()
        y_TD.sum().backward()
        return list(calls)

    assert backward_of(0) == ["hidden_gradient", "projection"]
    assert backward_of(1) == ["hidden_gradient"]
    assert backward_of(2) == ["hidden_gradient", "weight_gradient"]
    assert backward_of(3) == ["hidden_gradient", "weight_gradient"]


def test_are_well_formed_operators() -> None:
    layer = Layer(random_ids(3, 2, 2), 2, D=4, F=4)
    x_TD, weights_TK, up_eHD, down_eDF = layer.tensors()
    order_N, inverse_N, load_e = layer.plan
    ops = torch.ops.moerouters
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    routed = (x_TD, up_eHD, down_eDF, load_e, order_N, inverse_N, weights_TK, 2, True, True)
    torch.library.opcheck(ops.grouped_mlp.default, routed, test_utils=checks)
    of_three = torch.tensor([1, 2], device=DEVICE)
    torch.library.opcheck(
        ops.grouped_mlp.default, (x_TD, up_eHD, down_eDF, of_three, None, None, None, 1, True, True), test_utils=checks
    )
    h_RH = torch.randn(6, 8, device=DEVICE)
    torch.library.opcheck(
        ops.grouped_mlp_hidden_gradient.default,
        (layer.slope_TD.float(), h_RH, down_eDF.detach(), load_e, order_N, weights_TK.detach(), 2, True),
        test_utils=("test_schema",),
    )


def test_compiles_whole() -> None:
    layer = Layer(random_ids(5, 2, 3), 3)
    compiled = torch.compile(grouped_mlp_triton, fullgraph=True, backend="aot_eager")
    for mine, right in zip(layer.results(compiled), layer.results(grouped_mlp_triton), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize("load", [[0, 5, 4, 0], [0, 0], [9], [1] * 70, [300, 0, 1]], ids=str)
@pytest.mark.parametrize("rest", [0, 5])
def test_tiles_hold_every_row_once(load: list[int], rest: int) -> None:
    num_rows, height = sum(load) + rest, 4
    found = tile_map(torch.tensor(load, device=DEVICE), num_rows, height)
    expected = []
    start = 0
    for expert, rows in enumerate([*load, rest]):
        expected += [[expert, first, start + rows] for first in range(start, start + rows, height)]
        start += rows
    assert found.counts.tolist() == [sum(-(-rows // height) for rows in load), len(expected)]
    assert len(expected) <= len(found.tiles)
    assert found.tiles[: len(expected), :3].tolist() == expected


# What is compiled ahead of time: the launches above, at blocks of every target.

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_VALUES = {
    "up_kernel": ["x_ptr", "up_ptr", "h_ptr", "a_ptr"],
    "rows_kernel": ["x_ptr", "weight_ptr", "y_ptr"],
    "hidden_kernel": ["slope_ptr", "down_ptr", "h_ptr", "dh_ptr", "a_ptr"],
    "weight_kernel": ["left_ptr", "right_ptr", "grad_ptr"],
}
_TILES = {"tiles_ptr": "*i32", "counts_ptr": "*i32", "C": "i32:16", "D": "i32:16", "F": "i32:16"}
_OTHERS = {
    "up_kernel": _TILES | {"index_ptr": "*i64", "x_stride": "i32:16"},
    "rows_kernel": _TILES | dict.fromkeys(("weight_stride_e", "weight_stride_c", "weight_stride_d"), "i32:16"),
    "hidden_kernel": _TILES
    | {"index_ptr": "*i64", "weights_ptr": "*fp32", "dweights_ptr": "*fp32"}
    | {"slope_stride": "i32:16", "num_pairs": "i32:16"},
    "weight_kernel": {"left_index_ptr": "*i64", "load_ptr": "*i64", "ends_ptr": "*i64", "by_load_ptr": "*i64"}
    | {"left_stride": "i32:16", "right_stride": "i32:16", "M": "i32:16", "C": "i32:16"},
}
_ROLES: dict[str, Role] = {f"{role}_kernel": role for role in get_args(Role)}


def launched(
    name: str, arch: Arch, *, dtype: torch.dtype = torch.bfloat16, mean_rows: int = 4096, **special: Any
) -> Case:
    """One launch. special: constants, or integers that are 1, which Triton makes constants of."""
    kernel = getattr(kernels, name)
    blocks = blocks_for(_ROLES[name], arch, dtype, mean_rows)
    meta = launches.meta(blocks, dtype, columns=blocks.columns, depth=blocks.depth)
    options = {key: meta.pop(key) for key in ("num_warps", "num_stages")}
    meta |= {"SLOTS": 8, "GATED": True, "WEIGHTED": True, "SPLIT": blocks.columns >= 32} | special
    types = {name: kind for name, kind in _OTHERS[name].items() if name in kernel.arg_names and name not in special}
    types |= dict.fromkeys(_VALUES[name], f"*{_DTYPES[dtype]}")
    note = " ".join(
        [f"{_DTYPES[dtype]} {blocks.rows}x{blocks.columns}x{blocks.depth}", *(f"{k}={v}" for k, v in special.items())]
    )
    constants = {key: value for key, value in meta.items() if key in kernel.arg_names}
    slow = mean_rows < 4096 or dtype == torch.float32 or "EVEN" in special or "GATED" in special
    return Case(kernel, types, constants, options, (arch,), note, slow)


def _all_launched(arch: Arch, **kwargs: Any) -> list[Case]:
    names = ["up_kernel", "hidden_kernel"] if "mean_rows" in kwargs else ["up_kernel", "hidden_kernel", "weight_kernel"]
    along = [{"weight_stride_d": 1}, {"weight_stride_c": 1}]  # down as it stands, up the other way round
    cases = [launched(name, arch, **kwargs) for name in names]
    return cases + [launched("rows_kernel", arch, **stride, **kwargs) for stride in along]


ARCHS: tuple[Arch, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
COMPILED = [case for arch in ARCHS for case in _all_launched(arch)]
COMPILED += [case for arch in ARCHS for case in _all_launched(arch, EVEN=False)]
for arch in ("sm_90", "gfx942"):  # the other two differ in nothing but these tables' rows above
    COMPILED += [case for mean_rows in (64, 16) for case in _all_launched(arch, mean_rows=mean_rows)]
    COMPILED += _all_launched(arch, dtype=torch.float32)
    COMPILED += [launched(name, arch, GATED=False) for name in ("up_kernel", "hidden_kernel")]
COMPILED.append(
    Case(
        tile_map_kernel,
        {"load_ptr": "*i64", "tiles_ptr": "*i32", "counts_ptr": "*i32", "num_rows": "i32:16", "num_experts": "i32:16"},
        {"HEIGHT": 128, "EXPERTS": 256, "TILES": TILES},
        note="255 experts",
    )
)
