"""Dense training, sparse inference (arXiv:2404.05567): all experts in training, few of them afterwards.

Reading order: config, loss (mutual information), ranks, selection (who is active at inference), router, modes (from one
to the other), shares (how much is active), curves (what that costs), study (curves of lab models).

Names are imported when they are used: listing plug-ins must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moerouters_ds_moe.curves import Curve, Point, Rule, sweep
    from moerouters_ds_moe.modes import sparse, train_dense
    from moerouters_ds_moe.shares import active_share, active_shares

_HOMES = {
    "Curve": "curves",
    "Point": "curves",
    "Rule": "curves",
    "active_share": "shares",
    "active_shares": "shares",
    "sparse": "modes",
    "sweep": "curves",
    "train_dense": "modes",
}

__all__ = ["Curve", "Point", "Rule", "active_share", "active_shares", "sparse", "sweep", "train_dense"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moerouters_ds_moe' has no attribute {name!r}")
    return getattr(import_module(f"moerouters_ds_moe.{_HOMES[name]}"), name)
