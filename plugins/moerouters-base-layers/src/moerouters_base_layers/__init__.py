"""moerouters-base-layers: every expert gets the same number of tokens, by a balanced assignment of the batch."""

from moerouters_base_layers.assign import balanced_assignment
from moerouters_base_layers.config import BaseLayersConfig
from moerouters_base_layers.router import BaseLayersRouter

__all__ = ["BaseLayersConfig", "BaseLayersRouter", "balanced_assignment"]
