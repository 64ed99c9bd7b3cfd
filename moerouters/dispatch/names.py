"""The back-ends that come with the package, by name. A module is loaded when its back-end is chosen."""

from __future__ import annotations

from importlib import import_module

from moerouters.dispatch.base import Dispatcher
from moerouters.dispatch.site import Site

BACKENDS = {
    "all_gather": "AllGatherDispatcher",
    "all_to_all": "AllToAllDispatcher",
    "auto": "AutoDispatcher",
    "deepep": "DeepEpDispatcher",
    "hierarchical": "HierarchicalDispatcher",
    "mesh3d": "Mesh3dDispatcher",
    "padded": "PaddedDispatcher",
    "tensor_sliced": "TensorSlicedDispatcher",
}
"""Module of this package and the class in it, which is called with a Site."""


def built_in(name: str, site: Site) -> Dispatcher:
    """The back-end of that name. Raises KeyError for another."""
    module = import_module(f"moerouters.dispatch.{name}")
    made: Dispatcher = getattr(module, BACKENDS[name])(site)
    return made
