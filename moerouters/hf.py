"""For users of Hugging Face's Trainer (and of TRL's, which derive from it): balancing as a callback.

swap(model, "loss-free")
trainer = Trainer(model=model, ..., callbacks=[RouterCallback()])
trainer.train()
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from moerouters import hf_experts
from moerouters.handle import Handle, attach
from moerouters.metrics import dead_experts, load_cv, max_violation, min_violation
from moerouters.router_state import load_router_state, save_router_state
from moerouters.swapping.guards import knows_expert_parallel, need_transformers

with need_transformers():
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.integrations.moe import ExpertsInterface

__all__ = ["ROUTER_STATE", "RouterCallback", "ep_implementation", "token_group"]

ExpertsInterface.register(hf_experts.NAME, hf_experts.experts_forward)
if knows_expert_parallel():
    import_module("moerouters.hf_parallel")  # registers what `ep_implementation` of DistributedConfig may name

ROUTER_STATE = "router_state.safetensors"
"""File beside a checkpoint's weights that holds what routers have learned."""


class RouterCallback(TrainerCallback):
    """Attaches the routers of a swapped model to the trainer's optimizer.

    Routers learn once per optimizer step from all micro-batches and ranks; their losses are injected with the scale of
    the training loss; every log holds `moerouters/max_vio`, `max_vio_worst`, `min_vio`, `load_cv` and `dead_experts`,
    means over steps since the last log and over layers (`worst`: the worst layer); per_layer adds
    `moerouters/max_vio/<layer>`. Checkpoints hold `router_state.safetensors`, which resuming and load_best_model_at_end
    read back. token_group: ranks with distinct tokens, default those of `token_group(model)`; see `attach`.
    """

    def __init__(self, *, per_layer: bool = False, token_group: dist.ProcessGroup | None = None) -> None:
        self.handle: Handle | None = None
        self._per_layer = per_layer
        self._token_group = token_group
        self._history: list[dict[str, torch.Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, and take up the routers' state where training resumes."""
        model, optimizer = kwargs["model"], _plain(kwargs["optimizer"])
        if state.global_step:
            load_router_state(model, _checkpoint(args, state) / ROUTER_STATE)
        self.handle = attach(optimizer, model, token_group=self._token_group or token_group(model))
        _come_first(self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give injected losses the scale of the training loss in this step."""
        assert self.handle is not None
        steps = _accumulation_steps(args, state, kwargs.get("train_dataloader"))
        self.handle.scale_losses(accumulation_steps=steps, scaler=getattr(kwargs["optimizer"], "scaler", None))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the load of the step for the next log."""
        assert self.handle is not None
        if self.handle.loads:
            self._history.append(dict(self.handle.loads))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the balance since the last log, for reporters and for the trainer's own history."""
        if not self._history or logs is None or "loss" not in logs:
            return
        measured = measure(self._history, per_layer=self._per_layer)
        self._history = []
        logs.update(measured)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(measured)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what the routers have learned into the checkpoint."""
        if state.is_world_process_zero:
            save_router_state(kwargs["model"], _checkpoint(args, state) / ROUTER_STATE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the optimizer go; with load_best_model_at_end take the routers' state of the best checkpoint."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_router_state(kwargs["model"], Path(state.best_model_checkpoint) / ROUTER_STATE)
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


def ep_implementation(backend: str) -> str:
    """What to name in `DistributedConfig(ep_implementation=...)` for a dispatcher, built in or of a plug-in.

    Raises UnsupportedError before transformers 5.23, which has no place for it.
    """
    from moerouters.hf_parallel import ep_implementation

    return ep_implementation(backend)


def token_group(model: Any) -> dist.ProcessGroup | None:
    """The ranks that hold distinct batches of a model loaded with a `distributed_config`, for `attach`; else None.

    Ranks of a tensor-parallel group hold the same batch, whose tokens would be counted once per rank.
    """
    meshes = getattr(model, "_mesh_manager", None)
    if meshes is None:
        return None
    mesh = meshes.get_mesh("fsdp")
    if meshes.get_mesh("dp_replicate").size() > 1:
        mesh = meshes.get_mesh(("dp_replicate", "fsdp"))._flatten()
    group: dist.ProcessGroup = mesh.get_group()
    return group


def measure(history: list[dict[str, torch.Tensor]], *, per_layer: bool) -> dict[str, float]:
    """Metrics of the loads of some steps, each {layer: int64 [E]}; layers may differ in E."""
    layers = list(history[0])
    max_vio_L, rest = [], {"min_vio": 0.0, "load_cv": 0.0, "dead_experts": 0.0}
    for layer in layers:
        loads_SE = torch.stack([loads[layer] for loads in history])
        max_vio_L.append(max_violation(loads_SE).mean().item())
        rest["min_vio"] += min_violation(loads_SE).mean().item() / len(layers)
        rest["load_cv"] += load_cv(loads_SE).mean().item() / len(layers)
        rest["dead_experts"] += dead_experts(loads_SE).double().mean().item() / len(layers)
    found = {"max_vio": sum(max_vio_L) / len(layers), "max_vio_worst": max(max_vio_L)} | rest
    if per_layer:
        found |= {f"max_vio/{layer}": value for layer, value in zip(layers, max_vio_L, strict=True)}
    return {f"moerouters/{name}": value for name, value in found.items()}


def _plain(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's, which has no hooks of its own."""
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, Optimizer)
    return inner


def _accumulation_steps(args: TrainingArguments, state: TrainerState, dataloader: Any) -> int:
    """Micro-batches of the coming step: the last one of an epoch may have fewer."""
    steps = args.gradient_accumulation_steps
    try:
        batches = len(dataloader)
    except TypeError:
        return steps
    updates = -(-batches // steps)
    return min(steps, batches - state.global_step % updates * steps)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _come_first(callback: TrainerCallback) -> None:
    """Move the callback before those that report.

    The trainer appends callbacks to its reporters, hands the same `logs` from one to the next, and gives none a way to
    the list that they are in: it is the one that calls us.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        callbacks = getattr(frame.f_locals.get("self"), "callbacks", None)
        if isinstance(callbacks, list) and callback in callbacks:
            callbacks.remove(callback)
            callbacks.insert(0, callback)
            return
        frame = frame.f_back
