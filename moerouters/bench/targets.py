"""What is to be reached, and whether it was: by the 95% bootstrap interval of a median over at least 15 rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import Literal

from pydantic import BaseModel, ConfigDict

from moerouters.bench.rows import Row
from moerouters.bench.timing import Ratio

ENOUGH_ROUNDS = 15
Reached = Literal["yes", "just", "no", "too few rounds"]
"""yes: the whole interval; just: an end of it, which counts as well; no."""


class Target(BaseModel):
    """One line of the table of goals. impl: patterns of names, with | between them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    text: str
    kind: Literal["cpu", "cuda"]
    subject: str
    shape: str
    impl: str = "moerouters"
    passes: str
    dtype: Literal["float32", "bfloat16"]
    measure: str
    """`over PEER` (a ratio of times), `peak over IMPL` (of memory), or a name in `Row.values`, or `median_ms`."""
    limit: float
    at_least: bool = False
    """Whether more is better."""

    @property
    def goal(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


class Verdict(BaseModel):
    """What a run found of one target."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: Target
    impl: str
    allocator: str
    value: float
    low: float
    high: float
    reached: Reached


_BOTH = "forward+backward"


def _layer(name: str, shape: str, limit: float, kind: Literal["cpu", "cuda"]) -> Target:
    return Target(
        id=f"layer-{kind}-{name}",
        text=f"stacked layers at {shape}, over the faster dense MLP",
        kind=kind,
        subject="layer",
        shape=shape,
        passes=_BOTH,
        dtype="float32" if kind == "cpu" else "bfloat16",
        measure="over dense_mlp",
        limit=limit,
    )


def _peers(id: str, text: str, shape: str, impl: str, limit: float, *, kind: Literal["cpu", "cuda"]) -> Target:
    return Target(
        id=id,
        text=text,
        kind=kind,
        subject="layer",
        shape=shape,
        impl=impl,
        passes=_BOTH,
        dtype="float32" if kind == "cpu" and shape != "cpu-bf16" else "bfloat16",
        measure="over moerouters",
        limit=limit,
        at_least=True,
    )


def _memory(shape: str, kind: Literal["cpu", "cuda"]) -> Target:
    return Target(
        id=f"memory-{kind}-{shape}",
        text=f"peak memory at {shape}, over transformers' grouped_mm",
        kind=kind,
        subject="layer",
        shape=shape,
        passes=_BOTH,
        dtype="float32" if kind == "cpu" else "bfloat16",
        measure="peak over hf-grouped_mm",
        limit=0.7,
    )


def _arithmetic(passes: str, limit: float) -> Target:
    return Target(
        id=f"tflops-cuda-{passes.replace('+', '-')}",
        text=f"arithmetic at qwen3-30b, {passes}, TFLOP/s",
        kind="cuda",
        subject="layer",
        shape="qwen3-30b",
        passes=passes,
        dtype="bfloat16",
        measure="tflops",
        limit=limit,
        at_least=True,
    )


def _share(shape: str, limit: float, kind: Literal["cpu", "cuda"]) -> Target:
    return Target(
        id=f"balancer-{kind}-{shape}",
        text=f"a balancer's extra time at {shape}, share of the layer's step",
        kind=kind,
        subject="balance",
        shape=shape,
        impl="*",
        passes="step",
        dtype="float32" if kind == "cpu" else "bfloat16",
        measure="over layer_step",
        limit=limit,
    )


def _moved(passes: str, limit: float) -> Target:
    return Target(
        id=f"{passes}-cuda",
        text=f"{passes} of the local back-end at deepseek-v3, TB/s",
        kind="cuda",
        subject="dispatch",
        shape="deepseek-v3",
        impl="local",
        passes=passes,
        dtype="bfloat16",
        measure="tb_per_s",
        limit=limit,
        at_least=True,
    )


_PEERS = "hf-*|grouped_mm|torchtitan-style|tutel|scattermoe|sonicmoe|megablocks"
TARGETS = (
    _layer("16", "cpu-16", 1.05, "cpu"),
    _layer("64", "cpu-64", 1.10, "cpu"),
    _peers("peers-cpu-16", "transformers' layers over ours at cpu-16", "cpu-16", "hf-*", 1.15, kind="cpu"),
    _peers("peers-cpu-64", "transformers' layers over ours at cpu-64", "cpu-64", "hf-*", 1.15, kind="cpu"),
    _peers("grouped-cpu-16", "raw F.grouped_mm over ours at cpu-16", "cpu-16", "grouped_mm", 1.0, kind="cpu"),
    _peers("grouped-cpu-64", "raw F.grouped_mm over ours at cpu-64", "cpu-64", "grouped_mm", 1.0, kind="cpu"),
    _peers("bf16-cpu", "transformers' grouped_mm in bf16 over ours", "cpu-bf16", "hf-grouped_mm", 5.0, kind="cpu"),
    _memory("cpu-16", "cpu"),
    _memory("cpu-64", "cpu"),
    Target(
        id="router-cpu", text="`topk` on logits, over plain softmax + topk + bincount", kind="cpu", subject="router",
        shape="gate-64", impl="topk", passes="forward", dtype="float32", measure="over softmax_topk", limit=0.6,
    ),
    Target(
        id="dual-cpu", text="BIP, 4 dual iterations, over torch.topk and kthvalue, same bits", kind="cpu",
        subject="balance", shape="gate-64", impl="dual_update", passes="dual", dtype="float32",
        measure="over topk_kthvalue", limit=0.15,
    ),
    _share("cpu-16", 0.03, "cpu"),
    _share("cpu-64", 0.03, "cpu"),
    _layer("mixtral", "mixtral", 1.15, "cuda"),
    _layer("qwen3", "qwen3-30b", 1.45, "cuda"),
    _arithmetic("forward", 500.0),
    _arithmetic(_BOTH, 410.0),
    _peers("peers-cuda", "every peer over ours at qwen3-30b", "qwen3-30b", _PEERS, 1.0, kind="cuda"),
    _memory("qwen3-30b", "cuda"),
    Target(
        id="router-cuda", text="`topk` on logits as a CUDA graph, over a copy of its bytes", kind="cuda",
        subject="router", shape="gate-64", impl="topk", passes="graph replay", dtype="float32", measure="over copy",
        limit=2.0,
    ),
    Target(
        id="dual-cuda", text="BIP, 4 dual iterations, ms", kind="cuda", subject="balance", shape="gate-64",
        impl="dual_update", passes="dual", dtype="float32", measure="median_ms", limit=0.15,
    ),
    _share("qwen3-30b", 0.02, "cuda"),
    _moved("dispatch", 2.4),
    _moved("combine", 2.8),
)  # fmt: skip


def verdicts(rows: Sequence[Row], *, kind: str) -> list[Verdict]:
    """One for each target, implementation and allocator that was measured; misses first."""
    found = [verdict for target in TARGETS if target.kind == kind for verdict in _judged(target, rows)]
    order = {"no": 0, "too few rounds": 1, "just": 2, "yes": 3}
    return sorted(found, key=lambda verdict: order[verdict.reached])


def _judged(target: Target, rows: Sequence[Row]) -> Iterator[Verdict]:
    place = (target.subject, target.shape, target.passes, target.dtype)
    for row in rows:
        if (row.subject, row.shape, row.passes, row.dtype) != place or row.ranks > 1:
            continue
        if not any(fnmatch(row.impl, pattern) for pattern in target.impl.split("|")):
            continue
        known = _measured(target.measure, row, rows)
        if known is not None:
            yield Verdict(
                target=target,
                impl=row.impl,
                allocator=row.allocator,
                value=known.value,
                low=known.low,
                high=known.high,
                reached=_reached(target, known, row.rounds),
            )


def _measured(measure: str, row: Row, rows: Sequence[Row]) -> Ratio | None:
    if measure.startswith("over "):
        return row.over.get(measure.removeprefix("over "))
    if measure.startswith("peak over "):
        other = next(
            (r.peak_mib for r in rows if _beside(r, row) and r.impl == measure.removeprefix("peak over ")), None
        )
        if row.peak_mib is None or not other:
            return None
        return Ratio(value=row.peak_mib / other, low=row.peak_mib / other, high=row.peak_mib / other)
    if measure == "median_ms":
        return Ratio(value=row.median_ms, low=row.low_ms, high=row.high_ms)
    rate = row.values[measure]
    return Ratio(value=rate, low=rate * row.median_ms / row.high_ms, high=rate * row.median_ms / row.low_ms)


def _beside(row: Row, other: Row) -> bool:
    """Whether both are of one table."""
    return all(getattr(row, n) == getattr(other, n) for n in ("subject", "shape", "passes", "dtype", "allocator"))


def _reached(target: Target, known: Ratio, rounds: int) -> Reached:
    if rounds < ENOUGH_ROUNDS:
        return "too few rounds"
    worst, best = (known.low, known.high) if target.at_least else (known.high, known.low)

    def fine(value: float) -> bool:
        return value >= target.limit if target.at_least else value <= target.limit

    return "yes" if fine(worst) else "just" if fine(best) else "no"
