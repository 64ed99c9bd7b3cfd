"""From dense to sparse and back, for all `ds-moe` routers of a model: MoELayers, or a Hugging Face model swapped."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from moerouters import info
from moerouters.errors import ConfigError
from moerouters.registry.configs import make_config
from moerouters_ds_moe.config import DsMoeConfig, Inference
from moerouters_ds_moe.router import DsMoeRouter

Model = TypeVar("Model", bound=nn.Module)


def train_dense(model: Model) -> Model:
    """Every token gets every expert, in training and in eval mode; the model is put into training mode and returned.

    So a validation between two training steps is one of the model that is trained.
    """
    _use(model, inference="dense")
    model.train()
    return model


def sparse(
    model: Model,
    *,
    inference: Inference | None = None,
    eps: float | None = None,
    top_k: int | None = None,
    layers: str = "*",
) -> Model:
    """Tokens get the experts that `inference` says; the model is put into eval mode and returned.

    inference: by default "top_k" where top_k is given, else "threshold". eps, top_k: see DsMoeConfig; what is left out
    stays as it is. layers: a pattern for the names of routers; the others stay as they are. Training mode stays dense.
    Raises ConfigError for a bad value, and where there is no such router.
    """
    changes = {"eps": eps, "top_k": top_k}
    chosen = inference or ("threshold" if top_k is None else "top_k")
    _use(model, layers, inference=chosen, **{name: value for name, value in changes.items() if value is not None})
    model.eval()
    return model


def routers_of(model: nn.Module, layers: str = "*") -> dict[str, DsMoeRouter]:
    """By name of the module, those that match. Raises ConfigError where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, DsMoeRouter)}
    matching = {name: router for name, router in found.items() if fnmatchcase(name, layers)}
    if not matching:
        raise ConfigError(
            f"{type(model).__name__} has no router 'ds-moe'" + (f" whose name matches {layers!r}." if found else "."),
            where=", ".join(found),
            why="it is looked for among model.modules()",
            fix="build MoELayers with moerouters.build('ds-moe', gating), or moerouters.swap(model, 'ds-moe')",
        )
    return matching


def _use(model: nn.Module, layers: str = "*", **changes: Any) -> None:
    spec = info("ds-moe").spec
    routers = routers_of(model, layers)
    configs = {name: make_config(spec, router.config.model_dump() | changes) for name, router in routers.items()}
    # All are checked before the first is changed.
    for step in (DsMoeRouter.check, DsMoeRouter.use):
        for name, config in configs.items():
            assert isinstance(config, DsMoeConfig)
            step(routers[name], config)
