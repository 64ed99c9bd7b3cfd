"""`moerouters leak NAME`: what the choice for a token tells about later tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# torch is imported when the command runs.


def leak(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Routers: a name, or name:key=value;key=value.")
    ],
    num_experts: Annotated[int, typer.Option("--experts", help="Experts, E.")] = 16,
    top_k: Annotated[int, typer.Option(help="Experts per token, K.")] = 2,
    score: Annotated[str, typer.Option(help="The gating: softmax, sigmoid, sqrtsoftplus or relu.")] = "softmax",
    tokens: Annotated[int, typer.Option(help="Tokens per forward.")] = 256,
    samples: Annotated[int, typer.Option(help="Futures drawn for each past and position.")] = 64,
    repeats: Annotated[int, typer.Option(help="Pasts; more of them narrow the interval.")] = 8,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--setting", metavar="KEY=VALUE", help="A setting of all routers named.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the numbers, per position too, as JSON.")] = None,
) -> None:
    """Estimate what a router's choice tells about later tokens, in bits."""
    from moerouters.leaking.command import run_leak

    run_leak(
        names,
        settings=settings or (),
        json=json,
        num_experts=num_experts,
        top_k=top_k,
        score=score,
        tokens=tokens,
        samples=samples,
        repeats=repeats,
        seed=seed,
    )
