"""The picture of the README: three ways to step on one dual.

`python plugins/moerouters-bip/tests/steps_picture.py record` computes docs/steps.json, `... render` (needs matplotlib)
draws docs/steps.svg from it. One batch of 2048 tokens for 3 experts, K = 1: with q centred, D is a bowl over a plane.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moerouters import Gating, Router
from moerouters.metrics import max_violation
from moerouters_bip import BipRouter, QuantileConfig, QuantileRouter, dual_objective, solve_dual

DOCS = Path(__file__).parents[1] / "docs"
SOURCE, PICTURE = DOCS / "steps.json", DOCS / "steps.svg"
TOKENS, E, K, RATE = 2048, 3, 1, 0.02
BATCHES, SIGN_STEPS, STEPS = 25, 25, 4
PLANE = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / torch.tensor([[2.0], [6.0]]).sqrt()
"""Two directions at right angles to each other and to (1, 1, 1)."""
REACH, GRID = (-0.12, 0.62), 45


def logits(batch: int) -> Tensor:
    random = torch.Generator().manual_seed(batch)
    return torch.randn(TOKENS, E, generator=random) + torch.tensor([1.4, 0.3, -0.9])


def load(scores_TE: Tensor, q_E: Tensor) -> Tensor:
    return torch.bincount((scores_TE - q_E).topk(K, dim=1).indices.reshape(-1), minlength=E)


def sign_step(load_E: Tensor, q_E: Tensor) -> Tensor:
    """The sign rule of loss-free balancing in terms of q = -bias, centred."""
    step_E = RATE * (load_E - load_E.double().mean()).sign().float()
    return q_E + step_E - step_E.mean()


def paths() -> dict[str, list[list[float]]]:
    """q after each step on batch 0, on the plane."""
    scores_TE = logits(0).softmax(-1)
    zero_E = torch.zeros(E)
    sign = [zero_E]
    for _ in range(SIGN_STEPS):
        sign.append(sign_step(load(scores_TE, sign[-1]), sign[-1]))
    found = {
        "sign": sign,
        "quantile": [zero_E, solve_dual(scores_TE, zero_E, top_k=K, iterations=1)],
        "bip": [solve_dual(scores_TE, zero_E, top_k=K, iterations=n) if n else zero_E for n in range(STEPS + 1)],
    }
    return {name: rounded(torch.stack(points) @ PLANE.T) for name, points in found.items()}


def violations() -> dict[str, list[float]]:
    """MaxVio of each of a row of fresh batches, as it is routed."""
    gating = Gating.softmax(E, K)
    routers: dict[str, Router] = {"quantile": QuantileRouter(gating, QuantileConfig()), "bip": BipRouter(gating)}
    found: dict[str, list[float]] = {"sign": [], **{name: [] for name in routers}}
    q_E = torch.zeros(E)
    for batch in range(BATCHES):
        load_E = load(logits(batch).softmax(-1), q_E)
        q_E = sign_step(load_E, q_E)
        found["sign"].append(float(max_violation(load_E)))
        for name, router in routers.items():
            assignment = router(logits(batch))
            router.update(assignment.stats)
            found[name].append(float(max_violation(assignment.load_E)))
    return {name: [round(value, 4) for value in values] for name, values in found.items()}


def record() -> dict[str, Any]:
    """Everything that is drawn."""
    scores_TE = logits(0).softmax(-1)
    ticks = torch.linspace(*REACH, GRID)
    objective = [
        [float(dual_objective(scores_TE, torch.stack([x, y]) @ PLANE, top_k=K)) / TOKENS for x in ticks] for y in ticks
    ]
    excess_E = load(scores_TE, torch.zeros(E)) / TOKENS - K / E
    return {
        "reach": REACH,
        "objective": [[round(value, 5) for value in row] for row in objective],
        "downhill": rounded((excess_E @ PLANE.T).unsqueeze(0))[0],
        "paths": paths(),
        "max_vio": violations(),
    }


def rounded(values: Tensor) -> list[list[float]]:
    return [[round(float(value), 4) for value in row] for row in values]


def render(data: bytes) -> None:
    import matplotlib
    import numpy as np

    from moerouters.lab.pictures import COLOURS, STYLE
    from moerouters.lab.showcase import fingerprint

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    drawn = json.loads(data)
    names = {
        "sign": f"sign rule (loss-free), one step of {RATE} a batch",
        "quantile": "quantile: to the minimum in each q, one step a batch",
        "bip": f"bip: {STEPS} such steps within the batch, going further near balance",
    }
    colours = dict(zip(names, COLOURS, strict=False))
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "moerouters", "axes.grid": False}):
        figure, (bowl, course) = plt.subplots(1, 2, figsize=(9.2, 4.3), width_ratios=(1.15, 1))
        ticks = np.linspace(*drawn["reach"], len(drawn["objective"]))
        heights = np.array(drawn["objective"])
        lowest = heights.min()
        levels = lowest + (heights.max() - lowest) * np.linspace(0, 1, 16)[1:] ** 2
        bowl.contour(ticks, ticks, heights, levels=levels, colors="#b8b8b8", linewidths=0.7)
        for name in names:
            x, y = zip(*drawn["paths"][name], strict=True)
            size = 3 if name == "sign" else 7 if name == "quantile" else 4
            width, order = (3.5, 1) if name == "quantile" else (1.2, 2)
            bowl.plot(x, y, "-o", color=colours[name], markersize=size, linewidth=width, zorder=order)
        arrow = 0.25 * np.array(drawn["downhill"])
        bowl.annotate("", arrow, (0, 0), arrowprops={"arrowstyle": "-|>", "color": "black"})
        bowl.text(arrow[0] + 0.07, arrow[1] - 0.045, "- gradient = load - target", fontsize=9)
        bowl.text(-0.02, -0.06, "q = 0: plain top-K", fontsize=9)
        bowl.set(xticks=[], yticks=[], aspect="equal", title="One batch: D(q) over the prices of 3 experts")
        for name, label in names.items():
            shown = np.maximum(drawn["max_vio"][name], 5e-4)
            course.semilogy(range(1, len(shown) + 1), shown, "-o", color=colours[name], markersize=3, label=label)
        course.set(xlabel="batch", title="MaxVio of each batch as it is routed", xlim=(0.5, len(shown) + 0.5))
        figure.legend(loc="lower center", ncols=1, bbox_to_anchor=(0.5, -0.16))
        figure.tight_layout()
        metadata: dict[str, Any] = {"Date": None, "Description": fingerprint(data)}
        figure.savefig(PICTURE, format="svg", bbox_inches="tight", metadata=metadata)


if __name__ == "__main__":
    if sys.argv[1:] == ["record"]:
        SOURCE.write_text(json.dumps(record()) + "\n", encoding="utf-8")
    elif sys.argv[1:] == ["render"]:
        render(SOURCE.read_bytes())
    else:
        raise SystemExit(__doc__)
