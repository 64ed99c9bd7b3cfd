"""moerouters-bip: balance by solving the dual of the assignment problem on the batch that is being routed."""

from moerouters_bip.config import BipConfig
from moerouters_bip.dual import dual_objective, solve_dual
from moerouters_bip.router import BipRouter

__all__ = ["BipConfig", "BipRouter", "dual_objective", "solve_dual"]
