"""moerouters-bip: balance by steps on the dual of the assignment problem.

Reading order: config, dual (the steps), router (bip), quantile, then online and histogram.
"""

from moerouters_bip.config import BipConfig, DualConfig, QuantileConfig
from moerouters_bip.dual import dual_objective, solve_dual
from moerouters_bip.online_router import OnlineBipRouter
from moerouters_bip.quantile import QuantileRouter
from moerouters_bip.router import BipRouter

__all__ = [
    "BipConfig",
    "BipRouter",
    "DualConfig",
    "OnlineBipRouter",
    "QuantileConfig",
    "QuantileRouter",
    "dual_objective",
    "solve_dual",
]
