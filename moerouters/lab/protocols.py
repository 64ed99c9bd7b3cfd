"""Comparisons with a name: a paper's protocol as routers, preset and seeds, at its own scale and at one for a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from moerouters.lab.named import named


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What `compare --protocol NAME` fills in where the command line does not say otherwise."""

    routers: tuple[str, ...]
    """Items of --routers."""
    preset: str
    seeds: int = 3


# The rows of arXiv:2502.15451, then those that keep a rival from being a straw man at another scale: smaller alpha,
# larger and smaller u. Last our default of the same family, which neither clips nor starts at 0.
_BIP = (
    "loss-controlled:alpha=0.1",
    "loss-free:rate=0.001",
    *(f"bip:variant=published;iterations={iterations}" for iterations in (2, 4, 8, 14)),
    "topk",
    "loss-controlled:alpha=0.01",
    "loss-controlled:alpha=0.001",
    "loss-free:rate=0.01",
    "loss-free:rate=0.003",
    "bip",
)
# Tables 2 to 4 of arXiv:2408.15664, and of the loss-controlled baseline a sweep about its 0.001.
_LOSS_FREE = (
    *(f"loss-controlled:alpha={alpha}" for alpha in ("0.0001", "0.001", "0.01")),
    *(f"loss-free:rate={rate}" for rate in ("0.0001", "0.001", "0.01")),
    *(f"loss-free:rule=error;rate={rate}" for rate in ("0.0001", "0.001", "0.01")),
    *(f"loss-free:rule=multiplicative;rate={rate}" for rate in ("0.0001", "0.001", "0.01")),
    "topk",
)

PROTOCOLS = {
    "bip-16": Protocol(routers=_BIP, preset="tiny"),
    "bip-64": Protocol(routers=_BIP, preset="tiny-64"),
    "loss-free": Protocol(routers=_LOSS_FREE, preset="tiny-deepseek"),
    "bip-16-paper": Protocol(routers=_BIP, preset="minimind-16", seeds=1),
    "bip-64-paper": Protocol(routers=_BIP, preset="minimind-64", seeds=1),
}


def protocol(name: str) -> Protocol:
    """The protocol of that name. Raises ConfigError with the nearest one."""
    fix = "pick one of these, or say --routers, --preset and --seeds yourself"
    return named(name, PROTOCOLS, what="protocol", where="--protocol", fix=fix)
