"""moerouters-sinkhorn: selection by Sinkhorn-normalised logits, balanced over the batch that is being routed."""

from moerouters_sinkhorn.config import SinkhornConfig
from moerouters_sinkhorn.plan import sinkhorn_potential
from moerouters_sinkhorn.router import SinkhornRouter

__all__ = ["SinkhornConfig", "SinkhornRouter", "sinkhorn_potential"]
